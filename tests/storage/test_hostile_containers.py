"""Damaged and hostile files: one clear error, nothing large allocated, nothing written outside, no old file harmed."""

import json
import lzma
import os
import tracemalloc
from pathlib import Path

import numpy as np
import onnx
import pytest
from container_models import model, save_external, weights
from onnx import TensorProto, helper

from lowbit.errors import InputError
from lowbit.storage import container as container_module
from lowbit.storage.codecs import Palette, Raw
from lowbit.storage.container import VERSION, Container, _header, pack, unpack
from lowbit.storage.index import LARGEST_UNIT, LZMA_FILTERS, Cut, File, Index, Unit, squeeze
from lowbit.storage.inspect import inspect, read_tensor
from lowbit.storage.plan import safe_name
from lowbit.storage.wire import numbers


@pytest.fixture
def packed(tmp_path: Path) -> Path:
    onnx.save(model(), tmp_path / "net.onnx")
    pack(tmp_path / "net.onnx", tmp_path / "net.lowbit")
    return tmp_path / "net.lowbit"


def forged(path: Path, index: bytes, data: bytes = b"") -> Path:
    """A container of these parts, whose header is right."""
    header = _header(len(data), len(index))
    path.write_bytes(len(header).to_bytes(8, "little") + header + data + index)
    return path


def test_any_damaged_byte_is_an_error_or_changes_nothing(packed: Path, tmp_path: Path) -> None:
    good = packed.read_bytes()
    original = (tmp_path / "net.onnx").read_bytes()
    rng = np.random.default_rng(0)
    for trial in range(400):
        bad = bytearray(good)
        for _ in range(int(rng.integers(1, 3))):
            bad[int(rng.integers(0, 600 if trial % 2 else len(bad)))] = int(rng.integers(0, 256))
        if trial % 5 == 0:
            bad = bad[: int(rng.integers(0, len(bad)))]
        (tmp_path / "bad.lowbit").write_bytes(bad)
        (tmp_path / "out.onnx").write_bytes(b"the old file")
        try:
            unpack(tmp_path / "bad.lowbit", tmp_path / "out.onnx")
        except InputError:
            assert (tmp_path / "out.onnx").read_bytes() == b"the old file"
        else:
            assert (tmp_path / "out.onnx").read_bytes() == original
    assert {p.name for p in tmp_path.iterdir()} == {"net.onnx", "net.lowbit", "bad.lowbit", "out.onnx"}


@pytest.mark.slow
def test_a_damaged_index_behind_a_right_checksum_is_refused_or_readable(packed: Path, tmp_path: Path) -> None:
    with Container(packed) as container:
        index, program = container.index.write(), bytes(container.program)
        data = b"".join(container.payload(number) for number in range(len(container.index.units)))
    rng = np.random.default_rng(1)
    refused = 0
    for _ in range(400):
        bad = bytearray(index)
        for _ in range(int(rng.integers(1, 4))):
            bad[int(rng.integers(0, len(bad)))] = int(rng.choice([0, 1, 127, 128, 255, rng.integers(0, 256)]))
        forged(tmp_path / "bad.lowbit", squeeze(bytes(bad) + program), data)
        for read in (inspect, lambda path: read_tensor(path, "int8"), lambda path: unpack(path, tmp_path / "out.onnx")):
            try:
                read(tmp_path / "bad.lowbit")
            except InputError:
                refused += 1
    assert 300 < refused < 1200


def header(data: tuple[object, object], index: tuple[object, object], kind: str = "U8", more: str = "") -> bytes:
    """A safetensors header of two parts whose shapes fit their offsets where those are numbers."""
    entries = {}
    for name, (start, stop) in {"data": data, "index": index}.items():
        size = stop - start if isinstance(start, int) and isinstance(stop, int) else 1
        entries[name] = {"dtype": kind, "shape": [size], "data_offsets": [start, stop]}
    text = json.dumps({"__metadata__": {"lowbit": VERSION}, **entries})
    return (text[:-1] + more + "}").encode()


