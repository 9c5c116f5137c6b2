"""Auto: the best of several ranges. No estimator is the best everywhere; one histogram answers all of them."""

from dataclasses import dataclass

import torch

from lowbit.errors import check_name
from lowbit.numerics.formats import Format
from lowbit.numerics.grids import is_fitted
from lowbit.numerics.noise import SquaredError
from lowbit.numerics.quantize import scale_and_zero
from lowbit.ranges.extremes import Bounds, MinMax, MovingAverage, Percentile, Range
from lowbit.ranges.search import MSE, Entropy
from lowbit.ranges.statistics import Statistics, unsorted_points

LOSSES = ("squares", "cross_entropy")


@dataclass(frozen=True)
class Auto:
    """The candidate with the least error.

    `bounds` judges by the squared error of the tensor: of each block, or of all together where their scales share a
    second scale. A flow that has the network judges by the error at the outputs instead (`repair.ranges`) and replaces
    Auto by the winner.

    loss   of the outputs: "squares", relative to their power; "cross_entropy" of the float network's answers
    """

    loss: str = "squares"
    candidates: tuple[Range, ...] = (MinMax(), MovingAverage(), Percentile(99.99), Percentile(99.999), Entropy(), MSE())

    def __post_init__(self) -> None:
        check_name("loss", self.loss, LOSSES)

    def bounds(self, statistics: Statistics, format: Format) -> Bounds:
        if is_fitted(format.grid):
            return MinMax().bounds(statistics, format)  # the fit itself has the least squared error
        best: Bounds | None = None
        least = torch.empty(0)
        noise = SquaredError(*unsorted_points(statistics), format.grid)
        for candidate in self.candidates:
            lo, hi = candidate.bounds(statistics, format)
            error = noise(*scale_and_zero(lo, hi, format, statistics.tiles))
            if format.shares_scale:
                error = error.sum().expand(error.shape)
            if best is None:
                best, least = (lo, hi), error
            better = error < least
            best = torch.where(better, lo, best[0]), torch.where(better, hi, best[1])
            least = torch.where(better, error, least)
        assert best is not None
        return best
