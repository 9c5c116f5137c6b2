"""Frequency tables in a few bytes: how often each symbol occurs, as precisely as it is worth.

A count is kept as a level, a small float of `mantissa` bits: two mantissa bits cost 0.04 % of a 6-bit entropy, and
neighbouring levels differ little, so an 8-bit table takes about 60 bytes where plain counts take 500. For short
streams a level may stand at every `stride`-th symbol only, with straight lines between them.
"""

from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate

import numpy as np
from numpy.typing import NDArray

from lowbit.errors import InputError
from lowbit.storage.wire import Reader

Counts = NDArray[np.int64]

SYMBOLS = 256
MAX_MANTISSA = 3
MAX_STRIDE_LOG2 = 5
STRIDES_TRIED = (0, 3)
"""Every symbol, or every eighth: the strides between were worth 0.03 % of a file at most."""
MAX_OCTAVE = 40
"""A level's weight is below 2**MAX_OCTAVE, so that weight × table size stays in 63 bits."""


def entropy_bits(counts: Counts) -> float:
    """Zero-order entropy of all symbols: what no code without a memory of symbols stays below."""
    used = counts[counts > 0]
    return float(-(used * np.log2(used / used.sum())).sum())


@lru_cache
def weights(mantissa: int) -> NDArray[np.int64]:
    """The weight of every level: 0, 1, 2, 3 … in steps of one, then 2**mantissa steps an octave."""
    m = 1 << mantissa
    levels = range(m * (MAX_OCTAVE - mantissa + 1))
    return np.array([level if level < m else (m + level % m) << (level // m - 1) for level in levels], np.int64)


def levels_of(values: NDArray[np.float64], mantissa: int) -> NDArray[np.int64]:
    """The level whose weight is nearest to each value; at least 1 where the value is above 0."""
    steps = weights(mantissa)
    nearest = np.searchsorted((steps[1:] + steps[:-1]) / 2, values)
    return np.where(values > 0, np.maximum(nearest, 1), 0)


@dataclass(frozen=True)
class Table:
    """The relative frequency of each of 256 symbols.

    Symbols below `first` and after the last one described do not occur.
    knots[i] is the level of symbol first + i * 2**stride_log2; `span` symbols are described
    stride_log2 > 0: no knot is 0, and levels between knots lie on straight lines, rounded down
    """

    first: int
    span: int
    mantissa: int
    stride_log2: int
    knots: tuple[int, ...]

    def levels(self) -> NDArray[np.int64]:
        """(span,) the level of each symbol described."""
        stride = 1 << self.stride_log2
        knots = np.array(self.knots, np.int64)
        at, step = np.divmod(np.arange(self.span), stride)
        following = knots[np.minimum(at + 1, len(knots) - 1)]
        return np.asarray((knots[at] * (stride - step) + following * step) // stride)

    def weights(self) -> Counts:
        """(256,) the weight of each symbol; 0 where it does not occur."""
        result = np.zeros(SYMBOLS, np.int64)
        result[self.first : self.first + self.span] = weights(self.mantissa)[self.levels()]
        return result

    def steps(self) -> NDArray[np.int64]:
        """Each knot less the one before, the first less 0: 0, -1, 1, -2 … as 0, 1, 2, 3 …"""
        steps = np.diff(self.knots, prepend=0)
        return steps << 1 ^ steps >> 63

    def numbers(self) -> list[int]:
        """What `read` reads."""
        return [self.first, self.span - 1, self.mantissa, self.stride_log2, *self.steps().tolist()]

    def size_bits(self) -> float:
        """About how long `numbers` are where LZMA has compressed them."""
        return 24 + float((2 + 2 * np.log2(1 + self.steps())).sum())

    @staticmethod
    def read(source: Reader) -> "Table":
        """The table of these numbers; one that cannot be is an InputError."""
        first, span, mantissa = source.number(SYMBOLS - 1), source.number(SYMBOLS - 1) + 1, source.number(MAX_MANTISSA)
        stride_log2, most = source.number(MAX_STRIDE_LOG2), len(weights(mantissa)) - 1
        steps = source.column(n_knots(span, stride_log2), 2 * most)
        knots = tuple(accumulate(step >> 1 ^ -(step & 1) for step in steps))
        if first + span > SYMBOLS or min(knots) < (stride_log2 > 0) or not 0 < max(knots) <= most:
            raise InputError(
                f"{source.what} is damaged: a frequency table of symbols {first}…{first + span - 1} "
                f"with levels {min(knots)}…{max(knots)}."
            )
        return Table(first, span, mantissa, stride_log2, knots)


def n_knots(span: int, stride_log2: int) -> int:
    """Knots needed for `span` symbols: the last stands at the last symbol or after it."""
    return (span - 1 + (1 << stride_log2) - 1 >> stride_log2) + 1


def fit(counts: Counts) -> Table:
    """The table that makes table + coded symbols shortest, counting -log2(frequency) bits a symbol."""
    present = np.flatnonzero(counts)
    first, span = int(present[0]), int(present[-1] - present[0]) + 1
    shown = counts[first : first + span].astype(np.float64)
    total = shown.sum()
    strides = STRIDES_TRIED if span > 8 and total < 2**17 else (0,)
    mantissas = range(MAX_MANTISSA + 1) if total < 2**17 else range(MAX_MANTISSA, MAX_MANTISSA + 1)
    best: tuple[float, Table] | None = None
    for stride_log2 in strides:
        means = _means_at_knots(shown, stride_log2)
        for mantissa in mantissas:
            table = Table(first, span, mantissa, stride_log2, tuple(levels_of(means, mantissa).tolist()))
            w = weights(mantissa)[table.levels()].astype(np.float64)
            used = shown > 0
            bits = float((shown[used] * np.log2(w.sum() / w[used])).sum()) + table.size_bits()
            if best is None or bits < best[0]:
                best = bits, table
    assert best is not None
    return best[1]


def _means_at_knots(counts: NDArray[np.float64], stride_log2: int) -> NDArray[np.float64]:
    """Mean count around each knot, in units that keep fractions of one; the counts themselves at stride 1."""
    if stride_log2 == 0:
        return counts
    stride = 1 << stride_log2
    sums = np.concatenate([[0.0], np.cumsum(counts)])
    centre = np.arange(n_knots(len(counts), stride_log2)) * stride
    low = np.clip(centre - stride // 2, 0, len(counts) - 1)
    high = np.clip(centre + stride // 2 + 1, low + 1, len(counts))
    return np.asarray(np.maximum((sums[high] - sums[low]) / (high - low), 2**-6) * 2**6)


def normalize(weights: Counts, size: int) -> Counts:
    """Whole frequencies with sum `size`, proportional to `weights`, at least 1 for every weight above 0.

    Each gets max(1, floor(weight * size / sum)). What is missing goes one each to the largest remainders of that
    division; what is too much is taken one at a time from the largest frequency. Ties: the lower symbol first.
    """
    total = int(weights.sum())
    if int((weights > 0).sum()) > size:
        raise InputError(f"a frequency table of {int((weights > 0).sum())} symbols does not fit {size} slots.")
    frequencies, remainders = np.divmod(weights * size, total)
    frequencies = np.where(weights > 0, np.maximum(frequencies, 1), 0)
    remainders = np.where(weights * size >= total, remainders, 0)
    missing = size - int(frequencies.sum())
    if missing > 0:
        frequencies[np.argsort(-remainders, kind="stable")[:missing]] += 1
    for _ in range(-missing):
        frequencies[np.argmax(frequencies)] -= 1
    return np.asarray(frequencies)
