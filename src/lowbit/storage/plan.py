"""What a container will hold: a model's files, which stretches are cut out of them, and which are coded together."""

import mmap
import zlib
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path, PurePosixPath

import numpy as np

from lowbit.errors import InputError
from lowbit.storage.index import Cut, File
from lowbit.storage.products import Floats, factor_between
from lowbit.storage.protobuf import View
from lowbit.storage.tensors import Contents, onnx_tensors, safetensors_tensors

SMALLEST_CUT = 32
"""Shorter contents stay among the file's other bytes, where LZMA finds what repeats."""
POOLED_BELOW = 2048
"""Contents shorter than this share a unit with others of their kind: a table of their own would not pay."""
FEWEST_VALUES = 3
"""Short contents of fewer different bytes, such as zero points, stay too: LZMA spends next to nothing on them."""
POOL_BYTES = 1 << 16
LONGEST_PRODUCT = 1 << 16
VECTORS_TRIED = 64
"""How many earlier vectors of the same length are tried: the scales of a bias follow those of its weight."""
LARGEST_UNIT = 1 << 26
"""Longer contents are coded in parts, so that memory stays bounded whatever the size of a tensor."""


@dataclass
class Unit:
    """Stretches that will be coded together: (file number, start, length) each, of elements of `bits` bits."""

    bits: int
    varints: bool
    parts: list[tuple[int, int, int]] = field(default_factory=list)
    size: int = 0


@dataclass
class Plan:
    """The files and their bytes, and the units in the order in which their payloads will lie."""

    kind: int
    files: list[File]
    contents: list[memoryview]
    units: list[Unit]

    def unit_bytes(self, unit: Unit) -> bytearray:
        """All bytes of a unit."""
        return bytearray().join(self.contents[file][start : start + length] for file, start, length in unit.parts)

    def rest(self) -> bytes:
        """What is left of all files when the cuts are taken out."""
        kept = []
        for file, data in zip(self.files, self.contents, strict=True):
            position = 0
            for cut in file.cuts:
                kept.append(data[position : cut.start])
                position = cut.start + cut.length
            kept.append(data[position:])
        return b"".join(kept)


def mapped(path: Path) -> memoryview:
    """The bytes of a file, read when they are used."""
    if not path.is_file():
        raise InputError(f"'{path}' is not a file that can be read.")
    with path.open("rb") as file:
        return (
            memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)) if path.stat().st_size else memoryview(b"")
        )


def safe_name(name: str) -> str:
    """`name` if it is a plain relative path that stays in its folder; else InputError."""
    path = PurePosixPath(name)
    if not path.parts or path.is_absolute() or ".." in path.parts or "\\" in name or "\0" in name or ":" in name:
        raise InputError(f"a model names the external file '{name}', which may lie outside its own folder; refused.")
    return name


def plan(data: memoryview, kind: int, onnx: int, folder: Path | None) -> Plan:
    """What to cut out of a model's bytes, and of the external files in `folder` that it names."""
    tensors = onnx_tensors(View(data)) if kind == onnx else safetensors_tensors(View(data))
    wanted: dict[str, list[Contents]] = {"": []}
    for tensor in tensors:
        for contents in tensor.contents:
            wanted.setdefault(contents.location, []).append(contents)
    files = {"": data}
    for name in list(wanted)[1:]:
        if folder is None:
            raise InputError(f"the model keeps weights in the file '{name}'; give the model as a path, not as bytes.")
        path = folder / safe_name(name)
        if not path.resolve().is_relative_to(folder.resolve()):
            raise InputError(f"the external file '{name}' of the model lies outside the model's folder; refused.")
        files[name] = mapped(path)
    planner = _Planner(list(files.values()))
    for number, name in enumerate(files):
        planner.cut(number, wanted[name])
    hashed = [
        File(name, len(files[name]), sha256(files[name]).digest(), planner.cuts[n]) for n, name in enumerate(files)
    ]
    return Plan(kind, hashed, planner.files, planner.units)


class _Planner:
    """Gathers cuts and units, file by file."""

    def __init__(self, files: list[memoryview]) -> None:
        self.files = files
        self.cuts: list[list[Cut]] = [[] for _ in files]
        self.units: list[Unit] = []
        self.pools: dict[tuple[int | str, int, bool], int] = {}
        self.vectors: dict[int, list[tuple[Floats, int, int]]] = {}
        self.seen: dict[tuple[int, int], tuple[int, int, int, int]] = {}

    def cut(self, file: int, wanted: list[Contents]) -> None:
        """Cut all of `wanted` that is long enough and does not overlap what was cut before it."""
        size = len(self.files[file])
        position = 0
        for contents in sorted(wanted, key=lambda contents: (contents.start, -contents.stop)):
            start, stop = contents.start, size if contents.stop < 0 else contents.stop
            if stop > size:
                raise InputError(f"the external data of a tensor ends at byte {stop} of a file of {size}.")
            if stop - start < POOLED_BELOW and len(set(self.files[file][start:stop])) < FEWEST_VALUES:
                continue
            while stop - max(start, position) >= SMALLEST_CUT and start >= position:
                length = min(stop - start, LARGEST_UNIT)
                self._place(file, start, length, contents)
                start = position = start + length

    def _place(self, file: int, start: int, length: int, contents: Contents) -> None:
        """Put a stretch into a unit: where the same bytes are already, into a pool, or into a new one."""
        data = self.files[file][start : start + length]
        key = length, zlib.crc32(data)
        if key in self.seen:
            other, at, unit, offset = self.seen[key]
            if self.files[other][at : at + length] == data:
                self.cuts[file].append(Cut(start, length, unit, offset))
                return
        bits = contents.bits if length * 8 % max(8, contents.bits) == 0 else 8
        if bits == 32 and length <= LONGEST_PRODUCT and self._product(file, start, data):
            return
        kind = contents.kind, bits, contents.varints
        pooled = length < POOLED_BELOW
        number = self.pools.get(kind, -1) if pooled else -1
        if number < 0 or self.units[number].size + length > POOL_BYTES:
            number = len(self.units)
            self.units.append(Unit(bits, contents.varints))
            if pooled:
                self.pools[kind] = number
        unit_ = self.units[number]
        self.cuts[file].append(Cut(start, length, number, unit_.size))
        self.seen.setdefault(key, (file, start, number, unit_.size))
        unit_.parts.append((file, start, length))
        if bits == 32 and length <= LONGEST_PRODUCT:
            vectors = self.vectors.setdefault(length, [])
            vectors.append((np.frombuffer(data, np.float32), number, unit_.size))
        unit_.size += length

    def _product(self, file: int, start: int, data: memoryview) -> bool:
        """Whether a stretch is a multiple of one that was cut before; then it needs a factor only."""
        numbers = np.frombuffer(data, np.float32)
        for other, unit, offset in self.vectors.get(len(data), [])[-VECTORS_TRIED:]:
            factor = factor_between(numbers, other)
            if factor is not None:
                self.cuts[file].append(Cut(start, len(data), unit, offset, factor))
                return True
        return False
