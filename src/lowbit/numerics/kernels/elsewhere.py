"""The kernels as torch expressions, which run on any device; `Kernels` says what each computes."""

import numpy as np
import torch
from torch import Tensor

from lowbit.numerics.buckets import INFINITY_BITS, MASK_BITS, SHIFT, ZERO_BITS, Buckets, window
from lowbit.numerics.grids import Fitted, Grid, Int, code_dtype, grid_table
from lowbit.numerics.roundings import Rounding, grid_thresholds, nearest


def encode(
    rows: Tensor, scale: Tensor, zero: Tensor, grid: Grid | Fitted, rounding: Rounding, table: Tensor | None
) -> Tensor:
    y = rows / torch.where(scale == 0, torch.inf, scale)
    if isinstance(grid, Int):
        return (torch.round(y) + zero).clamp_(grid.minimum, grid.maximum).to(code_dtype(grid))
    limits = grid_thresholds(grid, rounding, table).to(rows.device)
    limits = limits[0] if table is None else limits.contiguous()
    return torch.searchsorted(limits, (y + zero).contiguous(), right=True).to(code_dtype(grid))


def decode(codes: Tensor, scale: Tensor, zero: Tensor, grid: Grid | Fitted, table: Tensor | None) -> Tensor:
    if isinstance(grid, Int):
        values = codes.to(torch.float32)
    elif table is not None:
        values = table.gather(1, codes.to(torch.int64))
    else:
        values = torch.from_numpy(grid_table(grid).values).to(codes.device)[codes.to(torch.int64)]
    return (values - zero) * scale


def fake_quantize(rows: Tensor, scale: Tensor, zero: Tensor, grid: Grid) -> Tensor:
    rounded = decode(encode(rows, scale, zero, grid, nearest, None), scale, zero, grid, None)
    return torch.where(rows.isnan(), rows, rounded)


def extremes(rows: Tensor) -> tuple[Tensor, Tensor]:
    lo, hi = torch.aminmax(rows, dim=1, keepdim=True)
    return lo, hi


def symmetric_scale(
    lo: Tensor, hi: Tensor, reach: float, signed: bool, empty: float, least: float, most: float
) -> Tensor:
    raw = (torch.maximum(lo.abs(), hi.abs()) if signed else hi.clamp(min=0)) / reach
    return torch.where(raw > 0, raw.clamp(least, most), empty)


def error_along(rows: Tensor, along: Tensor, scales: Tensor, zeros: Tensor, grid: Int) -> Tensor:
    rounded = (fake_quantize(rows, s, z, grid) for s, z in zip(scales, zeros, strict=True))
    return torch.stack([torch.linalg.vecdot(along, y - rows).double() for y in rounded], dim=1)


def count(rows: Tensor) -> Buckets:
    bits = rows.view(torch.int32)
    magnitude = bits & 0x7FFFFFFF
    kept, zero = magnitude < MASK_BITS, magnitude < ZERO_BITS
    ordered = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    biggest, least = 0x7FFFFFFF, -0x80000000
    columns = [
        ordered.masked_fill(~kept, biggest).amin(1),
        ordered.masked_fill(~kept, least).amax(1),
        magnitude.masked_fill(zero, biggest).amin(1),
        magnitude.masked_fill(~kept, 0).amax(1),
        zero.sum(1),
        (~kept).sum(1),
        (magnitude >= INFINITY_BITS).sum(1),
        (magnitude > INFINITY_BITS).sum(1),
    ]
    found = torch.stack([column.to(torch.int64) for column in columns], dim=1).cpu().numpy()
    base, width = window(found)
    blocks = rows.shape[0]
    if not width:
        return Buckets.of(found, base, np.zeros((blocks, 2, 0), np.int64), rows.numel())
    row = torch.arange(blocks, device=rows.device)[:, None] * 2 + (bits >= 0)
    index = row * width + (magnitude >> SHIFT) - base
    counts = torch.bincount(index[kept & ~zero], minlength=blocks * 2 * width)
    return Buckets.of(found, base, counts.reshape(blocks, 2, width).cpu().numpy(), rows.numel())


def round_to_step(
    x: Tensor, scale: Tensor, low: Tensor, high: Tensor, past_low: bool, marks: torch.dtype
) -> tuple[Tensor, Tensor]:
    steps, most = x.float() / scale, torch.iinfo(marks).max - 1
    nearest = steps.round()
    inside = ((nearest - steps) * (2 * most)).round()
    below = steps <= low if past_low else steps < low
    mark = torch.where(below, -most - 1, torch.where(steps > high, most + 1, inside))
    return (nearest.clamp(low, high) * scale).to(x.dtype), mark.to(marks)


def step_gradient(marks: Tensor, along: Tensor) -> tuple[Tensor, Tensor]:
    most = torch.iinfo(marks.dtype).max - 1
    below, above, g = marks < -most, marks > most, along.float()
    inside = torch.where(below | above, 0, g * marks).sum() / (2 * most)
    return torch.where(below | above, 0, along), torch.stack([inside, (g * below).sum(), (g * above).sum()])
