"""Counting float32 numbers by their leading bits: two passes of integer arithmetic, exact on CPU and GPU alike.

The key of a number is its magnitude's bit pattern shifted right: exponent and leading mantissa bits.
"""

import threading
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from lowbit.machine_code import machine_code

# 23 - 14 = 9 bits of mantissa: buckets 0.2 % wide, half of an 8-bit step at the top of the range.
SHIFT = 14
# Finite magnitudes from here on are attention masks: 1e8, moved down to the edge of its bucket (9.99e7).
_MASK_BITS = int(np.float32(1e8).view(np.int32)) >> SHIFT << SHIFT
MASK_FROM = float(np.int32(_MASK_BITS).view(np.float32))
_INFINITY_BITS = 0x7F800000
_ZERO_BITS = 1 << SHIFT  # numbers below 2.3e-41 share the key of 0
_TABLES = 4
_KEYS = 1 << (31 - SHIFT)
# Per row: ordered minimum, maximum; smallest and largest magnitude counted; zeros; masks and worse; not finite; NaN.
_COLUMNS = 8
_scratch = threading.local()


@dataclass(frozen=True)
class Buckets:
    """Counts of one batch: counts (n_blocks, 2, buckets) from key `base`; minimum, maximum ±inf where none."""

    base: int
    counts: npt.NDArray[np.int64]
    zeros: npt.NDArray[np.int64]
    minimum: npt.NDArray[np.float32]
    maximum: npt.NDArray[np.float32]
    count: int
    masked: int
    nan: int
    infinite: int


def bucket_values(keys: npt.NDArray[np.int64]) -> npt.NDArray[np.float64]:
    """The number in the middle of each bucket."""
    return ((keys << SHIFT) + (1 << (SHIFT - 1))).astype(np.int32).view(np.float32).astype(np.float64)


def bucket_counts(rows: Tensor) -> Buckets:
    """Count rows (n_blocks, n), float32, contiguous."""
    return _count_on_device(rows) if rows.device.type != "cpu" else _count_on_cpu(rows)


def _ordered_to_float(ordered: Any) -> Any:
    """From integers that order as the floats they stand for."""
    ordered = np.asarray(ordered, np.int64).astype(np.int32)
    return np.where(ordered < 0, ordered ^ np.int32(0x7FFFFFFF), ordered).astype(np.int32).view(np.float32)


def _assemble(rows: Tensor, extremes: npt.NDArray[np.int64], base: int, counts: npt.NDArray[np.int64]) -> Buckets:
    lo, hi, zeros = extremes[:, 0], extremes[:, 1], extremes[:, 4]
    seen = lo <= hi
    return Buckets(
        base=base,
        counts=counts,
        zeros=zeros.copy(),
        minimum=np.where(seen, _ordered_to_float(np.where(seen, lo, 0)), np.float32(np.inf)),
        maximum=np.where(seen, _ordered_to_float(np.where(seen, hi, 0)), np.float32(-np.inf)),
        count=rows.numel(),
        masked=int(extremes[:, 5].sum() - extremes[:, 6].sum()),
        nan=int(extremes[:, 7].sum()),
        infinite=int(extremes[:, 6].sum() - extremes[:, 7].sum()),
    )


def _window(extremes: npt.NDArray[np.int64]) -> tuple[int, int]:
    """First key and number of buckets that hold every counted number but the zeros."""
    first, last = int(extremes[:, 2].min()) >> SHIFT, int(extremes[:, 3].max()) >> SHIFT
    return (first, last - first + 1) if last >= first else (1, 0)


def _count_on_cpu(rows: Tensor) -> Buckets:
    bits = rows.numpy().view(np.int32)
    extremes = np.zeros((len(bits), _COLUMNS), np.int64)
    # Taken, and given back empty: an interrupt in between leaves no counts behind.
    table = vars(_scratch).pop("table", None)
    if table is None:
        table = np.zeros((_TABLES, 2 * _KEYS), np.uint32)
    per_row = []
    for row in range(len(bits)):
        _count(bits[row], table, extremes[row])
        base, width = _window(extremes[row : row + 1])
        counts = np.zeros((2, width), np.int64)
        _collect(table, base, counts, extremes[row])
        per_row.append((base, counts))
    _scratch.table = table
    base, width = _window(extremes)
    together = np.zeros((len(bits), 2, width), np.int64)
    for row, (first, counts) in enumerate(per_row):
        together[row, :, first - base : first - base + counts.shape[1]] = counts
    return _assemble(rows, extremes, base, together)


