"""Codes from numbers and numbers from codes, row-wise: the functions under every quantizer.

A deterministic rounding on a grid is a sorted list of thresholds: code k is what reaches k of them. `Int` and `Float`
have closed forms that give the same codes. On the CPU kernels do the work; elsewhere torch does, with the same results.
"""

from functools import lru_cache

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from lowbit.errors import InputError
from lowbit.numerics import kernels
from lowbit.numerics.fitted import Fitted
from lowbit.numerics.grids import Float, Grid, Int, Pow2, grid_table
from lowbit.numerics.roundings import ROUNDINGS, Rounding, nearest

Rows = npt.NDArray[np.float32]
FEW = 6  # bits: up to so many, comparing with every threshold beats finding the exponent


def encode_rows(
    rows: Tensor,
    scale: Tensor,
    zero: Tensor,
    grid: Grid | Fitted,
    rounding: Rounding = nearest,
    table: Tensor | None = None,
) -> Tensor:
    """Codes of rows (n_blocks, n) in the grid's code type.

    scale, zero  (n_blocks, 1), or (1, 1) for all; a scale of 0 gives the codes of zeros
    table        sorted values to use instead of the grid's own, (n_blocks, n_codes)

    `Int` rounds x / scale before it adds the zero, as ONNX QuantizeLinear does: ties would go elsewhere otherwise.
    """
    dtype = code_dtype(grid)
    if rounding not in ROUNDINGS.values():
        return _encode_by_fraction(rows, scale, zero, grid, rounding, table).to(dtype)
    if rows.device.type != "cpu" or (isinstance(grid, Int) and rounding is not nearest):
        return _encode_in_torch(rows, scale, zero, grid, rounding, table).to(dtype)
    out = fresh(rows.shape, dtype)
    x, s, z = _arrays(rows, scale, zero)
    if isinstance(grid, Int):
        kernels.encode_int(x, s, z, np.float32(grid.minimum), np.float32(grid.maximum), out.numpy())
    elif table is None and isinstance(grid, Float) and rounding is nearest and not z.any():
        encode = kernels.encode_float if _fits_float32(grid) else kernels.encode_wide_float
        encode(x, s, *_float_constants(grid), np.int32(grid_table(grid).zero_position), out.numpy())
    elif table is None and isinstance(grid, Pow2) and grid.bits > FEW and grid.lowest >= -127 and not z.any():
        kernels.encode_pow2(x, s, np.int32(grid.lowest), grid_thresholds(grid, rounding), out.numpy())
    else:
        limits = (
            thresholds(table, 0, rounding).numpy()
            if table is not None
            else grid_thresholds(_fixed(grid), rounding)[None]
        )
        kernels.encode_table(x, s, z, limits, out.numpy())
    return out


def decode_rows(codes: Tensor, scale: Tensor, zero: Tensor, grid: Grid | Fitted, table: Tensor | None = None) -> Tensor:
    """(value - zero) * scale of codes (n_blocks, n), float32."""
    if codes.device.type != "cpu":
        return (decode(codes, grid, table) - zero) * scale
    out = fresh(codes.shape)
    held = codes.contiguous().numpy()
    s, z = _arrays(scale, zero)
    if isinstance(grid, Int):
        kernels.decode_int(held, s, z, out.numpy())
    else:
        values = _arrays(table)[0] if table is not None else grid_table(_fixed(grid)).values[None]
        kernels.decode_table(held, s, z, values, out.numpy())
    return out


def round_rows(
    rows: Tensor,
    scale: Tensor,
    zero: Tensor,
    grid: Grid | Fitted,
    rounding: Rounding = nearest,
    table: Tensor | None = None,
) -> Tensor:
    """`decode_rows(encode_rows(…))` in one pass where there is a kernel for it. NaN stays NaN."""
    if rounding is nearest and rows.device.type == "cpu" and table is None:
        out = fresh(rows.shape)
        x, s, z = _arrays(rows, scale, zero)
        if isinstance(grid, Int):
            kernels.round_int(x, s, z, np.float32(grid.minimum), np.float32(grid.maximum), out.numpy())
            return out
        if isinstance(grid, Float) and not z.any():
            encode = kernels.round_float if _fits_float32(grid) else kernels.round_wide_float
            encode(x, s, *_float_constants(grid), out.numpy())
            return out
    codes = encode_rows(torch.nan_to_num(rows, nan=0.0, posinf=None, neginf=None), scale, zero, grid, rounding, table)
    return torch.where(rows.isnan(), rows, decode_rows(codes, scale, zero, grid, table))


