"""Where the tensors of a file lie: ONNX (initialisers, constants, subgraphs, functions) and safetensors.

Field numbers are those of onnx.proto3.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass, field

from lowbit.errors import InputError
from lowbit.storage.protobuf import BYTES, Field, View

MAX_DEPTH = 64
"""Graphs inside graphs; deeper is taken for an attack."""

ONNX_BITS = {
    1: 32, 2: 8, 3: 8, 4: 16, 5: 16, 6: 32, 7: 64, 9: 8, 10: 16, 11: 64, 12: 32, 13: 64, 14: 32, 15: 64, 16: 16,
    17: 8, 18: 8, 19: 8, 20: 8, 21: 4, 22: 4, 23: 4, 24: 8, 25: 2, 26: 2,
}  # fmt: skip
"""TensorProto.DataType → bits of an element (of half an element, where it is complex)."""

SAFETENSORS_BITS = {
    "F64": 64, "I64": 64, "U64": 64, "F32": 32, "I32": 32, "U32": 32, "F16": 16, "BF16": 16, "I16": 16, "U16": 16,
    "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "I8": 8, "U8": 8, "BOOL": 8, "F4": 4,
}  # fmt: skip


@dataclass(frozen=True)
class Contents:
    """A stretch of a file that holds the elements of one tensor.

    start, stop   in the file; of an external file where `location` names one, stop -1 for "to its end"
    bits          of an element; varints: each byte of elements is a protobuf varint instead
    kind          the tensor's element type: stretches of one kind may be coded together
    """

    start: int
    stop: int
    bits: int
    varints: bool = False
    location: str = ""
    kind: int | str = 0


@dataclass
class Tensor:
    """A tensor of a file: its name, and where it lies.

    start, stop   its TensorProto in an ONNX file; its elements in a safetensors file
    contents      the stretches worth coding: none where a tensor is empty or keeps strings
    """

    name: str
    kind: int | str
    shape: tuple[int, ...]
    start: int
    stop: int
    contents: list[Contents] = field(default_factory=list)


def onnx_tensors(view: View) -> list[Tensor]:
    """Every tensor of an ONNX model. InputError where the bytes are not one."""
    found: list[Tensor] = []
    graphs = 0
    for part in view.fields(0, view.size):
        if part.number == 7 and part.wire == BYTES:  # ModelProto.graph
            graphs += 1
            found.extend(_graph(view, part, 0))
        elif part.number == 25 and part.wire == BYTES:  # ModelProto.functions
            for inner in view.fields(part.start, part.stop):
                if inner.number == 7 and inner.wire == BYTES:  # FunctionProto.node
                    found.extend(_node(view, inner, 0))
    if graphs != 1:
        raise InputError(f"not an ONNX model: it holds {graphs} graphs instead of one.")
    return found


def _graph(view: View, graph: Field, depth: int) -> Iterator[Tensor]:
    if depth > MAX_DEPTH:
        raise InputError(f"a model is damaged or hostile: its graphs lie {depth} deep (at most {MAX_DEPTH}).")
    for part in view.fields(graph.start, graph.stop):
        if part.wire != BYTES:
            continue
        if part.number == 1:  # GraphProto.node
            yield from _node(view, part, depth)
        elif part.number == 5:  # GraphProto.initializer
            yield _tensor(view, part, "")
        elif part.number == 15:  # GraphProto.sparse_initializer
            yield from _sparse_tensor(view, part, "")


def _node(view: View, node: Field, depth: int) -> Iterator[Tensor]:
    output = ""
    for part in view.fields(node.start, node.stop):
        if part.wire != BYTES:
            continue
        if part.number == 2 and not output:  # NodeProto.output
            output = _text(view, part)
        elif part.number == 5:  # NodeProto.attribute
            for inner in view.fields(part.start, part.stop):
                if inner.wire != BYTES:
                    continue
                if inner.number in (5, 10):  # AttributeProto.t, tensors
                    yield _tensor(view, inner, output)
                elif inner.number in (6, 11):  # AttributeProto.g, graphs
                    yield from _graph(view, inner, depth + 1)
                elif inner.number in (22, 23):  # AttributeProto.sparse_tensor, sparse_tensors
                    yield from _sparse_tensor(view, inner, output)


def _sparse_tensor(view: View, sparse: Field, name: str) -> Iterator[Tensor]:
    for part in view.fields(sparse.start, sparse.stop):
        if part.wire == BYTES and part.number in (1, 2):  # SparseTensorProto.values, indices
            yield _tensor(view, part, name)


def _tensor(view: View, proto: Field, owner: str) -> Tensor:
    """A TensorProto; `owner`, the output of the node that holds it, is its name if it has none itself."""
    tensor = Tensor(owner, 0, (), proto.start, proto.stop)
    shape: list[int] = []
    places: list[Field] = []
    external: dict[str, str] = {}
    for part in view.fields(proto.start, proto.stop):
        if part.number == 1 and part.wire == BYTES:  # dims
            position = part.start
            while position < part.stop:
                size, position = view.varint(position, part.stop)
                shape.append(size)
        elif part.number == 1:
            shape.append(view.varint(part.start, part.stop)[0])
        elif part.number == 2:  # data_type
            tensor.kind = view.varint(part.start, part.stop)[0]
        elif part.number == 8 and part.wire == BYTES and part.stop > part.start:  # name
            tensor.name = _text(view, part)
        elif part.number == 13 and part.wire == BYTES:  # external_data
            key, value = "", ""
            for entry in view.fields(part.start, part.stop):
                key, value = (_text(view, entry), value) if entry.number == 1 else (key, _text(view, entry))
            external[key] = value
        elif part.number in (4, 5, 7, 9, 10, 11) and part.wire == BYTES:  # the fields that hold elements
            places.append(part)
    tensor.shape = tuple(shape)
    bits = ONNX_BITS.get(int(tensor.kind), 8)
    for part in places:
        widths = {4: 32, 10: 64, 9: bits}  # float_data, double_data, raw_data; the rest hold varints
        width, varints = widths.get(part.number, min(bits, 8)), part.number not in widths
        tensor.contents.append(Contents(part.start, part.stop, width, varints, kind=tensor.kind))
    if "location" in external:
        tensor.contents.append(_external(external, bits, tensor.kind))
    return tensor


def _external(entries: dict[str, str], bits: int, kind: int | str) -> Contents:
    try:
        offset, length = int(entries.get("offset", "0")), int(entries.get("length", "-1"))
    except ValueError:
        raise InputError(f"external data of a tensor is described by {entries}, which are not numbers.") from None
    if offset < 0:
        raise InputError(f"external data of a tensor begins at byte {offset} of '{entries['location']}'.")
    return Contents(offset, offset + length if length >= 0 else -1, bits, location=entries["location"], kind=kind)


def _text(view: View, part: Field) -> str:
    return bytes(view.take(part.start, part.stop)).decode("utf-8", "replace")


def safetensors_tensors(view: View) -> list[Tensor]:
    """Every tensor of a safetensors file. InputError where the bytes are not one."""
    if view.size < 8 or (length := int.from_bytes(view.take(0, 8), "little")) > min(view.size - 8, 100_000_000):
        raise InputError("not a safetensors file: the length of its header does not fit its size.")
    try:
        header = json.loads(bytes(view.take(8, 8 + length)))
        found = [_entry(name, entry, 8 + length) for name, entry in header.items() if name != "__metadata__"]
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise InputError(f"not a safetensors file: its header is not what it should be ({error}).") from None
    found.sort(key=lambda tensor: tensor.start)
    position = 8 + length
    for tensor in found:
        if tensor.start != position or tensor.stop < tensor.start:
            raise InputError(
                f"a safetensors file is damaged: '{tensor.name}' begins at {tensor.start}, not {position}."
            )
        position = tensor.stop
    if position != view.size:
        raise InputError(f"a safetensors file is damaged: its tensors end at byte {position} of {view.size}.")
    return found


def _entry(name: str, entry: dict[str, object], base: int) -> Tensor:
    begin, end = (int(offset) + base for offset in entry["data_offsets"])  # type: ignore[attr-defined]
    shape = tuple(int(size) for size in entry["shape"])  # type: ignore[attr-defined]
    kind = str(entry["dtype"])
    return Tensor(name, kind, shape, begin, end, [Contents(begin, end, SAFETENSORS_BITS.get(kind, 8), kind=kind)])
