"""The inner loops on the CPU: one pass over rows of float32, no temporaries. What they compute is defined in encode.py.

All take C-contiguous arrays: rows (n_blocks, n), scale and zero (n_blocks, 1), and write into `out` (n_blocks, n).
A scale of 0 makes exact zeros.
Division, not multiplication by the inverse: that is what ONNX QuantizeLinear does, and the two differ near ties.
"""

from collections.abc import Callable
from typing import Any, TypeVar, cast

import numba
import numpy as np

_Function = TypeVar("_Function", bound=Callable[..., Any])
_MAGNITUDE = np.int32(0x7FFFFFFF)
_PART = 256


def kernel(function: _Function) -> _Function:
    """Compile with numba, keep the machine code, let go of the interpreter's lock."""
    return cast(_Function, numba.njit(nogil=True, cache=True, error_model="numpy")(function))


@kernel
def _divisor(scale: Any) -> Any:
    return scale if scale != 0 else np.float32(np.inf)


@kernel
def row_extremes(rows: Any, lo: Any, hi: Any) -> None:
    """Least and greatest bits of each row, ordered as the floats they stand for; a NaN comes out beyond infinity."""
    for block in range(rows.shape[0]):
        line = rows[block]
        least, most = np.int32(0x7FFFFFFF), np.int32(-0x80000000)
        for i in range(line.shape[0]):
            ordered = np.int32(line[i] ^ np.int32(np.int32(line[i] >> np.int32(31)) & _MAGNITUDE))
            least, most = min(least, ordered), max(most, ordered)
        lo[block, 0] = np.int32(least ^ np.int32(np.int32(least >> np.int32(31)) & _MAGNITUDE))
        hi[block, 0] = np.int32(most ^ np.int32(np.int32(most >> np.int32(31)) & _MAGNITUDE))


@kernel
def encode_int(rows: Any, scale: Any, zero: Any, lowest: Any, highest: Any, out: Any) -> None:
    """Integers: nearest even of x / scale, plus zero, clipped."""
    for block in range(rows.shape[0]):
        line, to = rows[block], out[block]
        s, low, high = scale[block, 0], lowest - zero[block, 0], highest - zero[block, 0]
        z, d = np.int32(zero[block, 0]), _divisor(s)
        for i in range(line.shape[0]):
            to[i] = np.int32(min(max(np.rint(line[i] / d), low), high)) + z


@kernel
def round_int(rows: Any, scale: Any, zero: Any, lowest: Any, highest: Any, out: Any) -> None:
    """`encode_int` and decoding in one: float32, NaN stays NaN."""
    for block in range(rows.shape[0]):
        line, to = rows[block], out[block]
        s, low, high = scale[block, 0], lowest - zero[block, 0], highest - zero[block, 0]
        d = _divisor(s)
        for i in range(line.shape[0]):
            y = line[i] / d
            code = min(max(np.rint(y), low), high)
            to[i] = code * s if y == y else y


@kernel
def encode_float(rows: Any, scale: Any, mantissa: Any, lowest: Any, greatest: Any, middle: Any, out: Any) -> None:
    """Positions in the table of a `Float` grid: nearest even.

    lowest    exponent field, as in float32, of the smallest normal number
    greatest  largest value; middle: position of 0
    """
    m = np.int32(mantissa)
    for block in range(rows.shape[0]):
        line, to, s = rows[block], out[block], scale[block, 0]
        d = _divisor(s)
        for i in range(line.shape[0]):
            y = line[i] / d
            size = min(abs(y), greatest)
            exponent = max(np.int32(np.float32(size).view(np.int32) >> np.int32(23)), lowest)
            inverse = np.int32(np.int32(np.int32(254) - exponent + m) << np.int32(23)).view(np.float32)
            code = np.int32(np.int32(np.rint(size * inverse)) + np.int32((exponent - lowest) << m))
            to[i] = middle + (code if y >= 0 else -code)


@kernel
def round_float(rows: Any, scale: Any, mantissa: Any, lowest: Any, greatest: Any, out: Any) -> None:
    """Rounded to a `Float` grid and scaled back: float32, NaN stays NaN. Arguments as in `encode_float`."""
    m = np.int32(mantissa)
    for block in range(rows.shape[0]):
        line, to, s = rows[block], out[block], scale[block, 0]
        d = _divisor(s)
        for i in range(line.shape[0]):
            y = line[i] / d
            size = min(abs(y), greatest)
            exponent = max(np.int32(np.float32(size).view(np.int32) >> np.int32(23)), lowest)
            step = np.int32(np.int32(exponent - m) << np.int32(23)).view(np.float32)
            inverse = np.int32(np.int32(np.int32(254) - exponent + m) << np.int32(23)).view(np.float32)
            value = np.rint(size * inverse) * step * s
            to[i] = (value if y >= 0 else -value) if y == y else y


@kernel
def encode_table(rows: Any, scale: Any, zero: Any, thresholds: Any, out: Any) -> None:
    """Number of thresholds that x / scale + zero reaches. thresholds (n_blocks or 1, n_codes - 1), sorted."""
    count = thresholds.shape[1]
    y = np.empty(_PART, np.float32)
    reached = np.empty(_PART, np.int32)
    for block in range(rows.shape[0]):
        limits = thresholds[block if thresholds.shape[0] > 1 else 0]
        d, z = _divisor(scale[block, 0]), zero[block, 0]
        for start in range(0, rows.shape[1], _PART):
            line, to = rows[block, start : start + _PART], out[block, start : start + _PART]
            n = line.shape[0]
            for i in range(n):
                y[i] = line[i] / d + z
                reached[i] = 0
            if count <= 64:
                for k in range(count):
                    limit = limits[k]
                    for i in range(n):
                        reached[i] += np.int32(y[i] >= limit)
            else:
                for i in range(n):
                    low, size = 0, count
                    while size > 0:
                        half = (size + 1) // 2
                        low += half * (y[i] >= limits[low + half - 1])
                        size -= half
                    reached[i] = low
            for i in range(n):
                to[i] = reached[i]


@kernel
def decode_int(codes: Any, scale: Any, zero: Any, out: Any) -> None:
    """(code - zero) * scale."""
    for block in range(codes.shape[0]):
        line, to, s, z = codes[block], out[block], scale[block, 0], zero[block, 0]
        for i in range(line.shape[0]):
            to[i] = (np.float32(line[i]) - z) * s


@kernel
def decode_table(codes: Any, scale: Any, zero: Any, values: Any, out: Any) -> None:
    """(values[code] - zero) * scale. values (n_blocks or 1, n_codes)."""
    scaled = np.empty(values.shape[1], np.float32)
    for block in range(codes.shape[0]):
        line, to, s, z = codes[block], out[block], scale[block, 0], zero[block, 0]
        table = values[block if values.shape[0] > 1 else 0]
        if line.shape[0] < scaled.shape[0]:
            for i in range(line.shape[0]):
                to[i] = (table[line[i]] - z) * s
        else:
            for k in range(scaled.shape[0]):
                scaled[k] = (table[k] - z) * s
            for i in range(line.shape[0]):
                to[i] = scaled[line[i]]
