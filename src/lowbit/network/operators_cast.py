"""Casts between element types, those narrower than 8 bits included."""

import onnx_ir as ir
import torch
from torch import Tensor

from lowbit.network.operators_types import TORCH_TYPES

# Ranges of the integer types that live in wider tensors.
_NARROW: dict[int, tuple[int, int]] = {
    ir.DataType.INT4: (-8, 7),
    ir.DataType.UINT4: (0, 15),
    ir.DataType.INT2: (-2, 1),
    ir.DataType.UINT2: (0, 3),
}
_FLOAT8 = {torch.float8_e4m3fn, torch.float8_e4m3fnuz, torch.float8_e5m2, torch.float8_e5m2fnuz}


def _wrap(x: Tensor, low: int, high: int) -> Tensor:
    """Integers modulo the size of the type, as two's complement drops the leading bits."""
    return (x.to(torch.int64) - low) % (high - low + 1) + low


def _to_e2m1(x: Tensor) -> Tensor:
    """The nearest of 0, ±.5, ±1, ±1.5, ±2, ±3, ±4, ±6, ties to the even code; ±6 beyond; 0 for NaN, which it lacks."""
    x = x.to(torch.float32).nan_to_num(0.0).clamp(-6, 6)
    step = torch.where(x.abs() < 2, 0.5, torch.where(x.abs() < 4, 1.0, 2.0))
    return (torch.round(x / step) * step).to(torch.float8_e4m3fn)


def _to_e8m0(x: Tensor, saturate: int, round_mode: str) -> Tensor:
    """Powers of two from 2**-127 to 2**127, by their biased exponent; 255 is NaN."""
    wide = x.to(torch.float64)
    mantissa, exponent = torch.frexp(wide)  # wide = mantissa * 2**exponent, mantissa in [0.5, 1)
    above = {"up": mantissa > 0.5, "down": torch.zeros_like(wide, dtype=torch.bool), "nearest": mantissa >= 0.75}[
        round_mode
    ]
    code = exponent - 1 + above.to(exponent.dtype) + 127
    code = torch.where(wide == 0, 0, code)
    code = torch.where(torch.isinf(wide), 255, code)
    code = code.clamp(0, 254) if saturate else torch.where((code < 0) | (code > 254), 255, code)
    return torch.where(torch.isnan(wide), 255, code).to(torch.uint8).view(torch.float8_e8m0fnu)


def cast(x: Tensor, *, to: int, round_mode: str = "up", saturate: int = 1) -> Tensor:
    dtype = TORCH_TYPES[to]
    if to in _NARROW:
        return _wrap(x.to(torch.float32) if x.dtype in _FLOAT8 else x, *_NARROW[to]).to(dtype)
    if to == ir.DataType.FLOAT4E2M1:
        return _to_e2m1(x)
    if to == ir.DataType.FLOAT8E8M0:
        return _to_e8m0(x, saturate, round_mode)
    if dtype in _FLOAT8 and saturate and x.dtype not in _FLOAT8:
        top = torch.finfo(dtype).max
        return x.to(torch.float32).clamp(-top, top).to(dtype)
    if dtype == torch.float8_e4m3fn and x.dtype not in _FLOAT8:
        wide = x.to(torch.float32)  # 464 is half way from 448 to the 480 that would be next: the last to round down
        return wide.masked_fill(wide.abs() > 464, torch.nan).to(dtype)
    return x.to(dtype)


def cast_like(x: Tensor, target: Tensor, *, to: int | None = None, round_mode: str = "up", saturate: int = 1) -> Tensor:
    """`to` is the target's ONNX type, which its tensor does not tell of types narrower than 8 bits."""
    return x.to(target.dtype) if to is None else cast(x, to=to, round_mode=round_mode, saturate=saturate)