@pytest.mark.parametrize(
    "header",
    [
        b"",
        b"{}",
        b"[" * 4000,
        json.dumps({"__metadata__": {"lowbit": VERSION}}).encode(),
        json.dumps({"__metadata__": {"lowbit": VERSION}, "data": {"data_offsets": [0, 10**18]}}).encode(),
        header((0, 8), (4, 100)),
        header((0, -8), (-8, 100)),
        header((0, 10**18), (10**18, 10**18 + 100)),
        header((0, True), (1, 100)),
        header((0, 50), (50, 99)),
        header((0, 50), (50, 100), kind="F32"),
        header((0, 50), (50, 100), kind="I8"),
        header((0, 50), (50, 100), more=',"more":{"dtype":"U8","shape":[0],"data_offsets":[100,100]}'),
        header((0, 50), (50, 100)).replace(b"lowbit", b"highbit"),
        header((0, 50), (50, 100)).replace(b'"2"', b'["2"]'),
    ],
)
def test_hostile_headers_are_refused(header: bytes, tmp_path: Path) -> None:
    (tmp_path / "a.lowbit").write_bytes(len(header).to_bytes(8, "little") + header + bytes(100))
    with pytest.raises(InputError, match=r"a\.lowbit"):
        Container(tmp_path / "a.lowbit")


def test_a_header_that_claims_all_memory_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.lowbit").write_bytes(b"\xff" * 8 + b"{}" * 100)
    with pytest.raises(InputError, match=r"not a \.lowbit container"):
        Container(tmp_path / "a.lowbit")


def test_a_newer_version_says_upgrade(tmp_path: Path, packed: Path) -> None:
    packed.write_bytes(packed.read_bytes().replace(b'"lowbit":"2"', b'"lowbit":"9"'))
    with pytest.raises(InputError, match=r"version '9'.*Upgrade"):
        Container(packed)


def bomb_index(size: int, unit: int = 0, cuts: int = 1) -> bytes:
    """One file of `size` bytes, cut into pieces of one unit that is made of no bytes at all."""
    unit = unit or size
    pieces = [Cut(i * unit, unit, 0, 0) for i in range(cuts)]
    return Index([Unit(Raw(), unit, 0, 0)], [File("", size, bytes(32), pieces)]).write()


def test_a_tensor_bomb_is_refused_before_anything_is_allocated(tmp_path: Path) -> None:
    bomb = forged(tmp_path / "bomb.lowbit", squeeze(bomb_index(1 << 45)))
    tracemalloc.start()
    with pytest.raises(InputError, match="damaged: it says 35184372088832"):
        unpack(bomb, tmp_path / "out.onnx")
    assert tracemalloc.get_traced_memory()[1] < 20e6
    tracemalloc.stop()
    forged(bomb, squeeze(bomb_index(1 << 20)))
    with pytest.raises(InputError, match="says 1048576 where at most 1000"):
        Container(bomb, max_bytes=1000)
    forged(bomb, squeeze(bomb_index(1 << 25)))
    with pytest.raises(InputError, match=f"says 33554432 where at most {LARGEST_UNIT}"):
        Container(bomb)


def test_one_unit_repeated_without_end_is_refused(tmp_path: Path) -> None:
    bomb = forged(tmp_path / "bomb.lowbit", squeeze(bomb_index(1 << 34, unit=1 << 24, cuts=1 << 10)))
    with pytest.raises(InputError, match="unpacks to 17179869184 bytes"):
        unpack(bomb, tmp_path / "out.onnx")


def test_a_compression_bomb_in_the_index_is_refused(tmp_path: Path) -> None:
    zeros = bytes(1 << 24)
    squeezed = lzma.compress(zeros, format=lzma.FORMAT_RAW, filters=LZMA_FILTERS)
    lying = numbers([100]) + bytes(4) + squeezed  # says 100 bytes, holds 16 MB
    honest = numbers([1 << 40]) + bytes(4) + squeezed
    for blob in (lying, honest):
        bomb = forged(tmp_path / "bomb.lowbit", blob)
        tracemalloc.start()
        with pytest.raises(InputError, match="index of"):
            Container(bomb)
        assert tracemalloc.get_traced_memory()[1] < 20e6
        tracemalloc.stop()


@pytest.mark.parametrize(
    "cut",
    [Cut(0, 200, 0, 0), Cut(60, 50, 0, 0),
     Cut(0, 50, 0, 60), Cut(0, 50, 1, 0), Cut(0, 4, 0, 0, 1 << 32), Cut(0, 2, 0, 0, 1)],
    ids=["beyond the file", "over its end", "beyond its unit", "no such unit", "a factor of 33 bits", "half a float"],
)  # fmt: skip
def test_a_cut_that_cannot_be_is_refused(cut: Cut, tmp_path: Path) -> None:
    index = Index([Unit(Raw(), 100, 0, 0)], [File("", 100, bytes(32), [cut])])
    forged(tmp_path / "a.lowbit", squeeze(index.write()))
    with pytest.raises(InputError, match="damaged"):
        Container(tmp_path / "a.lowbit")


