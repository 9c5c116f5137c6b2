"""Ranges found by search: least squared error by trying bounds, by Newton–Raphson (OCTAV), least divergence (KL)."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lowbit.machine_code import kernel
from lowbit.numerics.formats import Format
from lowbit.numerics.grids import Int, grid_table, is_fitted
from lowbit.numerics.noise import SquaredError
from lowbit.numerics.quantize import raw_scale, scale_and_zero
from lowbit.numerics.rows import from_rows, tiles_to_rows
from lowbit.ranges.analytic import is_one_sided
from lowbit.ranges.extremes import Bounds, clip_to
from lowbit.ranges.statistics import Statistics, unsorted_points

_COARSE = [0.8**i for i in range(36)]  # down to 0.04 % of the extremes
_FINE = [0.86, 0.89, 0.92, 0.95, 0.975, 1.025, 1.05, 1.08, 1.12, 1.16]
_FINER = [0.985, 0.9925, 1.0075, 1.015]
# 4 bits, normal data: 576 values in a block 17.5 dB, 64 of them 2.4 dB, where the extremes give 17.3 and 19.1.
VALUES_A_CODE = 64


@dataclass(frozen=True)
class MSE:
    """The bounds with the least squared rounding-and-clipping error, found by search over both.

    Symmetric formats: one bound, coarse to fine. Affine formats with two-sided data: lo and hi, one at a time, from two
    starts (both shrunk together; hi first, then lo). Where scales share a second scale (MX9, NVFP4, VS-Quant), the
    tile with the largest of them keeps its extremes: the second scale then stays as it is, and every other tile can be
    searched for itself. Never worse than MinMax.
    """

    def bounds(self, statistics: Statistics, format: Format) -> Bounds:
        statistics.check()
        if is_fitted(format.grid):
            return statistics.minimum, statistics.maximum  # the fit itself has the least squared error
        noise = SquaredError(*unsorted_points(statistics), format.grid)
        search = _Search(statistics, format, noise)
        if not format.zero_point:
            search.walk(_COARSE, lo=True, hi=True)
            search.walk(_FINE, lo=True, hi=True)
            search.walk(_FINER, lo=True, hi=True)
            return clip_to(statistics, *search.best())
        search.walk(_COARSE, lo=False, hi=True)
        search.walk(_COARSE, lo=True, hi=False)
        other = _Search(statistics, format, noise)
        other.walk(_COARSE, lo=True, hi=True)
        search.take_better(other)
        for steps in (_FINE, _FINE, _FINER):
            search.walk(steps, lo=False, hi=True)
            search.walk(steps, lo=True, hi=False)
        return search.best()


class _Search:
    """The best share of each extreme so far, per block, and its error."""

    def __init__(self, statistics: Statistics, format: Format, noise: SquaredError) -> None:
        self.format, self.noise, self.tiles = format, noise, statistics.tiles
        self.minimum, self.maximum = statistics.minimum, statistics.maximum
        if not format.zero_point and grid_table(format.grid).minimum < 0:
            largest = torch.maximum(self.minimum.abs(), self.maximum.abs())
            self.minimum, self.maximum = -largest, largest
        self.scale_bounds: Bounds | None = None
        self.held = torch.zeros_like(self.minimum, dtype=torch.bool)
        if format.shares_scale:
            self.scale_bounds, self.held = self._second_scale()
        self.low, self.high = torch.ones_like(self.minimum), torch.ones_like(self.maximum)
        self.error = self._error(self.low, self.high)

    def _second_scale(self) -> tuple[Bounds, Tensor]:
        """Range of the scales that share a second scale, and which tile has the largest of them, (n_blocks, 1) bool."""
        assert self.format.scale is not None
        assert self.format.scale.block is not None
        scale = raw_scale(self.minimum, self.maximum, self.format)
        tile = self.format.scale.block.tile(self.tiles)
        rows = tiles_to_rows(scale.reshape(self.tiles), tile)
        largest = torch.zeros_like(rows, dtype=torch.bool).scatter_(1, rows.argmax(1, keepdim=True), True)
        bounds = rows.amin(1, keepdim=True), rows.amax(1, keepdim=True)
        return bounds, from_rows(largest, self.tiles, tile).reshape(-1, 1)

    def _error(self, low: Tensor, high: Tensor) -> Tensor:
        ends = self.minimum * low, self.maximum * high
        return self.noise(*scale_and_zero(*ends, self.format, self.tiles, self.scale_bounds))

    def walk(self, factors: list[float], *, lo: bool, hi: bool) -> None:
        """Try factors on the best shares so far; only shares of at most 1 count."""
        shares = torch.tensor(factors, device=self.low.device).reshape(-1, 1, 1)
        lows = (self.low * shares).clamp(max=1) if lo else self.low.expand(len(factors), -1, -1)
        highs = (self.high * shares).clamp(max=1) if hi else self.high.expand(len(factors), -1, -1)
        for low, high, error in zip(lows, highs, self._errors(lows, highs), strict=True):
            better = (error < self.error) & ~self.held
            self.low, self.high = torch.where(better, low, self.low), torch.where(better, high, self.high)
            self.error = torch.where(better, error, self.error)

    def _errors(self, lows: Tensor, highs: Tensor) -> Iterable[Tensor]:
        """Of each pair of shares; (n_factors, n_blocks, 1) each."""
        if lows.shape[1] > 1 or self.format.scale is not None or not isinstance(self.format.grid, Int):
            return map(self._error, lows, highs)
        # One block: the factors take its place. One by one they cost 0.1 ms each, and a tensor tries 150.
        return self._error(lows.reshape(-1, 1), highs.reshape(-1, 1)).reshape(lows.shape)

    def take_better(self, other: "_Search") -> None:
        better = other.error < self.error
        self.low, self.high = torch.where(better, other.low, self.low), torch.where(better, other.high, self.high)
        self.error = torch.where(better, other.error, self.error)

    def best(self) -> Bounds:
        return self.minimum * self.low, self.maximum * self.high


@dataclass(frozen=True)
class OCTAV:
    """The bound with the least squared error under uniform rounding noise, by Newton–Raphson.

    s ← Σ|x|·1[|x| > s] / (4^-b / d · #{|x| ≤ s} + #{|x| > s}), d = 3, or 12 where all codes serve one side of zero.
    Source: Sakr et al. 2022 (arXiv 2206.06501), eq. 6.
    """

    steps: int = 20

    def bounds(self, statistics: Statistics, format: Format) -> Bounds:
        statistics.check()
        values, weights = _points(statistics)
        size = values.abs()
        divisor = torch.where(is_one_sided(statistics, format), 12.0, 3.0)
        rounding = 4.0**-format.grid.bits / divisor
        nonzero = torch.where(size > 0, weights, 0.0)
        s = (size * nonzero).sum(1, keepdim=True) / nonzero.sum(1, keepdim=True).clamp(min=1)
        for _ in range(self.steps):
            above = torch.where(size > s, weights, 0.0)
            clipped = above.sum(1, keepdim=True)
            # Zeros round to themselves: they cost nothing, and would push the bound down for sparse data.
            s = (size * above).sum(1, keepdim=True) / (
                rounding * (nonzero.sum(1, keepdim=True) - clipped) + clipped
            ).clamp(min=1e-30)
        return around_zero(statistics, s.float(), format)


@dataclass(frozen=True)
class Entropy:
    """The bound whose quantized distribution diverges least (Kullback–Leibler) from the data's: TensorRT's procedure.

    |x| is counted in 2048 bins; for each bound, what lies beyond joins the last bin, and the bins are merged to as many
    as there are codes on one side of zero, then spread evenly over the bins that were not empty.
    The divergence depends on how many values lie in a bin, not on how large they are: rare large values are clipped.
    A block with fewer values than bins, or fewer than 64 a code, keeps its extremes: its histogram is mostly noise.
    Source: Migacz 2017, 8-bit inference with TensorRT.
    """

    bins: int = 2048

    def bounds(self, statistics: Statistics, format: Format) -> Bounds:
        statistics.check()
        values, weights = _points(statistics)
        one_sided = is_one_sided(statistics, format)
        largest = torch.maximum(statistics.minimum.abs(), statistics.maximum.abs())
        threshold = largest.clone()
        for row in range(weights.shape[0]):
            levels = 1 << (format.grid.bits - (not bool(one_sided[row])))
            size = values[row if values.shape[0] > 1 else 0].abs().double().cpu().numpy()
            share = weights[row].double().cpu().numpy()
            top, bins = float(largest[row]), max(self.bins, 8 * levels)
            # No more distinct values than codes, and the divergence has nothing to weigh.
            if np.count_nonzero(share) <= levels or share[size > 0].sum() < max(bins, VALUES_A_CODE * levels):
                continue
            counts = np.zeros(bins)
            _spread(size, share, statistics.resolution, top, counts)
            threshold[row] = top * _least_divergence(counts, levels, max(1, (bins - levels) // 1920)) / bins
        return around_zero(statistics, threshold, format)


def around_zero(statistics: Statistics, bound: Tensor, format: Format) -> Bounds:
    """[-bound, bound] within the data's extremes.

    The zero point of an affine format would lie halfway between two codes, and the last bit of the bound would decide.
    So the range moves by half a step: down, as the range of signed integers does, or up where that has less error.
    """
    lo, hi = clip_to(statistics, -bound, bound)
    if not format.zero_point or is_fitted(format.grid):
        return lo, hi
    table = grid_table(format.grid)
    half = bound / (table.maximum - table.minimum)
    up, down = (clip_to(statistics, way * half - bound, way * half + bound) for way in (1, -1))
    noise = SquaredError(*unsorted_points(statistics), format.grid)
    # By more than the errors of raw data and of its histogram differ, so that symmetric data do not waver.
    less = noise(*scale_and_zero(*up, format)) < 0.995 * noise(*scale_and_zero(*down, format))
    two_sided = (lo == -bound) & (hi == bound)
    moved = torch.where(less, up[0], down[0]), torch.where(less, up[1], down[1])
    return torch.where(two_sided, moved[0], lo), torch.where(two_sided, moved[1], hi)


@kernel
def _spread(size: Any, weights: Any, resolution: Any, top: Any, counts: Any) -> None:
    """Count points into equal bins up to `top`. A bucket wider than a bin is spread as its values would have been:
    evenly, each value whole, because the divergence sees which bins are empty.
    """
    bins = counts.shape[0]
    for i in range(size.shape[0]):
        width = resolution * 2.0 ** np.floor(np.log2(size[i])) if size[i] > 0 else 0.0
        first = (size[i] - width / 2) * bins / top
        pieces = int(min(weights[i], np.ceil(width * bins / top) * 4.0 + 1.0))
        for piece in range(pieces):
            place = first + (piece + 0.5) / pieces * width * bins / top
            counts[min(max(int(place), 0), bins - 1)] += weights[i] / pieces


@kernel
def _least_divergence(counts: Any, levels: int, step: int) -> float:
    """Number of bins to keep, at least `levels`, out of all.

    With p the counts (the tail added to the last bin kept) and q their mean over the bins of a level that hold any,
    Σ p log p / q needs only running sums of counts, of bins that hold any, and of count · log count.
    """
    bins = counts.shape[0]
    counts[0] = counts[1]  # a peak of zeros would otherwise be all that the divergence sees
    mass, used, logs = np.zeros(bins + 1), np.zeros(bins + 1), np.zeros(bins + 1)
    for i in range(bins):
        c = counts[i]
        mass[i + 1], used[i + 1] = mass[i] + c, used[i] + (c > 0)
        logs[i + 1] = logs[i] + (c * np.log(c) if c > 0 else 0.0)
    total = mass[bins]
    best, best_bins = np.inf, bins
    for kept in range(levels, bins + 1, step):
        if mass[kept] <= 0:
            continue
        tail, last = total - mass[kept], counts[kept - 1]
        divergence, q = logs[kept], 1e-4
        for level in range(levels):
            start, end = level * kept // levels, (level + 1) * kept // levels
            held = mass[end] - mass[start]
            if held > 0:
                mean = held / (used[end] - used[start])
                divergence -= held * np.log(mean)
                if level == levels - 1 and last > 0:
                    q = mean
        if tail > 0:
            divergence += (last + tail) * np.log(last + tail) - tail * np.log(q)
            divergence -= last * np.log(last) if last > 0 else 0.0
        divergence = divergence / total + np.log(mass[kept] / total)
        if divergence < best:
            best, best_bins = divergence, kept
    return float(best_bins)


def _points(statistics: Statistics) -> tuple[Tensor, Tensor]:
    values, weights = unsorted_points(statistics)
    return values.float(), torch.ones_like(values) if weights is None else weights.float()
