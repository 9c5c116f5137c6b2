"""Codes from numbers and numbers from codes, row-wise: the functions under every quantizer.

A deterministic rounding on a grid is a sorted list of thresholds: code k is what reaches k of them. `Int` and `Float`
have closed forms that give the same codes. `numerics.kernels` does the work on each device.
"""

import torch
from torch import Tensor

from lowbit.numerics.grids import Fitted, Grid, Int, code_dtype, grid_table
from lowbit.numerics.kernels import kernels
from lowbit.numerics.roundings import ROUNDINGS, Rounding, nearest, parse_rounding


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
    table        the sorted values of a fitted grid, (n_blocks, n_codes)
    """
    # Comparing functions with `is` and `in`: stochastic and learned roundings have no thresholds.
    if rounding is nearest or (rounding in ROUNDINGS.values() and not isinstance(grid, Int)):
        return kernels(rows).encode(rows, scale, zero, grid, rounding, table)
    return _encode_by_fraction(rows, scale, zero, grid, rounding, table).to(code_dtype(grid))


def decode_rows(codes: Tensor, scale: Tensor, zero: Tensor, grid: Grid | Fitted, table: Tensor | None = None) -> Tensor:
    """(value - zero) * scale of codes (n_blocks, n), float32."""
    return kernels(codes).decode(codes, scale, zero, grid, table)


def decode(codes: Tensor, grid: Grid | Fitted) -> Tensor:
    """The grid's float32 values of codes of any shape."""
    one = torch.ones(1, 1, device=codes.device)
    return decode_rows(codes.reshape(1, -1), one, one * 0, grid).reshape(codes.shape)


def fake_quantize_rows(
    rows: Tensor, scale: Tensor, zero: Tensor, grid: Grid, rounding: Rounding | str = nearest
) -> Tensor:
    """Rows (n_blocks, n) quantized and decoded again: float32, no gradient, NaN stays NaN. scale, zero (n_blocks, 1)"""
    choose = parse_rounding(rounding) if isinstance(rounding, str) else rounding
    rows = rows.detach().to(torch.float32)
    if choose is nearest:
        return kernels(rows).fake_quantize(rows, scale, zero, grid)
    return torch.where(rows.isnan(), rows, decode_rows(encode_rows(rows, scale, zero, grid, choose), scale, zero, grid))


def _encode_by_fraction(
    rows: Tensor, scale: Tensor, zero: Tensor, grid: Grid | Fitted, rounding: Rounding, table: Tensor | None
) -> Tensor:
    """Find the two neighbours and ask the rounding: for roundings that are no thresholds, and for `Int`."""
    y = rows / torch.where(scale == 0, torch.inf, scale)
    if isinstance(grid, Int):
        lower = torch.floor(y.clamp(-(2.0**23), 2.0**23))
        rounded = lower + rounding(y - lower, lower.remainder(2) != 0, lower < 0)
        return (rounded + zero).clamp_(grid.minimum, grid.maximum)
    known = grid_table(grid) if table is None else None
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
