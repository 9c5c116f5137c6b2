"""The worked example of docs/container.md is what the code writes."""

import re
from pathlib import Path

import numpy as np
from safetensors.numpy import save

from lowbit.storage.ans import Ans
from lowbit.storage.container import Container, pack
from lowbit.storage.tables import Table

PAGE = (Path(__file__).parents[2] / "docs" / "container.md").read_text("utf-8")


def example() -> np.ndarray:
    found = re.search(r"values ((?:\d ){39}\d),", PAGE)
    assert found
    return np.array(found[1].split(), np.uint8)


def test_the_example_container_has_these_bytes(tmp_path: Path) -> None:
    size = pack(save({"w": example()}), tmp_path / "example.lowbit")
    assert f"Its container has {size} bytes" in PAGE
    with Container(tmp_path / "example.lowbit") as container:
        assert f"data     {container.payload(container.index.units[0]).hex(' ')} " in PAGE
        index = container.index.write()
        assert f"index    00 30 {index and container._part('index')[2:6].hex(' ')} …" in PAGE
        for line in ("02 ", "01 ", "00 68 ", "01 ", "40 28 00 ", "02 00 02 ", "0a ", "98 b0 63 42"):
            assert line in PAGE
        assert index.hex(" ").endswith("01 40 28 00 02 00 02 0a 98 b0 63 42")


def test_the_example_of_ans_has_these_bytes() -> None:
    coder = Ans(Table(0, 4, 0, 0, (5, 4, 3, 3)), 5)
    assert f"`{coder.config().hex(' ')}`" in PAGE
    assert f"`{coder.encode(example()).hex(' ')}`" in PAGE
    assert coder.frequencies[:4].tolist() == [16, 8, 4, 4]
