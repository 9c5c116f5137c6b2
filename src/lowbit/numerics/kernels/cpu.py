"""The kernels on the CPU: which of the compiled loops serves which grid; `Kernels` says what each computes."""

from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from lowbit.numerics.grids import Fitted, Float, Grid, Int, Pow2, code_dtype, grid_table
from lowbit.numerics.kernels import loops
from lowbit.numerics.roundings import Rounding, grid_thresholds, nearest

FEW = 6  # bits: up to so many, comparing with every threshold beats finding the exponent


def encode(
    rows: Tensor, scale: Tensor, zero: Tensor, grid: Grid | Fitted, rounding: Rounding, table: Tensor | None
) -> Tensor:
    codes = fresh(rows.shape, code_dtype(grid))
    out, x, s, z = codes.numpy(), *_arrays(rows, scale, zero)
    if isinstance(grid, Int):
        loops.encode_int(x, s, z, *_ends(grid), out)
    elif isinstance(grid, Float) and rounding is nearest:
        encode_float = loops.encode_float if _fits_float32(grid) else loops.encode_wide_float
        encode_float(x, s, z, *_constants(grid), np.int32(grid_table(grid).zero_position), out)
    elif isinstance(grid, Pow2) and grid.bits > FEW and grid.lowest >= -127:
        loops.encode_pow2(x, s, z, np.int32(grid.lowest), grid_thresholds(grid, rounding)[0].numpy(), out)
    else:
        loops.encode_table(x, s, z, grid_thresholds(grid, rounding, table).numpy(), out)
    return codes


def decode(codes: Tensor, scale: Tensor, zero: Tensor, grid: Grid | Fitted, table: Tensor | None) -> Tensor:
    rows = fresh(codes.shape)
    held, (s, z) = codes.contiguous().numpy(), _arrays(scale, zero)
    if isinstance(grid, Int):
        loops.decode_int(held, s, z, rows.numpy())
    else:
        values = grid_table(grid).values[None] if table is None else _arrays(table)[0]
        loops.decode_table(held, s, z, values, rows.numpy())
    return rows


def fake_quantize(rows: Tensor, scale: Tensor, zero: Tensor, grid: Grid) -> Tensor:
    x, s, z = _arrays(rows, scale, zero)
    if isinstance(grid, Int):
        out = fresh(rows.shape)
        loops.round_int(x, s, z, *_ends(grid), out.numpy())
    elif isinstance(grid, Float) and not z.any():
        out = fresh(rows.shape)
        round_float = loops.round_float if _fits_float32(grid) else loops.round_wide_float
        round_float(x, s, *_constants(grid), out.numpy())
    else:
        rounded = decode(encode(rows, scale, zero, grid, nearest, None), scale, zero, grid, None)
        out = torch.where(rows.isnan(), rows, rounded)
    return out


def extremes(rows: Tensor) -> tuple[Tensor, Tensor]:
    lo, hi = fresh((len(rows), 1)), fresh((len(rows), 1))
    loops.row_extremes(*(t.numpy().view(np.int32) for t in (rows.contiguous(), lo, hi)))
    return lo, hi


def symmetric_scale(
    lo: Tensor, hi: Tensor, reach: float, signed: bool, empty: float, least: float, most: float
) -> Tensor:
    out = fresh(lo.shape)
    low, high, into = (t.reshape(-1).numpy() for t in (lo, hi, out))
    limits = np.float32(empty), np.float32(least), np.float32(most)
    loops.symmetric_scale(low, high, np.float32(reach), signed, *limits, into)
    return out


def error_along(rows: Tensor, along: Tensor, scales: Tensor, zeros: Tensor, grid: Int) -> Tensor:
    out = np.empty((len(rows), len(scales)))
    x, g, s, z = _arrays(rows, along, scales, zeros)
    loops.error_along(x, g, s, z, *_ends(grid), out)
    return torch.from_numpy(out)


def fresh(shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> Tensor:
    """Memory for results, from numpy: it asks for huge pages, torch does not. Handing out small ones takes 0.3 ns a
    byte, more than the work itself.
    """
    return torch.from_numpy(np.empty(tuple(shape), torch.empty(0, dtype=dtype).numpy().dtype))


def _arrays(*tensors: Tensor) -> tuple[npt.NDArray[np.float32], ...]:
    return tuple(t.detach().to(torch.float32).contiguous().numpy() for t in tensors)


def _ends(grid: Int) -> tuple[Any, Any]:
    return np.float32(grid.minimum), np.float32(grid.maximum)


def _fits_float32(grid: Float) -> bool:
    """Whether the smallest step of the grid is a normal float32."""
    return 128 - grid.bias - grid.mantissa_bits >= 1


def _constants(grid: Float) -> tuple[int, int, float]:
    return grid.mantissa_bits, 1 - grid.bias, grid_table(grid).maximum
