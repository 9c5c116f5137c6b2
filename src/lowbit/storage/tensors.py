"""Where the tensors of a file lie: the libraries of ONNX and safetensors say what they hold, a search says where.

Contents are looked for among the file's own bytes, so that nothing has to be parsed and written anew: what comes back
does not depend on how a library writes messages.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import ml_dtypes
import numpy as np
import onnx
from google.protobuf.message import DecodeError, Message  # type: ignore[import-untyped]
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from lowbit.errors import InputError

SAFETENSORS_TYPES: dict[str, Any] = {
    "F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16, "I64": np.int64,
    "I32": np.int32, "I16": np.int16, "I8": np.int8, "U64": np.uint64, "U32": np.uint32, "U16": np.uint16,
    "U8": np.uint8, "BOOL": np.bool_, "F8_E4M3": ml_dtypes.float8_e4m3fn, "F8_E5M2": ml_dtypes.float8_e5m2,
    "F8_E8M0": ml_dtypes.float8_e8m0fnu,
}  # fmt: skip
PACKED_BITS = {"int4": 4, "uint4": 4, "float4e2m1": 4, "int2": 2, "uint2": 2}
"""ONNX types of which a byte holds several elements."""
PROBE_BYTES = 64


@dataclass(frozen=True)
class Tensor:
    """A tensor of a file, and where its elements lie.

    type          as ONNX or safetensors names it, in lower case
    start, stop   in the file `location` ("": the model itself), stop -1 for "to its end"; an empty stretch where they
                  are not one piece of bytes: typed integers, strings
    bits          of an element as it lies there
    message       the TensorProto, of an ONNX file
    """

    name: str
    type: str
    shape: tuple[int, ...]
    bits: int
    start: int = 0
    stop: int = 0
    location: str = ""
    message: Any = None

    def array(self, contents: bytes) -> NDArray[Any]:
        """Its elements, of which `contents` are the bytes from start to stop."""
        try:
            if self.message is None:
                return np.frombuffer(contents, SAFETENSORS_TYPES[self.type.upper()]).reshape(self.shape)
            message = TensorProto()
            message.CopyFrom(self.message)
            if contents:
                for field in ("float_data", "double_data", "external_data", "data_location"):
                    message.ClearField(field)
                message.raw_data = contents
            return np.asarray(numpy_helper.to_array(message))
        except (ValueError, TypeError, KeyError) as error:
            raise InputError(f"tensor '{self.name}' ({self.type}) does not hold what it says: {error}.") from None


def onnx_tensors(data: bytes) -> list[Tensor]:
    """Every tensor of an ONNX model: initialisers, constants, in subgraphs and functions. InputError if it is none."""
    try:
        model = onnx.ModelProto.FromString(data)
    except DecodeError as error:
        raise InputError(f"not an ONNX model, or one whose graphs lie too deep: {error}.") from None
    if not model.HasField("graph"):
        raise InputError("not an ONNX model: it holds no graph.")
    tensors = []
    position = 0
    for owner, message in _messages(model, ""):
        tensor = _onnx_tensor(owner, message, data, position)
        tensors.append(tensor)
        position = tensor.stop if tensor.stop and not tensor.location else position
    return tensors


def _messages(message: Message, owner: str) -> Iterator[tuple[str, TensorProto]]:
    """The tensors in a message, each with the first output of the node that holds it."""
    if isinstance(message, TensorProto):
        yield owner, message
        return
    if isinstance(message, onnx.NodeProto) and message.output:
        owner = message.output[0]
    for field, value in message.ListFields():
        if field.message_type is not None:
            for inner in [value] if isinstance(value, Message) else value:
                yield from _messages(inner, owner)


def _onnx_tensor(owner: str, message: TensorProto, data: bytes, position: int) -> Tensor:
    """The tensor of a message; its contents are looked for from `position` on, then from the beginning."""
    kind = message.data_type
    try:
        name = TensorProto.DataType.Name(kind).lower()
        bits = PACKED_BITS.get(name) or 8 * min(8, helper.tensor_dtype_to_np_dtype(kind).itemsize)
    except (ValueError, KeyError):
        name, bits = str(kind), 8
    tensor = Tensor(message.name or owner, name, tuple(message.dims), bits, message=message)
    if message.data_location == TensorProto.EXTERNAL or message.external_data:
        return replace(tensor, **_external(message))
    contents = message.raw_data or np.asarray(message.float_data, "<f4").tobytes()
    contents = contents or np.asarray(message.double_data, "<f8").tobytes()
    if contents:
        start = data.find(contents[:PROBE_BYTES], position)  # where files keep the order of fields, it is there
        if start < 0 or not data.startswith(contents, start):
            start = max(data.find(contents, position), data.find(contents, 0, position + len(contents)))
        if start >= 0:
            return replace(tensor, start=start, stop=start + len(contents))
    return tensor


def _external(message: TensorProto) -> dict[str, Any]:
    """Which file holds external data, and where they begin and end in it."""
    entries = {entry.key: entry.value for entry in message.external_data}
    try:
        location, start, length = entries["location"], int(entries.get("offset", "0")), int(entries.get("length", "-1"))
    except (ValueError, KeyError):
        raise InputError(
            f"external data of '{message.name}' are described by {entries}, which says not where."
        ) from None
    if start < 0 or not location:
        raise InputError(f"external data of '{message.name}' begin at byte {start} of '{location}'.")
    return {"location": location, "start": start, "stop": start + length if length >= 0 else -1}


def safetensors_tensors(data: memoryview) -> list[Tensor]:
    """Every tensor of a safetensors file in the order of their bytes. InputError if it is none."""
    begin = 8 + int.from_bytes(data[:8], "little")
    try:
        header = json.loads(bytes(data[8:begin]))
        found = [_entry(name, entry, begin) for name, entry in header.items() if name != "__metadata__"]
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise InputError(f"not a safetensors file: its header is not what it should be ({error}).") from None
    for tensor in found:
        if not begin <= tensor.start <= tensor.stop <= len(data):
            raise InputError(f"a safetensors file is damaged: '{tensor.name}' does not lie in its {len(data)} bytes.")
    return sorted(found, key=lambda tensor: tensor.start)


def _entry(name: str, entry: dict[str, Any], begin: int) -> Tensor:
    start, stop = (int(offset) + begin for offset in entry["data_offsets"])
    bits = 8 * np.dtype(SAFETENSORS_TYPES.get(entry["dtype"], np.uint8)).itemsize
    return Tensor(name, str(entry["dtype"]).lower(), tuple(map(int, entry["shape"])), bits, start, stop)