@pytest.mark.parametrize("name", ["../evil", "/etc/evil", "a/../../evil", "..", "", "C:evil", "a\\b", "a\0b", "."])
def test_external_names_that_leave_the_folder_are_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="may lie outside"):
        safe_name(name)
    files = [File("", 4, bytes(32), []), File(name, 4, bytes(32), [])]
    forged(tmp_path / "a.lowbit", squeeze(Index([], files).write() + bytes(8)))
    with pytest.raises(InputError):
        unpack(tmp_path / "a.lowbit", tmp_path / "out.onnx")


def test_packing_does_not_follow_external_names_out_of_the_folder(tmp_path: Path) -> None:
    (tmp_path / "secret").write_bytes(bytes(5000))
    folder = tmp_path / "net"
    folder.mkdir()
    path = save_external(folder)
    proto = path.read_bytes()
    path.write_bytes(proto.replace(b"weights.bin", b"../secret__"))
    with pytest.raises(InputError, match="may lie outside"):
        pack(path, tmp_path / "net.lowbit")
    path.write_bytes(proto)
    (folder / "weights.bin").unlink()
    os.symlink(tmp_path / "secret", folder / "weights.bin")
    with pytest.raises(InputError, match="outside the model's folder"):
        pack(path, tmp_path / "net.lowbit")


def test_what_is_not_a_model_is_refused_and_nothing_is_written(tmp_path: Path) -> None:
    cases = {
        "empty": b"",
        "text": b"hello, this is no model at all, just words",
        "random": np.random.default_rng(0).bytes(5000),
        "truncated": model().SerializeToString()[:-100],
        "zip": b"PK\x03\x04" + bytes(100),
        "safetensors": (40).to_bytes(8, "little") + b'{"a":{"dtype":"U8","shape":[9],"data_offsets":[0,9]}}',
    }
    for name, content in cases.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(InputError):
            pack(tmp_path / name, tmp_path / "out.lowbit")
    with pytest.raises(InputError, match="not a file"):
        pack(tmp_path / "missing.onnx", tmp_path / "out.lowbit")
    with pytest.raises(InputError, match="cannot pack a float"):
        pack(3.5, tmp_path / "out.lowbit")
    assert not (tmp_path / "out.lowbit").exists()


def test_packing_what_is_packed_or_onto_itself_is_refused(packed: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="packed already"):
        pack(packed, tmp_path / "twice.lowbit")
    with pytest.raises(InputError, match="is the input"):
        pack(tmp_path / "net.onnx", tmp_path / "net.onnx")
    with pytest.raises(InputError, match="is the input"):
        unpack(packed, packed)


def test_a_codec_that_fails_to_give_back_is_caught_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    onnx.save(model(), tmp_path / "net.onnx")
    (tmp_path / "net.lowbit").write_bytes(b"old")
    monkeypatch.setattr(
        container_module, "choose", lambda elements, *_, **__: Palette(elements.itemsize, (0,), (Raw(),))
    )
    with pytest.raises(InputError):
        pack(tmp_path / "net.onnx", tmp_path / "net.lowbit")
    assert (tmp_path / "net.lowbit").read_bytes() == b"old"


def test_deep_graphs_are_refused(tmp_path: Path) -> None:
    message = b""
    for _ in range(200):  # a graph in an attribute of a node of a graph …
        for key in (0x32, 0x2A, 0x0A):
            message = bytes([key]) + numbers([len(message)]) + message
    (tmp_path / "deep.onnx").write_bytes(b"\x3a" + numbers([len(message)]) + message)
    with pytest.raises(InputError, match="deep"):
        pack(tmp_path / "deep.onnx", tmp_path / "out.lowbit")


def test_external_data_beyond_its_file_is_refused(tmp_path: Path) -> None:
    path = save_external(tmp_path)
    (tmp_path / "weights.bin").write_bytes(bytes(200))
    with pytest.raises(InputError, match="ends at byte"):
        pack(path, tmp_path / "net.lowbit")


def test_a_wrong_length_of_elements_is_coded_as_bytes(tmp_path: Path) -> None:
    tensor = TensorProto(
        name="odd", data_type=TensorProto.FLOAT, dims=[3], raw_data=weights()["float"].tobytes()[:4001]
    )
    onnx.save(helper.make_model(helper.make_graph([], "g", [], [], [tensor])), tmp_path / "net.onnx")
    pack(tmp_path / "net.onnx", tmp_path / "net.lowbit")
    unpack(tmp_path / "net.lowbit", tmp_path / "again.onnx")
    assert (tmp_path / "again.onnx").read_bytes() == (tmp_path / "net.onnx").read_bytes()
