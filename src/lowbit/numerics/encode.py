"""Codes from numbers and numbers from codes, row-wise: the two functions under every quantizer.

`Int` goes by its closed form; every other grid by its table.
"""

import torch
from torch import Tensor

from lowbit.numerics.grids import Grid, Int, grid_table
from lowbit.numerics.roundings import Rounding, nearest


def locate(values: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Position of the value below y in a sorted table, and how far y lies towards the next, 0 … 1.

    values  (n_codes,) or (n_blocks, n_codes)
    y       (n_blocks, n); outside the table it is clipped to its ends
    """
    last = values.shape[-1] - 1
    if last == 0:
        return torch.zeros(y.shape, dtype=torch.int64, device=y.device), torch.zeros_like(y)
    y = torch.clamp(y, values[..., :1], values[..., -1:])
    lower = torch.searchsorted(values, y.contiguous(), right=True).sub_(1).clamp_(0, last - 1)
    low, high = take(values, lower), take(values, lower + 1)
    return lower, (y - low) / (high - low)


def take(values: Tensor, index: Tensor) -> Tensor:
    """values[index], with one table for all rows or one for each."""
    return values[index] if values.dim() == 1 else values.gather(1, index)


def round_to_grid(y: Tensor, grid: Grid, rounding: Rounding = nearest, table: Tensor | None = None) -> Tensor:
    """Codes of y, in units of the grid: int64, NaN becomes some valid code.

    table  sorted values to use instead of the grid's own: (n_blocks, n_codes)
    """
    if isinstance(grid, Int) and table is None:
        return round_to_int(y, rounding).clamp_(grid.minimum, grid.maximum).to(torch.int64)
    known = grid_table(grid) if table is None else None
    values = torch.from_numpy(known.values).to(y.device) if known is not None else table
    assert values is not None
    zero = known.zero_position if known is not None else 0
    lower, fraction = locate(values, torch.nan_to_num(y, nan=0.0))
    up = rounding(fraction, (lower - zero) % 2 != 0, take(values, lower) < 0)
    return lower + up


def round_to_int(y: Tensor, rounding: Rounding) -> Tensor:
    """y rounded to integers, as floating point."""
    if rounding is nearest:
        return torch.round(torch.nan_to_num(y, nan=0.0, posinf=None, neginf=None))
    y = torch.nan_to_num(y, nan=0.0).clamp(-(2.0**23), 2.0**23)
    lower = torch.floor(y)
    return lower + rounding(y - lower, lower.remainder(2) != 0, lower < 0)


def decode(codes: Tensor, grid: Grid, table: Tensor | None = None) -> Tensor:
    """The float32 values of codes. With a table of one row per block, codes are (n_blocks, n)."""
    if table is not None:
        return take(table, codes.to(torch.int64))
    if isinstance(grid, Int):
        return codes.to(torch.float32)
    return torch.from_numpy(grid_table(grid).values).to(codes.device)[codes.to(torch.int64)]


def code_dtype(grid: Grid) -> torch.dtype:
    """The smallest integer type that holds the grid's codes."""
    first = grid.minimum if isinstance(grid, Int) else 0
    last = grid.maximum if isinstance(grid, Int) else (1 << grid.bits) - 1
    for dtype in (torch.uint8, torch.int8, torch.int16):
        info = torch.iinfo(dtype)
        if info.min <= first and last <= info.max:
            return dtype
    return torch.int32
