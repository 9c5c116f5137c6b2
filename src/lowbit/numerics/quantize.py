"""Quantizing: range → scale and zero → codes. Everything row-wise, for every format, on torch and numpy alike."""

from dataclasses import dataclass, replace
from functools import lru_cache
from math import isinf, isnan
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lowbit.errors import DataError, InputError, ShapeError
from lowbit.numerics.encode import decode, encode_rows
from lowbit.numerics.fitted import fit_table
from lowbit.numerics.formats import Format
from lowbit.numerics.grids import grid_table, is_fitted
from lowbit.numerics.kernels import kernels
from lowbit.numerics.noise import decibels
from lowbit.numerics.qtensor import Array, QuantTensor, as_torch
from lowbit.numerics.roundings import Rounding, parse_rounding
from lowbit.numerics.rows import TENSOR, from_rows, tile_counts, tiles_to_rows
from lowbit.numerics.words import describe_format, parse_format

Bounds = tuple[Tensor, Tensor]
# The smallest normal float32: engines may flush a smaller scale to 0, and 1 / scale stays finite.
SMALLEST_SCALE = 2.0**-126
LARGEST_FLOAT = float(np.finfo(np.float32).max)


def scale_and_zero(
    lo: Tensor,
    hi: Tensor,
    format: Format,
    tiles: tuple[int, ...] | None = None,
    scale_bounds: Bounds | None = None,
) -> tuple[Tensor, Tensor]:
    """The scale and zero that put [lo, hi] on the grid.

    lo, hi  (n_blocks, 1)  the range; where there is a zero point it is widened to hold 0
    tiles   shape of the grid of tiles, for scales that share a second scale; default (n_blocks,)
    scale_bounds  range of the scales that share a second scale; default: their least and greatest
    return  (n_blocks, 1) float32 each: the effective scale, and the zero in units of the grid's values

    Symmetric: scale = max(|lo|, |hi|) / reach, or hi / reach on a grid without negative values. Affine: scale =
    (hi - lo) / (reach - minimum), zero = the grid value nearest to minimum - lo / scale, so 0 is exact.
    A range of no width gets scale 1, or 0 where scales share a second scale: such a tile is exact zeros. No scale is so
    large that a code would be infinite.
    """
    scale, zero, _ = _scale_zero_stored(lo, hi, format, tiles or (lo.shape[0],), scale_bounds)
    return scale, zero.expand(lo.shape).clone()


def _scale_zero_stored(
    lo: Tensor, hi: Tensor, format: Format, tiles: tuple[int, ...], scale_bounds: Bounds | None = None
) -> tuple[Tensor, Tensor, QuantTensor | None]:
    """`scale_and_zero`, with one zero for all where there is no zero point, and the scales as stored if quantized."""
    lo, hi = lo.to(torch.float32), hi.to(torch.float32)
    none = lo.new_zeros(1, 1)
    if format.block is None or is_fitted(format.grid):
        return torch.ones_like(lo), none, None
    if format.zero_point:
        table = grid_table(format.grid)
        lo, hi = lo.clamp(max=0), hi.clamp(min=0)
        widest = largest_scale(format) * ((format.reach or table.maximum) - table.minimum)
        fits = (widest / 2 / (hi / 2 - lo / 2)).clamp(max=1)  # halves: hi - lo of a float32 tensor can overflow
        lo, hi = lo * fits, hi * fits
    scale, stored = raw_scale(lo, hi, format), None
    if format.scale is not None:
        stored = _quantize_torch(scale.reshape(tiles), format.scale, scale_bounds, None)
        scale = as_torch(stored.dequantize()).reshape(-1, 1)
        stored = None if format.has_fixed_scale else stored  # a fixed scale is stored as the number that it is
    if not format.zero_point:
        return scale, none, stored
    zero_codes = encode_rows(grid_table(format.grid).minimum - lo / scale, torch.ones_like(none), none, format.grid)
    return scale, decode(zero_codes, format.grid), stored


