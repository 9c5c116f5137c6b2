"""Buckets: float32 numbers counted by sign and leading bits, in integers, so that counts add up to the same everywhere.

The key of a number is its magnitude's bit pattern shifted right: exponent and leading mantissa bits.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

# 23 - 14 = 9 bits of mantissa: buckets 0.2 % wide, half of an 8-bit step at the top of the range.
SHIFT = 14
# Finite magnitudes from here on are attention masks: 1e8, moved down to the edge of its bucket (9.99e7).
MASK_BITS = int(np.float32(1e8).view(np.int32)) >> SHIFT << SHIFT
MASK_FROM = float(np.int32(MASK_BITS).view(np.float32))
INFINITY_BITS = 0x7F800000
ZERO_BITS = 1 << SHIFT  # numbers below 2.3e-41 share the key of 0

Integers = npt.NDArray[np.int64]


@dataclass
class Buckets:
    """Counts of some numbers in n_blocks blocks.

    base              key of the first bucket
    counts            (n_blocks, 2, width): negative and positive numbers by key, from `base` on
    zeros             (n_blocks,) numbers that are 0 or nearly so
    minimum, maximum  (n_blocks,) float32: exact, of the finite numbers that are no masks; inf and -inf where none is
    count             of all numbers; `masked`, `nan` and `infinite` of them are in no bucket
    """

    base: int
    counts: Integers
    zeros: Integers
    minimum: npt.NDArray[np.float32]
    maximum: npt.NDArray[np.float32]
    count: int = 0
    masked: int = 0
    nan: int = 0
    infinite: int = 0

    @classmethod
    def none(cls, blocks: int) -> "Buckets":
        """Of no numbers."""
        highest = np.full(blocks, np.inf, np.float32)
        return cls(0, np.zeros((blocks, 2, 0), np.int64), np.zeros(blocks, np.int64), highest, -highest)

    @classmethod
    def of(cls, extremes: Integers, base: int, counts: Integers, count: int) -> "Buckets":
        """From what a kernel found.

        extremes  (n_blocks, 8): least and greatest number as integers of the same order; least and greatest magnitude
                  that is counted; how many zeros, masks and worse, not finite, NaN
        """
        lo, hi, zeros, large, not_finite, nan = extremes[:, [0, 1, 4, 5, 6, 7]].T
        seen = lo <= hi
        return cls(
            base=base,
            counts=counts,
            zeros=zeros.copy(),
            minimum=np.where(seen, _from_ordered(np.where(seen, lo, 0)), np.float32(np.inf)),
            maximum=np.where(seen, _from_ordered(np.where(seen, hi, 0)), np.float32(-np.inf)),
            count=count,
            masked=int((large - not_finite).sum()),
            nan=int(nan.sum()),
            infinite=int((not_finite - nan).sum()),
        )

    def add(self, other: "Buckets") -> None:
        """Count what `other` counted too; over as many blocks."""
        width, more = self.counts.shape[2], other.counts.shape[2]
        if more:
            first = min(self.base, other.base) if width else other.base
            end = max(self.base + width, other.base + more) if width else other.base + more
            if (first, end - first) != (self.base, width):
                wider = np.zeros((len(self.zeros), 2, end - first), np.int64)
                wider[:, :, self.base - first :][:, :, :width] = self.counts
                self.base, self.counts = first, wider
            self.counts[:, :, other.base - first :][:, :, :more] += other.counts
        self.zeros = self.zeros + other.zeros
        self.minimum, self.maximum = np.minimum(self.minimum, other.minimum), np.maximum(self.maximum, other.maximum)
        self.count += other.count
        self.masked += other.masked
        self.nan += other.nan
        self.infinite += other.infinite

    def points(self) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
        """Middles of the buckets that hold any, (n,) sorted, and their counts, (n_blocks, n)."""
        used = self.counts.sum(axis=0) > 0
        negative, positive = np.flatnonzero(used[0])[::-1], np.flatnonzero(used[1])
        values = np.concatenate([-_middles(negative + self.base), [0.0], _middles(positive + self.base)])
        counts = (self.counts[:, 0, negative], self.zeros[:, None], self.counts[:, 1, positive])
        weights = np.concatenate(counts, axis=1).astype(np.float64)
        keep = weights.any(axis=0)
        return values[keep], weights[:, keep]


def window(extremes: Integers) -> tuple[int, int]:
    """First key and number of buckets that hold every counted number but the zeros; extremes as in `Buckets.of`."""
    first, last = int(extremes[:, 2].min()) >> SHIFT, int(extremes[:, 3].max()) >> SHIFT
    return (first, last - first + 1) if last >= first else (1, 0)


def _middles(keys: Integers) -> npt.NDArray[np.float64]:
    return ((keys << SHIFT) + (1 << (SHIFT - 1))).astype(np.int32).view(np.float32).astype(np.float64)


def _from_ordered(ordered: Integers) -> npt.NDArray[np.float32]:
    """Floats from integers that order as they do."""
    bits = ordered.astype(np.int32)
    return np.where(bits < 0, bits ^ np.int32(0x7FFFFFFF), bits).view(np.float32)
