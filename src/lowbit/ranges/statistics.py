"""Statistics: what a range needs to know about data, in fixed memory, after one pass.

`Histogram` folds batches of activations into counts; `RawRows` holds weights as they are. Both answer with weighted
points, so each range is written once.
"""

from collections import deque
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from lowbit.errors import DataError
from lowbit.numerics.buckets import SHIFT, Buckets
from lowbit.numerics.kernels import kernels
from lowbit.numerics.qtensor import Array, as_torch
from lowbit.numerics.quantize import describe_not_finite
from lowbit.numerics.rows import TENSOR, Block, tile_counts, tiles_to_rows, to_rows

HISTORY = 1024


class Statistics(Protocol):
    """What ranges read.

    tiles             shape of the grid of blocks: which scales share a second scale follows from it
    minimum, maximum  (n_blocks, 1) float32, exact
    points()          values (n_blocks or 1, n) sorted along the last axis, and weights (n_blocks, n), both float64
    resolution        width of what a point stands for, in parts of the power of two below it; 0: the value itself
    averages(m)       (n_blocks, 1) each: moving averages of the batches' minima and maxima, momentum m
    check()           raises DataError where a range would mean nothing: NaN, infinities, no data
    """

    @property
    def tiles(self) -> tuple[int, ...]: ...
    @property
    def minimum(self) -> Tensor: ...
    @property
    def maximum(self) -> Tensor: ...
    @property
    def resolution(self) -> float: ...
    def points(self) -> tuple[Tensor, Tensor]: ...
    def averages(self, momentum: float) -> tuple[Tensor, Tensor]: ...
    def check(self) -> None: ...


class RawRows:
    """Rows of a tensor as they are, every value with weight one."""

    resolution = 0.0

    def __init__(self, rows: Tensor, name: str = "", tiles: tuple[int, ...] | None = None) -> None:
        self.rows = rows.detach().to(torch.float32)
        self.name = name
        self.tiles = tiles or (len(rows),)
        if self.rows.numel():
            self._lo, self._hi = torch.aminmax(self.rows, dim=1, keepdim=True)
        else:
            self._lo = self._hi = self.rows.new_zeros(self.rows.shape[0], 1)
        self._sorted: tuple[Tensor, Tensor] | None = None

    @classmethod
    def of(cls, x: Array, block: Block = TENSOR, name: str = "") -> "RawRows":
        """The rows of a tensor cut into blocks."""
        values = as_torch(x)
        tile = block.tile(tuple(values.shape))
        return cls(tiles_to_rows(values, tile), name, tile_counts(tuple(values.shape), tile))

    @property
    def minimum(self) -> Tensor:
        return self._lo

    @property
    def maximum(self) -> Tensor:
        return self._hi

    def points(self) -> tuple[Tensor, Tensor]:
        """Sorted values and weights of one."""
        if self._sorted is None:
            values = self.rows.to(torch.float64).sort(dim=1).values
            self._sorted = values, torch.ones_like(values)
        return self._sorted

    def averages(self, momentum: float) -> tuple[Tensor, Tensor]:
        """One batch: its minimum and maximum."""
        return self._lo, self._hi

    def check(self) -> None:
        if not (torch.isfinite(self._lo) & torch.isfinite(self._hi)).all():
            of = f" of '{self.name}'" if self.name else ""
            raise DataError(f"no range{of} can be chosen: {describe_not_finite(self.rows)}")