@lru_cache(maxsize=256)
def largest_scale(format: Format) -> float:
    """The largest scale under which no code of a format is infinite; a stored scale has to be able to hold it."""
    table = grid_table(format.grid)
    span = table.maximum - table.minimum if format.zero_point else max(-table.minimum, table.maximum)
    # A little less: a scale that is rounded to float32 afterwards must not pass it.
    limit = min(1.0, (1 - 2.0**-20) / span) * LARGEST_FLOAT
    if format.scale is None or format.scale.block is not None or is_fitted(format.scale.grid):
        return limit
    values = format.scale.grid.values()
    if values.min() > limit:
        raise InputError(
            f"format '{describe_format(format)}': its scale is at least {values.min():g}, and the largest code times "
            f"that is infinite in float32. Use a scale of at most {limit:.3g}."
        )
    return float(values[values <= limit].max())


def raw_scale(lo: Tensor, hi: Tensor, format: Format) -> Tensor:
    """The scale before it is stored, (n_blocks, 1): never 0 or denormal, unless it shares a second scale."""
    table = grid_table(format.grid)
    reach, signed = table.maximum if format.reach is None else format.reach, table.minimum < 0
    empty = 0.0 if format.shares_scale else 1.0 if table.has_zero else SMALLEST_SCALE
    least, most = 0.0 if format.shares_scale else SMALLEST_SCALE, largest_scale(format)
    if not format.zero_point:
        return kernels(lo).symmetric_scale(lo, hi, reach, signed, empty, least, most)
    # Divided before subtracting: hi - lo of a float32 tensor can overflow.
    raw = hi / (reach - table.minimum) - lo / (reach - table.minimum)
    return torch.where(raw > 0, raw.clamp(least, most), empty)


def quantize(
    x: Array,
    format: "Format | str",
    bounds: "tuple[Array | float, Array | float] | None" = None,
    rounding: "Rounding | str | None" = None,
) -> QuantTensor:
    """x as codes of a format, its bounds given or its extremes; `ranges.quantize_tensor` also finds better bounds."""
    x = floating(x)
    values, kind = as_torch(x), parse_format(format)
    if not values.is_floating_point():
        raise InputError(f"cannot quantize {values.dtype} numbers: convert them to a floating type first.")
    choose = parse_rounding(rounding) if isinstance(rounding, str) else rounding
    if bounds is not None:
        lo, hi = (torch.as_tensor(bound, dtype=torch.float32, device=values.device) for bound in bounds)
    stored = _quantize_torch(values, kind, None if bounds is None else (lo, hi), choose)
    return stored if isinstance(x, Tensor) else _to_numpy(stored, x.dtype)


def floating(x: Any) -> Array:
    """A tensor as it is, or an array of numbers, from lists too; what as_torch would have to guess at is refused."""
    if isinstance(x, Tensor):
        return x
    array = np.asarray(x)
    if array.dtype.kind in "OSUMmc":
        raise InputError(f"cannot quantize {array.dtype} values: convert them to a floating type first.")
    return array


def _quantize_torch(x: Tensor, format: Format, bounds: Bounds | None, rounding: Rounding | None) -> QuantTensor:
    shape = tuple(x.shape)
    tile = (format.block or TENSOR).tile(shape)
    tiles = tile_counts(shape, tile)
    rows = tiles_to_rows(x, tile).to(torch.float32)
    lo, hi = _row_bounds(rows, x, bounds, format)
    choose = rounding or parse_rounding(format.rounding)
    if is_fitted(format.grid):
        table = fit_table(format.grid, rows if bounds is None else torch.minimum(torch.maximum(rows, lo), hi))
        one = rows.new_ones(1, 1)
        codes = encode_rows(rows, one, one * 0, format.grid, choose, table)
        return QuantTensor(from_rows(codes, shape, tile), format, tile, None, table=table, dtype=x.dtype)
    scale, zero, stored = _scale_zero_stored(lo, hi, format, tiles)
    codes = encode_rows(rows, scale, zero, format.grid, choose)
    zero_codes = (
        encode_rows(zero, torch.ones_like(zero), torch.zeros_like(zero), format.grid) if format.zero_point else None
    )
    return QuantTensor(
        codes=from_rows(codes, shape, tile),
        format=format,
        tile=tile,
        scale=None if format.block is None else scale.reshape(tiles) if stored is None else stored,
        zero=None if zero_codes is None else zero_codes.reshape(tiles),
        dtype=x.dtype,
    )


