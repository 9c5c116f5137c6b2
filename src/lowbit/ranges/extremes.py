"""Ranges read off the data's distribution: extremes, their moving average, percentiles, mean ± k·σ."""

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from lowbit.errors import InputError
from lowbit.numerics.formats import Format
from lowbit.ranges.statistics import Statistics

Bounds = tuple[Tensor, Tensor]


@runtime_checkable
class Range(Protocol):
    """Where to clip: statistics → lo, hi, each (n_blocks, 1) float32, within the data's extremes."""

    def bounds(self, statistics: Statistics, format: Format) -> Bounds: ...


def clip_to(statistics: Statistics, lo: Tensor, hi: Tensor) -> Bounds:
    """Bounds no wider than the data."""
    low, high = statistics.minimum, statistics.maximum
    return torch.maximum(lo.to(low), low).clamp(max=high), torch.minimum(hi.to(high), high).clamp(min=low)


@dataclass(frozen=True)
class MinMax:
    """The smallest and the largest value: nothing is clipped."""

    def bounds(self, statistics: Statistics, format: Format) -> Bounds:
        statistics.check()
        return statistics.minimum, statistics.maximum


@dataclass(frozen=True)
class MovingAverage:
    """Moving average of the batches' minima and maxima: average ← momentum · average + (1 - momentum) · batch.

    Depends on the order of the batches; the average runs over the last 1024 of them.
    Source: Jacob et al. 2018 (arXiv 1712.05877), section 3.1.
    """

    momentum: float = 0.9

    def __post_init__(self) -> None:
        if not 0 <= self.momentum < 1:
            raise InputError(f"{self!r}: momentum must be at least 0 and below 1.")

    def bounds(self, statistics: Statistics, format: Format) -> Bounds:
        statistics.check()
        return statistics.averages(self.momentum)


@dataclass(frozen=True)
class Percentile:
    """Leaves out at most (100 - percent) % of the values on either side.

    hi is the smallest value that at least `percent` % of all values do not exceed; lo mirrors it.
    Source: McKinstry et al. 2018 (arXiv 1809.04191); Wu et al. 2020 (arXiv 2004.09602).
    """

    percent: float = 99.99

    def __post_init__(self) -> None:
        if not 50 < self.percent <= 100:
            raise InputError(f"{self!r}: percent must be over 50 and at most 100, as 99.99.")

    def bounds(self, statistics: Statistics, format: Format) -> Bounds:
        statistics.check()
        values, weights = statistics.points()
        if values.shape[1] == 0:
            return statistics.minimum, statistics.maximum
        below = weights.cumsum(1)
        total = below[:, -1:]
        # Rounded before ceil: 0.9999 * 10000 is 9999.000000000002 in binary.
        rank = torch.ceil(torch.round(total * self.percent * 1e6 / 100) / 1e6)
        upper = torch.searchsorted(below, rank).clamp(max=values.shape[1] - 1)
        lower = torch.searchsorted(below, total - rank, right=True).clamp(max=values.shape[1] - 1)
        table = values.expand(weights.shape[0], -1)
        return clip_to(statistics, table.gather(1, lower).float(), table.gather(1, upper).float())


@dataclass(frozen=True)
class MeanStd:
    """mean ± k·σ."""

    k: float = 3.0

    def __post_init__(self) -> None:
        if not self.k > 0:
            raise InputError(f"{self!r}: k must be positive.")

    def bounds(self, statistics: Statistics, format: Format) -> Bounds:
        statistics.check()
        values, weights = statistics.points()
        total = weights.sum(1, keepdim=True).clamp(min=1)
        mean = (values * weights).sum(1, keepdim=True) / total
        std = (((values - mean) ** 2 * weights).sum(1, keepdim=True) / total).sqrt()
        return clip_to(statistics, (mean - self.k * std).float(), (mean + self.k * std).float())
