"""Containers written by released versions open for ever, and in a reader that shares no code with this one.

tests/golden/make_containers.py wrote the files; they are never written again, only added to.
"""

from pathlib import Path

import onnx
import pytest
import second_reader
from container_models import model, save_external

from lowbit.storage.codecs import CODECS, Codec
from lowbit.storage.container import Container, pack, unpack

GOLDEN = Path(__file__).parents[1] / "golden"
FILES = sorted(GOLDEN.glob("*.lowbit"))


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_golden_container_opens(path: Path, tmp_path: Path) -> None:
    unpack(path, tmp_path / "net")
    assert (tmp_path / "net").read_bytes() == (GOLDEN / "originals" / path.stem).read_bytes()


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_second_reader_opens_it_too(path: Path) -> None:
    assert second_reader.unpack(path.read_bytes())[""] == (GOLDEN / "originals" / path.stem).read_bytes()


def test_the_golden_containers_use_every_codec() -> None:
    used: set[int] = set()

    def visit(codec: Codec) -> None:
        used.add(codec.tag)
        for child in codec.children:
            visit(child)

    for path in FILES:
        with Container(path) as container:
            for unit in container.index.units:
                visit(unit.codec)
    assert used == {codec.tag for codec in CODECS}


@pytest.mark.parametrize("raw", [True, False])
def test_what_is_packed_today_opens_in_the_second_reader(raw: bool, tmp_path: Path) -> None:
    onnx.save(model(raw=raw), tmp_path / "net.onnx")
    pack(tmp_path / "net.onnx", tmp_path / "net.lowbit")
    assert second_reader.unpack((tmp_path / "net.lowbit").read_bytes()) == {"": (tmp_path / "net.onnx").read_bytes()}


def test_external_files_open_in_the_second_reader(tmp_path: Path) -> None:
    path = save_external(tmp_path)
    pack(path, tmp_path / "net.lowbit")
    assert second_reader.unpack((tmp_path / "net.lowbit").read_bytes()) == {
        "": path.read_bytes(),
        "weights.bin": (tmp_path / "weights.bin").read_bytes(),
    }


def test_four_segments_open_in_the_second_reader(data: Path, tmp_path: Path) -> None:
    pack(data / "text/charlstm-charlotte_bronte.onnx", tmp_path / "net.lowbit")
    restored = second_reader.unpack((tmp_path / "net.lowbit").read_bytes())
    assert restored[""] == (data / "text/charlstm-charlotte_bronte.onnx").read_bytes()