def _row_bounds(rows: Tensor, x: Tensor, bounds: Bounds | None, format: Format) -> Bounds:
    blocks = rows.shape[0]
    if rows.numel() == 0:
        return rows.new_zeros(blocks, 1), rows.new_zeros(blocks, 1)
    lo, hi = kernels(rows).extremes(rows)
    least, greatest = float(lo.min()), float(hi.max())
    if isnan(least) or isnan(greatest) or (bounds is None and (isinf(least) or isinf(greatest))):
        raise DataError(f"cannot quantize: {describe_not_finite(x.to(torch.float32))}")
    if bounds is None:
        return lo, hi
    lo, hi = (bound.expand(blocks, 1) if bound.numel() == 1 else bound.reshape(-1, 1) for bound in bounds)
    if lo.shape[0] != blocks or hi.shape[0] != blocks:
        raise ShapeError(
            f"bounds have {lo.shape[0]} and {hi.shape[0]} entries, but {format!r} "
            f"divides a tensor of shape {tuple(x.shape)} into {blocks} blocks. Give one per block, or one number."
        )
    if not (torch.isfinite(lo).all() and torch.isfinite(hi).all() and (lo <= hi).all()):
        raise InputError("bounds must be finite, each lower bound at most its upper bound.")
    return lo, hi


def describe_not_finite(x: Tensor) -> str:
    """In words: how many entries are NaN or infinite, and where the first is."""
    bad = ~torch.isfinite(x)
    nan, first = int(torch.isnan(x).sum()), tuple(torch.nonzero(bad)[0].tolist()) if x.dim() else ()
    infinite = int(bad.sum()) - nan
    found = " and ".join(f"{count} {word}" for count, word in ((nan, "NaN"), (infinite, "infinite value(s)")) if count)
    remedy = "Mend the data." if nan else "Mend the data, or give finite bounds."
    return f"{found} among {x.numel()} values, the first at index {first}. {remedy}"


@dataclass(frozen=True)
class Error:
    """What quantizing did to a tensor.

    sqnr_db  10 log10(Σ x² / Σ (x - x̂)²); infinite where nothing changed
    mse      mean of (x - x̂)²
    cosine   of the angle between x and x̂; 1 where both are zero
    clipped  share of elements beyond the largest or smallest value that their tile can hold
    bits     per element, scales included
    """

    sqnr_db: float
    mse: float
    cosine: float
    clipped: float
    bits: float


def measure(x: Array, stored: QuantTensor) -> Error:
    """How far a stored tensor is from x."""
    exact = as_torch(x).to(torch.float64)
    if exact.numel() == 0:
        return Error(float("inf"), 0.0, 1.0, 0.0, 0.0)
    approx = as_torch(stored.dequantize()).to(torch.float64)
    noise, power = float(((exact - approx) ** 2).sum()), float((exact**2).sum())
    other = float((approx**2).sum())
    cosine = float((exact * approx).sum()) / (power * other) ** 0.5 if power and other else float(power == other)
    return Error(
        sqnr_db=decibels(noise, power),
        mse=noise / exact.numel(),
        cosine=cosine,
        clipped=_clipped_share(exact, stored),
        bits=stored.format.bits_per_element(stored.shape),
    )


def _clipped_share(exact: Tensor, stored: QuantTensor) -> float:
    rows = tiles_to_rows(exact, stored.tile)
    scale = as_torch(stored.scale_values()).reshape(-1, 1).to(torch.float64)
    zero = as_torch(stored.zero_values()).reshape(-1, 1).to(torch.float64)
    if stored.table is not None:
        values = as_torch(stored.table).to(torch.float64)
    else:
        values = torch.from_numpy(grid_table(stored.format.grid).values).to(exact.device, torch.float64)[None]
    # Within half a step beyond an end is rounding, not clipping.
    gaps = values.diff(dim=1) if values.shape[1] > 1 else torch.ones_like(values)
    last = (values[:, -1:] + gaps[:, -1:] / 2 - zero) * scale
    first = (values[:, :1] - gaps[:, :1] / 2 - zero) * scale
    outside = (rows > last) | (rows < first)
    return float(from_rows(outside, stored.shape, stored.tile).to(torch.float64).mean())


def _to_numpy(stored: QuantTensor, dtype: Any) -> QuantTensor:
    """The same tensor with numpy inside."""

    def array(x: Any) -> Any:
        if isinstance(x, QuantTensor):
            return _to_numpy(x, np.dtype(np.float32))
        return None if x is None else as_torch(x).numpy()

    inside = {name: array(getattr(stored, name)) for name in ("codes", "scale", "zero", "table")}
    return replace(stored, **inside, dtype=dtype)
