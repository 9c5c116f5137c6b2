"""What is in a container, and where every byte of it went."""

import os
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lowbit.errors import InputError
from lowbit.storage.codecs import Codec, Sparse, describe
from lowbit.storage.container import Container
from lowbit.storage.index import squeeze
from lowbit.storage.tables import entropy_bits
from lowbit.storage.tensors import Tensor
from lowbit.storage.wire import Reader

MOST_DIFFERENT = 1 << 16
"""Entropy is not given for tensors of more different elements: nothing could be coded by such a table."""


@dataclass(frozen=True)
class TensorReport:
    """One tensor of a container.

    stored_bytes     its share of its unit's payload; 0 where it stays among the program's bytes
    sparsity         share of its most frequent element
    entropy_bits     zero-order entropy of its elements, bits an element; None where nearly all differ
    bits             payload bits an element
    codec            how it is coded; "program" where it stays among the program's bytes
    """

    name: str
    type: str
    shape: tuple[int, ...]
    elements: int
    file_bytes: int
    stored_bytes: float
    sparsity: float
    entropy_bits: float | None
    codec: str

    @property
    def bits(self) -> float:
        return 8 * self.stored_bytes / self.elements if self.elements else 0.0


@dataclass(frozen=True)
class ContainerReport:
    """A whole container: its tensors, and its bytes by what they are for; those of `bytes_by_use` add up to `size`.

    codes      elements, entropy-coded
    indices    relative indices of sparse tensors
    tables     frequency tables and palettes;  index: lengths, places, checksums (both are compressed together)
    program    graph, names, metadata and tensors too small to be cut out
    header     the safetensors header
    """

    size: int
    unpacked_size: int
    bytes_by_use: dict[str, int]
    tensors: list[TensorReport]


def read_tensor(path: str | os.PathLike[str], name: str) -> NDArray[Any]:
    """One tensor of a container; of the payloads only its own are read, and their checksums verified."""
    with Container(path) as container:
        tensors = container.tensors()
        for tensor in tensors:
            if tensor.name == name:
                return _array(container, tensor)
        raise InputError(f"'{path}' has no tensor '{name}'; its first ones are {[t.name for t in tensors[:8]]}.")


def inspect(path: str | os.PathLike[str]) -> ContainerReport:
    """Per tensor: sparsity, entropy, bits achieved, codec; and where every byte went."""
    with Container(path) as container:
        reports = [_report(container, tensor) for tensor in container.tensors()]
        unpacked = sum(file.size for file in container.index.files)
        return ContainerReport(container.size, unpacked, _bytes_by_use(container), reports)


def _array(container: Container, tensor: Tensor) -> NDArray[Any]:
    return tensor.array(container.read(*_place(container, tensor)))


def _place(container: Container, tensor: Tensor) -> tuple[int, int, int]:
    """The number of the file that holds a tensor's contents, and where in it they begin and end."""
    for number, file in enumerate(container.index.files):
        if file.name == tensor.location:
            return number, tensor.start, file.size if tensor.stop < 0 else tensor.stop
    raise InputError(f"'{container.path}' does not hold the external file '{tensor.location}' that its model names.")


def _report(container: Container, tensor: Tensor) -> TensorReport:
    array = _array(container, tensor)
    number, start, stop = _place(container, tensor)
    stored = 0.0
    codec = "program"
    for cut in container.index.files[number].cuts:
        if start <= cut.start < stop:
            unit = container.index.units[cut.unit]
            stored += unit.payload_bytes * cut.length / unit.size
            codec = unit.codec.name
    sparsity, entropy = _statistics(array)
    return TensorReport(
        tensor.name, tensor.type, tensor.shape, array.size, stop - start, stored, sparsity, entropy, codec
    )


def _statistics(array: NDArray[Any]) -> tuple[float, float | None]:
    """Share of the most frequent element, and zero-order entropy in bits an element."""
    if not array.size or array.dtype == object:
        return 0.0, None
    width = array.dtype.itemsize
    words = np.ascontiguousarray(array).reshape(-1).view(f"u{width}") if width in (1, 2, 4, 8) else array.reshape(-1)
    _, counts = np.unique(words, return_counts=True)
    entropy = entropy_bits(counts) / array.size if len(counts) <= MOST_DIFFERENT else None
    return float(counts.max() / array.size), entropy


def _bytes_by_use(container: Container) -> dict[str, int]:
    units = container.index.units
    data = sum(unit.payload_bytes for unit in units)
    indices = sum(_index_bytes(unit.codec, container.payload(number)) for number, unit in enumerate(units))
    index, squeezed = container.index.write(), len(container.squeezed)
    index_bytes = min(squeezed, len(squeeze(index)))
    tables = round(index_bytes * sum(len(describe(unit.codec)) for unit in units) / len(index))
    return {
        "codes": data - indices,
        "indices": indices,
        "tables": tables,
        "index": index_bytes - tables,
        "program": squeezed - index_bytes,
        "header": container.size - data - squeezed,
    }


def _index_bytes(codec: Codec, payload: bytes | memoryview) -> int:
    """How many bytes of a payload are relative indices; planes have none."""
    if isinstance(codec, Sparse):
        source = Reader(payload, "a sparse tensor")
        source.number()
        gaps, values = source.parts(2)
        return len(gaps) + _index_bytes(codec.children[1], values)
    return _index_bytes(codec.children[0], payload) if len(codec.children) == 1 else 0