def row_extremes(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Least and greatest value of each row, (n_blocks, 1) float32; not finite where a value is not."""
    if rows.device.type != "cpu" or rows.dtype != torch.float32:
        lo, hi = torch.aminmax(rows, dim=1, keepdim=True)
        return lo.to(torch.float32), hi.to(torch.float32)
    lo, hi = fresh((len(rows), 1)), fresh((len(rows), 1))
    bits = _arrays(rows)[0].view(np.int32)
    kernels.row_extremes(bits, lo.numpy().view(np.int32), hi.numpy().view(np.int32))
    return lo, hi


def decode(codes: Tensor, grid: Grid | Fitted, table: Tensor | None = None) -> Tensor:
    """The grid's float32 values of codes of any shape. With a table of one row per block, codes are (n_blocks, n)."""
    if table is not None:
        return table.gather(1, codes.to(torch.int64))
    if isinstance(grid, Int):
        return codes.to(torch.float32)
    return torch.from_numpy(grid_table(_fixed(grid)).values).to(codes.device)[codes.to(torch.int64)]


def thresholds(values: Tensor, zero_position: int, rounding: Rounding) -> Tensor:
    """For each value but the lowest, the smallest float32 that rounds to it or beyond.

    values  sorted, (…, n_codes)
    return  (…, n_codes - 1)

    The rounding is asked about a gap's middle and its ends, so any monotone function of the fraction will do.
    """
    low, high = values[..., :-1].to(torch.float64), values[..., 1:].to(torch.float64)
    odd = ((torch.arange(low.shape[-1], device=values.device) - zero_position) % 2 != 0).expand(low.shape)
    negative = low < 0
    below, above = low.to(torch.float32), high.to(torch.float32)
    middle = (low + high) / 2
    # The smallest float32 at or above the middle, and the smallest above it.
    at = middle.to(torch.float32)
    beyond = torch.nextafter(at, torch.full_like(at, float("inf")))
    from_middle = torch.where(at.to(torch.float64) >= middle, at, beyond)
    past_middle = torch.where(at.to(torch.float64) > middle, at, beyond)
    result = above
    for fraction, limit in (
        (0.5 + 1e-6, past_middle),
        (0.5, from_middle),
        (1e-6, torch.nextafter(below, torch.full_like(below, float("inf")))),
    ):
        chosen = rounding(torch.full_like(at, fraction), odd, negative)
        result = torch.where(chosen, limit, result)
    # Between equal values (fitted tables) any threshold does; it must not fall below the one before it.
    return torch.where(high > low, result, above)


@lru_cache(maxsize=256)
def grid_thresholds(grid: Grid, rounding: Rounding) -> Rows:
    """`thresholds` of a grid's own table, computed once."""
    table = grid_table(grid)
    limits: Rows = thresholds(torch.from_numpy(table.values), table.zero_position, rounding).numpy()
    return limits


def _encode_in_torch(
    rows: Tensor, scale: Tensor, zero: Tensor, grid: Grid | Fitted, rounding: Rounding, table: Tensor | None
) -> Tensor:
    y = rows / torch.where(scale == 0, float("inf"), scale)
    if isinstance(grid, Int) and table is None:
        if rounding is nearest:
            rounded = torch.round(y)
        else:
            y = y.clamp(-(2.0**23), 2.0**23)
            lower = torch.floor(y)
            rounded = lower + rounding(y - lower, lower.remainder(2) != 0, lower < 0)
        return (rounded + zero).clamp_(grid.minimum, grid.maximum)
    if table is None:
        limits = torch.from_numpy(grid_thresholds(_fixed(grid), rounding)).to(rows.device)
    else:
        limits = thresholds(table, 0, rounding).contiguous()
    return torch.searchsorted(limits, (y + zero).contiguous(), right=True)


def _encode_by_fraction(
    rows: Tensor, scale: Tensor, zero: Tensor, grid: Grid | Fitted, rounding: Rounding, table: Tensor | None
) -> Tensor:
    """For roundings that are no thresholds: stochastic, learned."""
    y = rows / torch.where(scale == 0, float("inf"), scale)
    if isinstance(grid, Int) and table is None:
        lower = torch.floor(y.clamp(-(2.0**23), 2.0**23))
        rounded = lower + rounding(y - lower, lower.remainder(2) != 0, lower < 0)
        return (rounded + zero).clamp_(grid.minimum, grid.maximum)
    known = grid_table(_fixed(grid)) if table is None else None
    values = torch.from_numpy(known.values).to(rows.device).expand(len(rows), -1) if known else table
    assert values is not None
    last = values.shape[1] - 1
    if last == 0:
        return torch.zeros_like(y)
    y = torch.minimum(torch.maximum(y + zero, values[:, :1]), values[:, -1:])
    lower_code = torch.searchsorted(values.contiguous(), y.contiguous(), right=True).sub_(1).clamp_(0, last - 1)
    low, high = values.gather(1, lower_code), values.gather(1, lower_code + 1)
    fraction = (y - low) / torch.where(high > low, high - low, 1.0)
    return lower_code + rounding(fraction, (lower_code - (known.zero_position if known else 0)) % 2 != 0, low < 0)


def _fixed(grid: Grid | Fitted) -> Grid:
    if isinstance(grid, Fitted):
        raise InputError(f"{grid!r} is fitted to data and has no values of its own: give the table that was found.")
    return grid


def _fits_float32(grid: Float) -> bool:
    """Whether the smallest step of the grid is a normal float32."""
    return 128 - grid.bias - grid.mantissa_bits >= 1


def _float_constants(grid: Float) -> tuple[int, int, float]:
    return grid.mantissa_bits, 1 - grid.bias, grid_table(grid).maximum


def _arrays(*tensors: Tensor) -> tuple[Rows, ...]:
    return tuple(t.detach().to(torch.float32).contiguous().numpy() for t in tensors)


def fresh(shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> Tensor:
    """Memory for results, from numpy: it asks for huge pages, torch does not. Handing out small ones takes 0.3 ns a
    byte, more than the work itself.
    """
    return torch.from_numpy(np.empty(tuple(shape), torch.empty(0, dtype=dtype).numpy().dtype))


def code_dtype(grid: Grid | Fitted) -> torch.dtype:
    """The smallest integer type that holds the grid's codes."""
    first = grid.minimum if isinstance(grid, Int) else 0
    last = grid.maximum if isinstance(grid, Int) else (1 << grid.bits) - 1
    for dtype in (torch.uint8, torch.int8, torch.int16):
        info = torch.iinfo(dtype)
        if info.min <= first and last <= info.max:
            return dtype
    return torch.int32
