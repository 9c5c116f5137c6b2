"""What is in a container, and where every byte of it went."""

import os
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np
import onnx
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]
from numpy.typing import NDArray
from onnx import numpy_helper

from lowbit.errors import InputError
from lowbit.storage.codecs import Codec, Planes, Sparse, split_parts
from lowbit.storage.configs import write_config
from lowbit.storage.container import Container
from lowbit.storage.index import ONNX
from lowbit.storage.protobuf import View
from lowbit.storage.tensors import Tensor, onnx_tensors, safetensors_tensors
from lowbit.storage.wire import Reader

SAFETENSORS_TYPES: dict[str, Any] = {
    "F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16, "I64": np.int64,
    "I32": np.int32, "I16": np.int16, "I8": np.int8, "U64": np.uint64, "U32": np.uint32, "U16": np.uint16,
    "U8": np.uint8, "BOOL": np.bool_, "F8_E4M3": ml_dtypes.float8_e4m3fn, "F8_E5M2": ml_dtypes.float8_e5m2,
}  # fmt: skip
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


def tensor_names(path: str | os.PathLike[str]) -> list[str]:
    """The names of all tensors in a container, in the order of its file; no payload is read."""
    with Container(path) as container:
        return [tensor.name for tensor in _tensors(container)]


def read_tensor(path: str | os.PathLike[str], name: str) -> NDArray[Any]:
    """One tensor of a container; of the payloads only its own are read, and their checksums verified."""
    with Container(path) as container:
        for tensor in _tensors(container):
            if tensor.name == name:
                return _array(container, tensor)
        raise InputError(f"'{path}' has no tensor '{name}'; its first ones are {tensor_names(path)[:8]}.")


def inspect(path: str | os.PathLike[str]) -> ContainerReport:
    """Per tensor: sparsity, entropy, bits achieved, codec; and where every byte went."""
    with Container(path) as container:
        uses = _bytes_by_use(container)
        reports = [_report(container, tensor) for tensor in _tensors(container)]
        unpacked = sum(file.size for file in container.index.files)
        return ContainerReport(container.size, unpacked, uses, reports)


def _tensors(container: Container) -> list[Tensor]:
    view = View(container.rest(0), [(cut.start, cut.length) for cut in container.index.files[0].cuts])
    return onnx_tensors(view) if container.index.kind == ONNX else safetensors_tensors(view)


def _array(container: Container, tensor: Tensor) -> NDArray[Any]:
    try:
        return _decoded(container, tensor)
    except (ValueError, TypeError, KeyError, DecodeError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"tensor '{tensor.name}' of '{container.path}' does not hold what it says: {error}.") from None


def _decoded(container: Container, tensor: Tensor) -> NDArray[Any]:
    if container.index.kind != ONNX:
        kind = SAFETENSORS_TYPES.get(str(tensor.kind))
        if kind is None:
            raise InputError(f"tensor '{tensor.name}' is of type {tensor.kind}, which numpy has no type for.")
        return np.frombuffer(container.read(0, tensor.start, tensor.stop), kind).reshape(tensor.shape)
    proto = onnx.TensorProto.FromString(container.read(0, tensor.start, tensor.stop))
    for contents in tensor.contents:
        if contents.location:
            number, start, stop = _place(container, contents.location, contents.start, contents.stop)
            proto.raw_data = container.read(number, start, stop)
            del proto.external_data[:]
            proto.data_location = onnx.TensorProto.DEFAULT
    return np.asarray(numpy_helper.to_array(proto))


def _place(container: Container, location: str, start: int, stop: int) -> tuple[int, int, int]:
    for number, file in enumerate(container.index.files):
        if file.name == location and (location or number == 0):
            return number, start, file.size if stop < 0 else stop
    raise InputError(f"'{container.path}' does not hold the external file '{location}' that its model names.")


def _report(container: Container, tensor: Tensor) -> TensorReport:
    array = _array(container, tensor)
    stored = 0.0
    file_bytes = 0
    codecs: list[str] = []
    for contents in tensor.contents:
        number, start, stop = _place(container, contents.location, contents.start, contents.stop)
        file_bytes += stop - start
        for cut in container.index.files[number].cuts:
            if start <= cut.start < stop:
                unit = container.index.units[cut.unit]
                stored += (unit.payload[1] - unit.payload[0]) * cut.length / unit.size
                codecs.append(unit.codec.name)
    names = {number: name for name, number in onnx.TensorProto.DataType.items()}
    kind = str(tensor.kind if isinstance(tensor.kind, str) else names.get(tensor.kind, tensor.kind)).lower()
    sparsity, entropy = _statistics(array)
    codec = codecs[0] if codecs else "program"
    return TensorReport(tensor.name, kind, tensor.shape, array.size, file_bytes, stored, sparsity, entropy, codec)


def _statistics(array: NDArray[Any]) -> tuple[float, float | None]:
    """Share of the most frequent element, and zero-order entropy in bits an element."""
    if not array.size or array.dtype == object:
        return 0.0, None
    width = array.dtype.itemsize
    words = np.ascontiguousarray(array).reshape(-1).view(f"u{width}") if width in (1, 2, 4, 8) else array.reshape(-1)
    _, counts = np.unique(words, return_counts=True)
    share = counts / array.size
    return float(share.max()), float(-(share * np.log2(share)).sum()) if len(counts) <= MOST_DIFFERENT else None


def _bytes_by_use(container: Container) -> dict[str, int]:
    parts = {name: stop - start for name, (start, stop) in container.envelope.parts.items()}
    indices = sum(_index_bytes(unit.codec, container.payload(unit)) for unit in container.index.units)
    known: list[Codec] = []
    configs = sum(len(write_config(unit.codec, known)) for unit in container.index.units)
    tables = round(parts["index"] * configs / max(1, container.index_size))
    return {
        "codes": parts["data"] - indices,
        "indices": indices,
        "tables": tables,
        "index": parts["index"] - tables,
        "program": parts["program"],
        "header": container.size - sum(parts.values()),
    }


def _index_bytes(codec: Codec, payload: bytes | memoryview) -> int:
    """How many bytes of a payload are relative indices."""
    if isinstance(codec, Sparse):
        source = Reader(payload, "a sparse tensor")
        source.varint()
        gaps, values = split_parts(source.take(source.left), 2)
        return len(gaps) + _index_bytes(codec.children[1], values)
    if isinstance(codec, Planes):
        pairs = zip(codec.children, split_parts(payload, codec.width), strict=True)
        return sum(_index_bytes(child, part) for child, part in pairs)
    return _index_bytes(codec.children[0], payload) if codec.children else 0