@machine_code()
def _count(line: Any, table: Any, out: Any) -> None:
    """Add one row to the table by sign and key, and note its extremes in `out`; see _COLUMNS.

    Part by part, so that the second look finds the numbers in cache: counting is slow enough for memory to keep up,
    looking is not. Four places are read in turn, each with its own table: equal numbers in a row (zeros, after a ReLU)
    would otherwise wait for each other's store.
    The least and greatest bits, read as signed and as unsigned integers, tell the extremes on either side of zero.
    """
    biggest, first = np.uint32(0x7FFFFFFF), np.uint32(_ZERO_BITS)
    least, most = np.int32(0x7FFFFFFF), np.int32(-0x80000000)
    lowest, highest, beyond = np.uint32(0xFFFFFFFF), np.uint32(0), np.uint32(0xFFFFFFFF)
    t0, t1, t2, t3 = table[0], table[1], table[2], table[3]
    shift = np.uint32(SHIFT)
    for start in range(0, line.shape[0], 16384):
        part = line[start : start + 16384]
        quarter = part.shape[0] // 4
        p0, p1 = part[:quarter], part[quarter : 2 * quarter]
        p2, p3 = part[2 * quarter : 3 * quarter], part[3 * quarter : 4 * quarter]
        for i in range(quarter):
            t0[np.uint32(p0[i]) >> shift] += np.uint32(1)
            t1[np.uint32(p1[i]) >> shift] += np.uint32(1)
            t2[np.uint32(p2[i]) >> shift] += np.uint32(1)
            t3[np.uint32(p3[i]) >> shift] += np.uint32(1)
        for i in range(4 * quarter, part.shape[0]):
            t0[np.uint32(part[i]) >> shift] += np.uint32(1)
        unsigned = part.view(np.uint32)
        for i in range(part.shape[0]):
            b, u = part[i], unsigned[i]
            least, most = min(least, b), max(most, b)
            lowest, highest = min(lowest, u), max(highest, u)
            beyond = min(beyond, np.uint32(np.uint32(u & biggest) - first))  # of zeros: wraps to the top
    large = max(np.int32(highest & biggest) if highest > biggest else np.int32(0), max(most, np.int32(0)))
    if large >= np.int32(_MASK_BITS):
        _look_past_masks(line, out)
    else:
        out[0] = np.int32(highest) ^ np.int32(biggest) if highest > biggest else np.int32(lowest)
        out[1] = most if most >= 0 else least ^ np.int32(biggest)
        out[2] = np.int32(biggest) if beyond > biggest else np.int32(beyond + first)
        out[3] = large
    for bank in range(_TABLES):
        out[4] += table[bank, 0] + table[bank, _KEYS]


@machine_code()
def _look_past_masks(line: Any, out: Any) -> None:
    """Extremes of the numbers that are no masks, and how many are masks, not finite, NaN."""
    biggest, least = np.int32(0x7FFFFFFF), np.int32(-0x80000000)
    lo, hi, small, large = biggest, least, biggest, np.int32(0)
    for i in range(line.shape[0]):
        b = line[i]
        magnitude = np.int32(b & biggest)
        if magnitude < np.int32(_MASK_BITS):
            ordered = np.int32(b ^ np.int32(np.int32(b >> np.int32(31)) & biggest))
            lo, hi, large = min(lo, ordered), max(hi, ordered), max(large, magnitude)
        if magnitude >= np.int32(_ZERO_BITS):
            small = min(small, magnitude)
        out[5] += magnitude >= np.int32(_MASK_BITS)
        out[6] += magnitude >= np.int32(_INFINITY_BITS)
        out[7] += magnitude > np.int32(_INFINITY_BITS)
    out[0], out[1], out[2], out[3] = lo, hi, small, large


@machine_code()
def _collect(table: Any, base: int, counts: Any, out: Any) -> None:
    """Move the window's counts out of the table, and leave the table empty."""
    width = counts.shape[1]
    for sign in range(2):
        offset = (1 - sign) * _KEYS
        for bank in range(_TABLES):
            line = table[bank]
            for k in range(width):
                counts[sign, k] += line[offset + base + k]
                line[offset + base + k] = 0
            line[offset] = 0
            if out[5]:
                for k in range(_MASK_BITS >> SHIFT, _KEYS):
                    line[offset + k] = 0


def _count_on_device(rows: Tensor) -> Buckets:
    """The same numbers from torch operations, for GPUs."""
    bits = rows.view(torch.int32)
    magnitude = bits & 0x7FFFFFFF
    kept, zero = magnitude < _MASK_BITS, magnitude < _ZERO_BITS
    ordered = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    biggest, least = 0x7FFFFFFF, -0x80000000
    columns = [
        ordered.masked_fill(~kept, biggest).amin(1),
        ordered.masked_fill(~kept, least).amax(1),
        magnitude.masked_fill(zero, biggest).amin(1),
        magnitude.masked_fill(~kept, 0).amax(1),
        zero.sum(1),
        (~kept).sum(1),
        (magnitude >= _INFINITY_BITS).sum(1),
        (magnitude > _INFINITY_BITS).sum(1),
    ]
    extremes = torch.stack([column.to(torch.int64) for column in columns], dim=1).cpu().numpy()
    base, width = _window(extremes)
    blocks = rows.shape[0]
    if not width:
        return _assemble(rows, extremes, base, np.zeros((blocks, 2, 0), np.int64))
    row = torch.arange(blocks, device=rows.device)[:, None] * 2 + (bits >= 0)
    index = row * width + (magnitude >> SHIFT) - base
    counts = torch.bincount(index[kept & ~zero], minlength=blocks * 2 * width)
    return _assemble(rows, extremes, base, counts.reshape(blocks, 2, width).cpu().numpy())
