"""What a container will hold: which stretches are cut out of a model's files, and which of them are coded together."""

import mmap
import zlib
from collections.abc import Iterable
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path, PurePosixPath

import numpy as np

from lowbit.errors import InputError
from lowbit.storage.index import LARGEST_UNIT, Cut, File
from lowbit.storage.products import Floats, factor_between
from lowbit.storage.tensors import Tensor

SMALLEST_CUT = 32
"""Shorter contents stay among the file's other bytes, where LZMA finds what repeats."""
POOLED_BELOW = 768
"""Contents shorter than this share a unit with others of their kind: a table of their own would not pay."""
FEWEST_VALUES = 3
"""Short contents of fewer different bytes, such as zero points, stay too: LZMA spends next to nothing on them."""
POOL_BYTES = 1 << 16
LONGEST_PRODUCT = 1 << 16
VECTORS_TRIED = 64
"""How many earlier vectors of the same length are tried: the scales of a bias follow those of its weight."""


@dataclass
class Pending:
    """Stretches that will be coded together, of elements of `bits` bits."""

    bits: int
    parts: list[memoryview] = field(default_factory=list)
    size: int = 0


class Plan:
    """The files so far, the units in the order in which their payloads will lie, and what is left of the files."""

    def __init__(self) -> None:
        self.files: list[File] = []
        self.units: list[Pending] = []
        self.program: list[memoryview] = []
        self._pools: dict[tuple[str, int], int] = {}
        self._vectors: dict[int, list[tuple[Floats, int, int]]] = {}
        self._seen: dict[tuple[int, int], tuple[memoryview, int, int]] = {}

    def add(self, name: str, data: memoryview, tensors: Iterable[Tensor]) -> None:
        """Cut the tensors out of a file: all that are long enough and do not overlap what was cut before."""
        cuts = []
        position = 0
        for tensor in sorted(tensors, key=lambda tensor: (tensor.start, -tensor.stop)):
            start, stop = tensor.start, len(data) if tensor.stop < 0 else tensor.stop
            if stop > len(data):
                raise InputError(f"external data of '{tensor.name}' ends at byte {stop} of a file of {len(data)}.")
            if stop - start < POOLED_BELOW and len(set(data[start:stop])) < FEWEST_VALUES:
                continue
            while start >= position and stop - start >= SMALLEST_CUT:
                contents = data[start : min(stop, start + LARGEST_UNIT)]
                cuts.append(Cut(start, len(contents), *self._place(contents, tensor)))
                self.program.append(data[position:start])
                start = position = start + len(contents)
        self.program.append(data[position:])
        self.files.append(File(name, len(data), sha256(data).digest(), cuts))

    def _place(self, contents: memoryview, tensor: Tensor) -> tuple[int, int, int]:
        """Unit, offset and factor: those of the same bytes or of a multiple of them; else in a pool or a new unit."""
        length = len(contents)
        key = length, zlib.crc32(contents)
        if key in self._seen and self._seen[key][0].tobytes() == contents.tobytes():
            return *self._seen[key][1:], 0
        bits = tensor.bits if length * 8 % max(8, tensor.bits) == 0 else 8
        vectors = self._vectors.setdefault(length, [])
        may_be_product = bits == 32 and length <= LONGEST_PRODUCT
        numbers = np.frombuffer(contents, np.float32) if may_be_product else np.zeros(0, np.float32)
        for other, unit, offset in vectors[-VECTORS_TRIED:] if may_be_product else ():
            factor = factor_between(numbers, other)
            if factor is not None:
                return unit, offset, factor
        pool = (tensor.type, bits) if length < POOLED_BELOW else None
        number = self._pools.get(pool, -1) if pool else -1
        if number < 0 or self.units[number].size + length > POOL_BYTES:
            number = len(self.units)
            self.units.append(Pending(bits))
            if pool:
                self._pools[pool] = number
        unit_ = self.units[number]
        place = number, unit_.size
        unit_.parts.append(contents)
        unit_.size += length
        self._seen.setdefault(key, (contents, *place))
        if may_be_product:
            vectors.append((numbers, *place))
        return *place, 0


def mapped(path: Path) -> memoryview:
    """The bytes of a file, read when they are used."""
    if not path.is_file():
        raise InputError(f"'{path}' is not a file that can be read.")
    if not path.stat().st_size:
        return memoryview(b"")
    with path.open("rb") as file:
        return memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))


def external_files(tensors: Iterable[Tensor], folder: Path | None) -> dict[str, Path]:
    """Name → path of the files besides the model that hold tensors; InputError where one lies outside the folder."""
    found = {}
    for name in dict.fromkeys(tensor.location for tensor in tensors if tensor.location):
        if folder is None:
            raise InputError(f"the model keeps weights in the file '{name}'; give the model as a path, not as bytes.")
        found[name] = folder / safe_name(name)
        if not found[name].resolve().is_relative_to(folder.resolve()):
            raise InputError(f"the external file '{name}' of the model lies outside the model's folder; refused.")
    return found


def safe_name(name: str) -> str:
    """`name` if it is a plain relative path that stays in its folder; else InputError."""
    path = PurePosixPath(name)
    if not path.parts or path.is_absolute() or ".." in path.parts or "\\" in name or "\0" in name or ":" in name:
        raise InputError(f"a model names the external file '{name}', which may lie outside its own folder; refused.")
    return name
