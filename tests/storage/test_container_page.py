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
    with Container(tmp_path / "example.lowbit") as container:
        index, payload, squeezed = container.index.write(), container.payload(0), len(container.squeezed)
    header = size - len(payload) - squeezed
    assert f"has {size} bytes: {header} of header, {len(payload)} of data, {squeezed} of" in PAGE.replace("\n", " ")
    assert f"expands to {len(index)} bytes of index" in PAGE
    assert f"`{payload.hex(' ')}`" in PAGE
    shown = re.findall(r"^(?:[0-9a-f]{2} )+(?:… )?(?:[0-9a-f]{2} ?)*(?= |\n)", PAGE.split("```")[3], re.MULTILINE)
    start, stop = "".join(shown).replace(" ", "").split("…")
    assert index.hex().startswith(start)
    assert index.hex().endswith(stop)


def test_the_example_of_ans_has_these_frequencies() -> None:
    coder = Ans(Table(0, 4, 0, 0, (5, 4, 3, 3)), 5)
    assert coder.frequencies[:4].tolist() == [16, 8, 4, 4]
    assert f"`{coder.encode(example()).hex(' ')}`" in PAGE
