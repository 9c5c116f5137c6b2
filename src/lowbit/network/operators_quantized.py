"""Casts, and the operators of already quantized files: QuantizeLinear, DequantizeLinear and the integer products.

Integer products are computed in float64, in which every sum of fewer than 2**38 products of 8-bit codes is exact.
"""

import onnx_ir as ir
import torch
from torch import Tensor

from lowbit.network.operators_spatial import conv
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


def bit_cast(x: Tensor, *, to: int) -> Tensor:
    return x.contiguous().view(TORCH_TYPES[to])


def _spread(parameter: Tensor, x: Tensor, axis: int, block_size: int) -> Tensor:
    """A scale or zero point (one, one for each place of an axis, or one a block) in a shape that broadcasts to x."""
    if parameter.dim() == 0 or (parameter.numel() == 1 and not block_size):
        return parameter.reshape(())
    if block_size:
        return parameter.repeat_interleave(block_size, axis).narrow(axis, 0, x.shape[axis])
    shape = [1] * x.dim()
    shape[axis] = -1
    return parameter.reshape(shape)


def quantize_linear(
    x: Tensor,
    y_scale: Tensor,
    y_zero_point: Tensor | None = None,
    *,
    axis: int = 1,
    block_size: int = 0,
    output_dtype: int = 0,
    precision: int = 0,
    saturate: int = 1,
) -> Tensor:
    """output_dtype: ONNX's type of the codes; that of the zero point, else uint8, where it is 0."""
    scale = _spread(y_scale, x, axis, block_size)
    wide = torch.float32 if precision == 0 else TORCH_TYPES[precision]
    scaled = x.to(wide) / scale.to(wide)
    dtype = TORCH_TYPES[output_dtype] if output_dtype else torch.uint8 if y_zero_point is None else y_zero_point.dtype
    if dtype.is_floating_point:
        return cast(scaled, to=output_dtype, saturate=saturate) if output_dtype else scaled.to(dtype)
    low, high = _NARROW.get(output_dtype) or (torch.iinfo(dtype).min, torch.iinfo(dtype).max)
    codes = torch.round(scaled)
    if y_zero_point is not None:
        codes = codes + _spread(y_zero_point, x, axis, block_size).to(codes.dtype)
    return codes.clamp(low, high).to(dtype)


def dequantize_linear(
    x: Tensor,
    x_scale: Tensor,
    x_zero_point: Tensor | None = None,
    *,
    axis: int = 1,
    block_size: int = 0,
    output_dtype: int = 0,
) -> Tensor:
    scale = _spread(x_scale, x, axis, block_size)
    wide = scale.dtype if scale.dtype != torch.float8_e8m0fnu else torch.float32
    values = x.to(torch.float32 if x.dtype in _FLOAT8 else torch.int32 if x.dtype != torch.int32 else x.dtype)
    if x_zero_point is not None:
        values = values - _spread(x_zero_point, x, axis, block_size).to(values.dtype)
    return (values.to(wide) * scale.to(wide)).to(TORCH_TYPES[output_dtype] if output_dtype else wide)


def dynamic_quantize_linear(x: Tensor, *, outputs: int = 3) -> tuple[Tensor, Tensor, Tensor]:
    low, high = x.amin().clamp(max=0), x.amax().clamp(min=0)
    scale = (high - low) / 255
    scale = torch.where(scale == 0, 1, scale)
    zero = torch.round(-low / scale).clamp(0, 255)
    codes = (torch.round(x / scale) + zero).clamp(0, 255)
    return codes.to(torch.uint8), scale, zero.to(torch.uint8)


def _centred(codes: Tensor, zero: Tensor | None, axis: int) -> Tensor:
    """Codes less their zero point, in float64."""
    wide = codes.to(torch.float64)
    return wide if zero is None else wide - _spread(zero, codes, axis, 0).to(torch.float64)


def _rows(parameter: Tensor | None) -> Tensor | None:
    """A per-row parameter of a left matrix factor as a column; the ONNX operators give it as a vector."""
    return (
        parameter.unsqueeze(-1)
        if parameter is not None and parameter.dim() == 1 and parameter.numel() > 1
        else parameter
    )


def _centred_matrix(codes: Tensor, zero: Tensor | None) -> Tensor:
    wide = codes.to(torch.float64)
    return wide if zero is None else wide - zero.to(torch.float64)


def matmul_integer(
    a: Tensor, b: Tensor, a_zero_point: Tensor | None = None, b_zero_point: Tensor | None = None
) -> Tensor:
    product = torch.matmul(_centred_matrix(a, _rows(a_zero_point)), _centred_matrix(b, b_zero_point))
    return product.to(torch.int32)


def qlinear_matmul(
    a: Tensor,
    a_scale: Tensor,
    a_zero_point: Tensor,
    b: Tensor,
    b_scale: Tensor,
    b_zero_point: Tensor,
    y_scale: Tensor,
    y_zero_point: Tensor,
) -> Tensor:
    product = torch.matmul(_centred_matrix(a, _rows(a_zero_point)), _centred_matrix(b, b_zero_point))
    a_rows = _rows(a_scale)
    assert a_rows is not None
    return _requantize(product * a_rows.double() * b_scale.double(), y_scale, y_zero_point)


def _requantize(values: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
    limits = torch.iinfo(zero.dtype)
    codes = torch.round(values / scale.double()) + zero.double()
    return codes.clamp(limits.min, limits.max).to(zero.dtype)


def conv_integer(
    x: Tensor,
    w: Tensor,
    x_zero_point: Tensor | None = None,
    w_zero_point: Tensor | None = None,
    *,
    auto_pad: str = "NOTSET",
    dilations: tuple[int, ...] | None = None,
    group: int = 1,
    kernel_shape: tuple[int, ...] | None = None,
    pads: tuple[int, ...] | None = None,
    strides: tuple[int, ...] | None = None,
) -> Tensor:
    sums = conv(
        _centred(x, x_zero_point, 1), _centred(w, w_zero_point, 0), None,
        auto_pad=auto_pad, dilations=dilations, group=group, pads=pads, strides=strides,
    )  # fmt: skip
    return torch.round(sums).to(torch.int32)


def qlinear_conv(
    x: Tensor,
    x_scale: Tensor,
    x_zero_point: Tensor,
    w: Tensor,
    w_scale: Tensor,
    w_zero_point: Tensor,
    y_scale: Tensor,
    y_zero_point: Tensor,
    b: Tensor | None = None,
    *,
    auto_pad: str = "NOTSET",
    dilations: tuple[int, ...] | None = None,
    group: int = 1,
    kernel_shape: tuple[int, ...] | None = None,
    pads: tuple[int, ...] | None = None,
    strides: tuple[int, ...] | None = None,
) -> Tensor:
    sums = conv(
        _centred(x, x_zero_point, 1), _centred(w, w_zero_point, 0), None if b is None else b.double(),
        auto_pad=auto_pad, dilations=dilations, group=group, pads=pads, strides=strides,
    )  # fmt: skip
    scale = x_scale.double() * _spread(w_scale, sums, 1, 0).double()
    return _requantize(sums * scale, y_scale, y_zero_point)
