"""Does a serialised tensor hold what its shape declares? Asked before anything is allocated.

External data is only read from regular files inside the model's own folder: not by absolute paths, not through `..`,
not through a symbolic link that leaves it.
"""

from __future__ import annotations

import math
from pathlib import Path, PurePosixPath, PureWindowsPath

import onnx
import onnx_ir as ir

from lowbit.errors import InputError

LARGEST_TENSOR_BYTES = 1 << 42  # 4 TiB; far above any weight, far below where sizes overflow

_FIELD = {
    ir.DataType.FLOAT: ("float_data", 1),
    ir.DataType.COMPLEX64: ("float_data", 2),
    ir.DataType.DOUBLE: ("double_data", 1),
    ir.DataType.COMPLEX128: ("double_data", 2),
    ir.DataType.INT64: ("int64_data", 1),
    ir.DataType.UINT64: ("uint64_data", 1),
    ir.DataType.UINT32: ("uint64_data", 1),
    ir.DataType.STRING: ("string_data", 1),
}


def check_shape(dims: list[int], element_type: int, what: str) -> tuple[ir.DataType, int]:
    """The type and the number of elements that are declared; InputError where either is none or absurd."""
    try:
        dtype = ir.DataType(element_type)
    except ValueError:
        raise InputError(f"{what} has the unknown element type {element_type}.") from None
    if dtype == ir.DataType.UNDEFINED:
        raise InputError(f"{what} has no element type.")
    if any(dim < 0 for dim in dims):
        raise InputError(f"{what} declares the shape {dims}: a dimension is negative.")
    bits = 8 if dtype == ir.DataType.STRING else dtype.bitwidth
    count = math.prod(dims)
    if count * bits > LARGEST_TENSOR_BYTES * 8:
        raise InputError(f"{what} declares the shape {dims}: {count * bits / 8:.3g} bytes, which no model holds.")
    return dtype, count


def check_tensor(tensor: onnx.TensorProto, folder: Path | None, what: str) -> None:
    """InputError unless type, shape and stored data agree."""
    dtype, count = check_shape(list(tensor.dims), tensor.data_type, what)
    bits = 8 if dtype == ir.DataType.STRING else dtype.bitwidth
    size = (count * bits + 7) // 8
    if tensor.HasField("segment"):
        raise InputError(f"{what} is stored in segments, which no current tool writes or reads.")
    if tensor.data_location == onnx.TensorProto.EXTERNAL:
        if dtype == ir.DataType.STRING:
            raise InputError(f"{what} holds strings in external data, which ONNX does not allow.")
        check_external(tensor, size, folder, what)
    elif tensor.HasField("raw_data"):
        if dtype == ir.DataType.STRING:
            raise InputError(f"{what} holds strings as raw bytes, which ONNX does not allow.")
        if len(tensor.raw_data) != size:
            raise InputError(
                f"{what} declares {list(tensor.dims)} of {dtype.name}, {size} bytes, but holds {len(tensor.raw_data)}."
            )
    else:
        field, each = _FIELD.get(dtype, ("int32_data", 1))
        held, needed = len(getattr(tensor, field)), count * each
        if bits < 8:
            needed = size
        if held != needed:
            raise InputError(
                f"{what} declares {list(tensor.dims)} of {dtype.name}, {needed} numbers, but holds {held}."
            )


def check_external(tensor: onnx.TensorProto, size: int, folder: Path | None, what: str) -> None:
    """InputError unless the external data lies in the folder and reaches from offset to offset + size."""
    entries = {entry.key: entry.value for entry in tensor.external_data}
    location = entries.get("location", "")
    if not location:
        raise InputError(f"{what} is external data without a location.")
    if folder is None:
        raise InputError(
            f"{what} lies in the external file '{location}': load the model from its path, not from bytes."
        )
    if "\0" in location or PurePosixPath(location).is_absolute() or PureWindowsPath(location).anchor:
        raise InputError(f"{what} points to '{location}': external data must lie in the model's own folder.")
    root = folder.resolve()
    path = (folder / location).resolve()
    if ".." in PurePosixPath(location.replace("\\", "/")).parts or not path.is_relative_to(root):
        raise InputError(f"{what} points to '{location}', outside the model's own folder; copy it there to use it.")
    if not path.exists():
        raise InputError(f"{what} needs the external file '{location}', which is not in '{folder}'.")
    if not path.is_file():
        raise InputError(f"{what} points to '{location}', which is not a regular file.")
    stat = path.stat()
    if stat.st_nlink > 1:
        raise InputError(f"{what} points to '{location}', which has {stat.st_nlink} hard links; copy the file.")
    try:
        offset = int(entries.get("offset") or 0)
        length = int(entries.get("length") or size)
    except ValueError:
        raise InputError(f"{what}: offset or length of its external data is not a number.") from None
    if length != size:
        raise InputError(f"{what} declares {list(tensor.dims)}, {size} bytes, but its external data has {length}.")
    if offset < 0 or offset + size > stat.st_size:
        raise InputError(
            f"{what} needs bytes {offset} to {offset + size} of '{location}', which has {stat.st_size}; "
            "the file is incomplete."
        )
