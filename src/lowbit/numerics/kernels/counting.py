"""Counting on the CPU: one look at each number, in integer arithmetic; see `numerics.buckets` for what is counted."""

import threading
from typing import Any

import numpy as np
from torch import Tensor

from lowbit.machine_code import kernel
from lowbit.numerics.buckets import INFINITY_BITS, MASK_BITS, SHIFT, ZERO_BITS, Buckets, window

_TABLES = 4
_KEYS = 1 << (31 - SHIFT)
_scratch = threading.local()


def count(rows: Tensor) -> Buckets:
    bits = rows.numpy().view(np.int32)
    extremes = np.zeros((len(bits), 8), np.int64)
    # Taken, and given back empty: an interrupt in between leaves no counts behind.
    table = vars(_scratch).pop("table", None)
    if table is None:
        table = np.zeros((_TABLES, 2 * _KEYS), np.uint32)
    per_row = []
    for row in range(len(bits)):
        _count(bits[row], table, extremes[row])
        base, width = window(extremes[row : row + 1])
        counts = np.zeros((2, width), np.int64)
        _collect(table, base, counts, extremes[row])
        per_row.append((base, counts))
    _scratch.table = table
    base, width = window(extremes)
    together = np.zeros((len(bits), 2, width), np.int64)
    for row, (first, counts) in enumerate(per_row):
        together[row, :, first - base : first - base + counts.shape[1]] = counts
    return Buckets.of(extremes, base, together, rows.numel())


@kernel
def _count(line: Any, table: Any, out: Any) -> None:
    """Add one row to the table by sign and key, and note its extremes in `out`, as `Buckets.of` reads them.

    Part by part, so that the second look finds the numbers in cache: counting is slow enough for memory to keep up,
    looking is not. Four places are read in turn, each with its own table: equal numbers in a row (zeros, after a ReLU)
    would otherwise wait for each other's store.
    The least and greatest bits, read as signed and as unsigned integers, tell the extremes on either side of zero.
    """
    biggest, first = np.uint32(0x7FFFFFFF), np.uint32(ZERO_BITS)
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
    if large >= np.int32(MASK_BITS):
        _look_past_masks(line, out)
    else:
        out[0] = np.int32(highest) ^ np.int32(biggest) if highest > biggest else np.int32(lowest)
        out[1] = most if most >= 0 else least ^ np.int32(biggest)
        out[2] = np.int32(biggest) if beyond > biggest else np.int32(beyond + first)
        out[3] = large
    for bank in range(_TABLES):
        out[4] += table[bank, 0] + table[bank, _KEYS]


@kernel
def _look_past_masks(line: Any, out: Any) -> None:
    """Extremes of the numbers that are no masks, and how many are masks, not finite, NaN."""
    biggest, least = np.int32(0x7FFFFFFF), np.int32(-0x80000000)
    lo, hi, small, large = biggest, least, biggest, np.int32(0)
    for i in range(line.shape[0]):
        b = line[i]
        magnitude = np.int32(b & biggest)
        if magnitude < np.int32(MASK_BITS):
            ordered = np.int32(b ^ np.int32(np.int32(b >> np.int32(31)) & biggest))
            lo, hi, large = min(lo, ordered), max(hi, ordered), max(large, magnitude)
        if magnitude >= np.int32(ZERO_BITS):
            small = min(small, magnitude)
        out[5] += magnitude >= np.int32(MASK_BITS)
        out[6] += magnitude >= np.int32(INFINITY_BITS)
        out[7] += magnitude > np.int32(INFINITY_BITS)
    out[0], out[1], out[2], out[3] = lo, hi, small, large


@kernel
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
                for k in range(MASK_BITS >> SHIFT, _KEYS):
                    line[offset + k] = 0
