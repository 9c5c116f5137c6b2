"""Element types of ONNX as torch holds them, and reading the integer inputs that are shapes, axes or counts.

Integers narrower than 8 bits live in 8-bit tensors and float4 in float8_e4m3fn, which contains its 15 values: torch has
no arithmetic narrower than that.
"""

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor

Ints = Tensor | Sequence[int] | int
Number = Tensor | Sequence[float] | float

TORCH_TYPES: dict[int, torch.dtype] = {
    ir.DataType.FLOAT: torch.float32,
    ir.DataType.DOUBLE: torch.float64,
    ir.DataType.FLOAT16: torch.float16,
    ir.DataType.BFLOAT16: torch.bfloat16,
    ir.DataType.FLOAT8E4M3FN: torch.float8_e4m3fn,
    ir.DataType.FLOAT8E4M3FNUZ: torch.float8_e4m3fnuz,
    ir.DataType.FLOAT8E5M2: torch.float8_e5m2,
    ir.DataType.FLOAT8E5M2FNUZ: torch.float8_e5m2fnuz,
    ir.DataType.FLOAT8E8M0: torch.float8_e8m0fnu,
    ir.DataType.FLOAT4E2M1: torch.float8_e4m3fn,
    ir.DataType.BOOL: torch.bool,
    ir.DataType.INT8: torch.int8,
    ir.DataType.INT16: torch.int16,
    ir.DataType.INT32: torch.int32,
    ir.DataType.INT64: torch.int64,
    ir.DataType.UINT8: torch.uint8,
    ir.DataType.UINT16: torch.uint16,
    ir.DataType.UINT32: torch.uint32,
    ir.DataType.UINT64: torch.uint64,
    ir.DataType.INT4: torch.int8,
    ir.DataType.UINT4: torch.uint8,
    ir.DataType.INT2: torch.int8,
    ir.DataType.UINT2: torch.uint8,
    ir.DataType.COMPLEX64: torch.complex64,
    ir.DataType.COMPLEX128: torch.complex128,
}

# ml_dtypes types that numpy and torch exchange only through their bits: the integer to view them as, and torch's type.
_BY_BITS: dict[str, tuple[type[np.generic], torch.dtype]] = {
    "bfloat16": (np.int16, torch.bfloat16),
    "float8_e4m3fn": (np.uint8, torch.float8_e4m3fn),
    "float8_e4m3fnuz": (np.uint8, torch.float8_e4m3fnuz),
    "float8_e5m2": (np.uint8, torch.float8_e5m2),
    "float8_e5m2fnuz": (np.uint8, torch.float8_e5m2fnuz),
    "float8_e8m0fnu": (np.uint8, torch.float8_e8m0fnu),
}
_WIDENED: dict[str, type[np.generic]] = {"int4": np.int8, "uint4": np.uint8, "int2": np.int8, "uint2": np.uint8}


def to_tensor(array: np.ndarray) -> Tensor:
    """A torch copy of a numpy array, of the type that TORCH_TYPES gives for it."""
    name = array.dtype.name
    if name in _BY_BITS:
        bits, dtype = _BY_BITS[name]
        return torch.from_numpy(np.array(array).view(bits)).view(dtype)
    if name in _WIDENED:
        return torch.from_numpy(array.astype(_WIDENED[name]))
    if name == "float4_e2m1fn":
        return torch.from_numpy(array.astype(np.float32)).to(torch.float8_e4m3fn)
    return torch.from_numpy(array.astype(array.dtype.str))  # onnxruntime's uint64 is C's "unsigned long long"


def ints(values: Ints) -> tuple[int, ...]:
    """A shape, axes or counts as python integers, from a literal or from a tensor of any rank."""
    if isinstance(values, Tensor):
        return tuple(values.flatten().tolist())
    return (values,) if isinstance(values, int) else tuple(values)


def number(value: Number) -> float | int:
    """The one element of a scalar input."""
    if isinstance(value, Tensor):
        element: float | int = value.item()
        return element
    return value if isinstance(value, (int, float)) else value[0]