class Histogram:
    """Counts of float32 numbers by their leading bits: sign, exponent and 9 bits of mantissa.

    Buckets are logarithmic, 0.2 % wide, and need no range known beforehand. Counts, minimum and maximum do not
    depend on the order of the data or on how it was split; `merge` adds. Memory does not grow with the data.
    Finite values of 1e8 and more are attention masks (-1e9, -3.4e38): counted in `seen.masked`, seen by no range.
    Beside it, for `MovingAverage`, the extremes of the last 1024 batches: an order by definition. `time` is noted with
    them, where batches are dealt to several processes.
    """

    resolution = 2.0 ** (SHIFT - 23)

    def __init__(self, block: Block = TENSOR, name: str = "") -> None:
        self.block = block
        self.name = name
        self.seen = Buckets.none(0)
        self.time = 0
        self.history: deque[tuple[int, Any, Any]] = deque(maxlen=HISTORY)

    def add(self, x: Array) -> None:
        """Count a batch: any shape, any floating dtype, on any device."""
        values = as_torch(x)
        if values.numel() == 0:
            return
        rows = to_rows(values, self.block).to(torch.float32).contiguous()
        seen = kernels(rows).count(rows)
        self._include(seen)
        if np.isfinite(seen.minimum).all():
            self.history.append((self.time, seen.minimum, seen.maximum))

    def merge(self, other: "Histogram") -> None:
        """Add what another histogram counted, over the same blocks; the other is left as it is."""
        if other.block != self.block:
            raise DataError(
                f"histograms{self._of} of different blocks, {self.block!r} and {other.block!r}, cannot be merged. "
                "Make both with the same block."
            )
        if other.count:
            self._include(other.seen)
            self.history.extend(other.history)

    @staticmethod
    def dealt(shards: "Sequence[Histogram]") -> "Histogram":
        """What one histogram would hold of batches that were dealt to several, each with its number as `time`."""
        whole = Histogram(shards[0].block, shards[0].name)
        for shard in shards:
            if shard.count:
                whole._include(shard.seen)
        whole.history.extend(sorted((entry for shard in shards for entry in shard.history), key=lambda entry: entry[0]))
        return whole

    def _include(self, seen: Buckets) -> None:
        blocks, before = len(seen.zeros), len(self.seen.zeros)
        if not before:
            self.seen = Buckets.none(blocks)
        elif blocks != before:
            raise DataError(
                f"batches{self._of} differ in shape: {blocks} blocks of {self.block!r} now, {before} before."
            )
        self.seen.add(seen)

    @property
    def _of(self) -> str:
        return f" of '{self.name}'" if self.name else ""

    @property
    def count(self) -> int:
        """Numbers seen, those in no bucket included."""
        return self.seen.count

    @property
    def tiles(self) -> tuple[int, ...]:
        return (len(self.seen.zeros),)

    @property
    def minimum(self) -> Tensor:
        """(n_blocks, 1): smallest finite value that is no mask; 0 where there was none."""
        return _column(np.where(np.isfinite(self.seen.minimum), self.seen.minimum, 0))

    @property
    def maximum(self) -> Tensor:
        """(n_blocks, 1): largest finite value that is no mask; 0 where there was none."""
        return _column(np.where(np.isfinite(self.seen.maximum), self.seen.maximum, 0))

    def points(self) -> tuple[Tensor, Tensor]:
        """Non-empty buckets as points within the extremes: values (1, n) sorted, weights (n_blocks, n)."""
        values, weights = (torch.from_numpy(found) for found in self.seen.points())
        if len(weights) == 1:
            values = values.clamp(float(self.minimum), float(self.maximum))
        return values[None], weights

    def averages(self, momentum: float) -> tuple[Tensor, Tensor]:
        """Moving averages of the batches' minima and maxima, oldest first."""
        if not self.history:
            return self.minimum, self.maximum
        lo, hi = (np.asarray(bound, np.float64) for bound in self.history[0][1:])
        for _, low, high in list(self.history)[1:]:
            lo, hi = momentum * lo + (1 - momentum) * low, momentum * hi + (1 - momentum) * high
        return _column(lo), _column(hi)

    def check(self) -> None:
        """DataError where the data had NaN or infinities, or there was none."""
        if not self.count:
            raise DataError(f"no range{self._of} can be chosen: no data was observed.")
        if self.seen.nan or self.seen.infinite:
            raise DataError(
                f"no range{self._of} can be chosen: {self.seen.nan} NaN and {self.seen.infinite} infinite value(s) "
                f"among {self.count}. Mend the data or the network, or leave this tensor in float."
            )


def _column(bound: npt.NDArray[np.floating[Any]]) -> Tensor:
    return torch.from_numpy(bound.astype(np.float32)).reshape(-1, 1)


def unsorted_points(statistics: Statistics) -> tuple[Tensor, Tensor | None]:
    """Values and weights in no particular order, None for weights of one: sorting is left to who needs it."""
    return (statistics.rows, None) if isinstance(statistics, RawRows) else statistics.points()
