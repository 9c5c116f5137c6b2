"""Inner loops on the CPU: one pass over rows of float32, no temporaries. `Kernels` says what they compute.

All take C-contiguous arrays: rows (n_blocks, n), scale and zero (n_blocks, 1) or (1, 1) for all, and write into `out`
(n_blocks, n). A scale of 0 makes exact zeros.
Division, not multiplication by the inverse: that is what ONNX QuantizeLinear does, and the two differ near ties.
"""

from typing import Any

import numpy as np

from lowbit.machine_code import ANY_ORDER, kernel

_MAGNITUDE = np.int32(0x7FFFFFFF)
_PART = 256
_TOGETHER = 1024  # elements of short rows that are worked on at once: one by one a row costs 3 ns


@kernel
def _divisor(scale: Any) -> Any:
    return scale if scale != 0 else np.float32(np.inf)


@kernel
def _of(numbers: Any, block: Any) -> Any:
    """The number of a block, where there may be one for all."""
    return numbers[block if numbers.shape[0] > 1 else 0, 0]


@kernel
def _is_short(width: Any) -> Any:
    return width == 2 or width == 4 or width == 8 or width == 16


def _repeater(width: int) -> Any:
    """A constant width, so that the compiler works in vectors: 0.02 ns an element where a loop takes 0.3."""

    @kernel(name=f"repeat_{width}")
    def repeat(numbers: Any, into: Any) -> None:
        for i in range(numbers.shape[0]):
            number = numbers[i]
            for k in range(width):
                into[width * i + k] = number

    return repeat


_repeat_2, _repeat_4, _repeat_8, _repeat_16 = (_repeater(width) for width in (2, 4, 8, 16))


@kernel
def _repeat(numbers: Any, width: Any, into: Any) -> None:
    """The number of each row for each of its `width` elements."""
    if width == 2:
        _repeat_2(numbers, into)
    elif width == 4:
        _repeat_4(numbers, into)
    elif width == 8:
        _repeat_8(numbers, into)
    else:
        _repeat_16(numbers, into)


@kernel
def row_extremes(rows: Any, lo: Any, hi: Any) -> None:
    """Least and greatest bits of each row, ordered as the floats they stand for; a NaN comes out beyond infinity."""
    if rows.shape[1] == 2:
        _pair_extremes(rows.reshape(-1), lo.reshape(-1), hi.reshape(-1))
        return
    for block in range(rows.shape[0]):
        line = rows[block]
        least, most = np.int32(0x7FFFFFFF), np.int32(-0x80000000)
        for i in range(line.shape[0]):
            ordered = np.int32(line[i] ^ np.int32(np.int32(line[i] >> np.int32(31)) & _MAGNITUDE))
            least, most = min(least, ordered), max(most, ordered)
        lo[block, 0] = np.int32(least ^ np.int32(np.int32(least >> np.int32(31)) & _MAGNITUDE))
        hi[block, 0] = np.int32(most ^ np.int32(np.int32(most >> np.int32(31)) & _MAGNITUDE))


@kernel
def _pair_extremes(line: Any, lo: Any, hi: Any) -> None:
    for i in range(lo.shape[0]):
        a, b = np.int32(line[2 * i]), np.int32(line[2 * i + 1])
        p = np.int32(a ^ np.int32(np.int32(a >> np.int32(31)) & _MAGNITUDE))
        q = np.int32(b ^ np.int32(np.int32(b >> np.int32(31)) & _MAGNITUDE))
        least, most = np.int32(min(p, q)), np.int32(max(p, q))
        lo[i] = np.int32(least ^ np.int32(np.int32(least >> np.int32(31)) & _MAGNITUDE))
        hi[i] = np.int32(most ^ np.int32(np.int32(most >> np.int32(31)) & _MAGNITUDE))


@kernel
def encode_int(rows: Any, scale: Any, zero: Any, lowest: Any, highest: Any, out: Any) -> None:
    """Integers: nearest even of x / scale, plus zero, clipped."""
    if _is_short(rows.shape[1]) and scale.shape[0] > 1 and zero.shape[0] == 1:
        _encode_short_int(rows, scale.reshape(-1), zero[0, 0], lowest, highest, out)
        return
    for block in range(rows.shape[0]):
        line, to = rows[block], out[block]
        s, low, high = _of(scale, block), lowest - _of(zero, block), highest - _of(zero, block)
        z, d = np.int32(_of(zero, block)), _divisor(s)
        for i in range(line.shape[0]):
            to[i] = np.int32(min(max(np.rint(line[i] / d), low), high)) + z


@kernel
def _encode_short_int(rows: Any, scale: Any, zero: Any, lowest: Any, highest: Any, out: Any) -> None:
    width = rows.shape[1]
    together = _TOGETHER // width
    line, to = rows.reshape(-1), out.reshape(-1)
    d = np.empty(_TOGETHER, np.float32)
    low, high, z = lowest - zero, highest - zero, np.int32(zero)
    for first in range(0, rows.shape[0], together):
        scales = scale[first : first + together]
        _repeat(scales, width, d)
        x, codes = line[first * width :], to[first * width :]
        for i in range(scales.shape[0] * width):
            codes[i] = np.int32(min(max(np.rint(x[i] / _divisor(d[i])), low), high)) + z


@kernel
def round_int(rows: Any, scale: Any, zero: Any, lowest: Any, highest: Any, out: Any) -> None:
    """`encode_int` and decoding in one: float32, NaN stays NaN."""
    for block in range(rows.shape[0]):
        line, to = rows[block], out[block]
        s, low, high = _of(scale, block), lowest - _of(zero, block), highest - _of(zero, block)
        d = _divisor(s)
        for i in range(line.shape[0]):
            y = line[i] / d
            code = min(max(np.rint(y), low), high)
            to[i] = code * s if y == y else y


def _float_loops(real: Any, whole: Any, fraction_bits: int, bias: int) -> tuple[Any, Any]:
    """Rounding to small floats, in float32, or in float64 for grids whose smallest step is no normal float32.

    encode(rows, scale, zero, mantissa, smallest, greatest, middle, out)  positions in the table of a `Float` grid
    round(rows, scale, mantissa, smallest, greatest, out)  the value, scaled back; NaN stays NaN. Without a zero: adding
                                                           it takes 0.05 ns of 0.56 in float64
    mantissa  bits; smallest: exponent of the smallest normal number; greatest: largest value; middle: position of 0
    """
    shift, top = whole(fraction_bits), whole(2 * bias)

    @kernel(name=f"encode_{real.__name__}")
    def encode(
        rows: Any, scale: Any, zero: Any, mantissa: Any, smallest: Any, greatest: Any, middle: Any, out: Any
    ) -> None:
        m, lowest, limit = whole(mantissa), whole(smallest + bias), real(greatest)
        for block in range(rows.shape[0]):
            line, to, d, z = rows[block], out[block], _divisor(_of(scale, block)), _of(zero, block)
            for i in range(line.shape[0]):
                y = line[i] / d + z
                size = min(real(abs(y)), limit)
                exponent = max(whole(real(size).view(whole) >> shift), lowest)
                inverse = whole(whole(top - exponent + m) << shift).view(real)
                code = np.int32(np.int32(np.rint(size * inverse)) + np.int32((exponent - lowest) << m))
                to[i] = middle + (code if y >= 0 else -code)

    @kernel(name=f"round_{real.__name__}")
    def round_(rows: Any, scale: Any, mantissa: Any, smallest: Any, greatest: Any, out: Any) -> None:
        m, lowest, limit = whole(mantissa), whole(smallest + bias), real(greatest)
        for block in range(rows.shape[0]):
            line, to, s = rows[block], out[block], _of(scale, block)
            d = _divisor(s)
            for i in range(line.shape[0]):
                y = line[i] / d
                size = min(real(abs(y)), limit)
                exponent = max(whole(real(size).view(whole) >> shift), lowest)
                step = whole(whole(exponent - m) << shift).view(real)
                inverse = whole(whole(top - exponent + m) << shift).view(real)
                value = np.float32(np.rint(size * inverse) * step) * s
                to[i] = (value if y >= 0 else -value) if y == y else y

    return encode, round_


encode_float, round_float = _float_loops(np.float32, np.int32, 23, 127)
encode_wide_float, round_wide_float = _float_loops(np.float64, np.int64, 52, 1023)


@kernel
def encode_pow2(rows: Any, scale: Any, zero: Any, lowest: Any, thresholds: Any, out: Any) -> None:
    """Positions among powers of two from 2**lowest: by the exponent, then by the threshold above it."""
    last = thresholds.shape[0]
    for block in range(rows.shape[0]):
        line, to, d, z = rows[block], out[block], _divisor(_of(scale, block)), _of(zero, block)
        for i in range(line.shape[0]):
            y = np.float32(line[i] / d + z)
            exponent = np.int32(y.view(np.int32) >> np.int32(23)) - np.int32(127 + lowest)
            code = min(max(exponent, np.int32(0)), np.int32(last))
            while code < last and y >= thresholds[code]:
                code += 1
            to[i] = code


@kernel
def encode_table(rows: Any, scale: Any, zero: Any, thresholds: Any, out: Any) -> None:
    """Number of thresholds that x / scale + zero reaches. thresholds (n_blocks or 1, n_codes - 1), sorted."""
    count, width = thresholds.shape[1], rows.shape[1]
    shared = thresholds.shape[0] == 1
    if shared and _is_short(width) and scale.shape[0] > 1 and zero.shape[0] == 1:
        _encode_short_table(rows, scale.reshape(-1), zero[0, 0], thresholds[0], out)
        return
    # Short rows that share their thresholds are compared together.
    together = max(1, _PART // max(1, width)) if shared else 1
    part = min(width, _PART)
    y = np.empty(together * part, np.float32)
    reached = np.empty(together * part, np.int32)
    for first in range(0, rows.shape[0], together):
        last = min(first + together, rows.shape[0])
        limits = thresholds[0 if shared else first]
        for start in range(0, width, _PART):
            n = 0
            for block in range(first, last):
                line = rows[block, start : start + _PART]
                d, z = _divisor(_of(scale, block)), _of(zero, block)
                into = y[n : n + line.shape[0]]
                for i in range(line.shape[0]):
                    into[i] = line[i] / d + z
                n += line.shape[0]
            _count_reached(y[:n], limits, count, reached)
            n = 0
            for block in range(first, last):
                to = out[block, start : start + _PART]
                source = reached[n : n + to.shape[0]]
                for i in range(to.shape[0]):
                    to[i] = source[i]
                n += to.shape[0]


@kernel
def _encode_short_table(rows: Any, scale: Any, zero: Any, limits: Any, out: Any) -> None:
    width = rows.shape[1]
    together = _PART // width
    line, to = rows.reshape(-1), out.reshape(-1)
    y, reached = np.empty(_PART, np.float32), np.empty(_PART, np.int32)
    for first in range(0, rows.shape[0], together):
        scales = scale[first : first + together]
        _repeat(scales, width, y)
        n = scales.shape[0] * width
        x, codes = line[first * width :], to[first * width :]
        for i in range(n):
            y[i] = x[i] / _divisor(y[i]) + zero
        _count_reached(y[:n], limits, limits.shape[0], reached)
        for i in range(n):
            codes[i] = reached[i]


@kernel
def _count_reached(y: Any, limits: Any, count: Any, reached: Any) -> None:
    n = y.shape[0]
    reached[:n] = 0
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


@kernel
def symmetric_scale(lo: Any, hi: Any, reach: Any, signed: Any, empty: Any, least: Any, most: Any, out: Any) -> None:
    """max(|lo|, |hi|) / reach, or hi / reach, from `least` to `most`; `empty` for a range of no width. Arrays (n,)."""
    for i in range(out.shape[0]):
        bound = max(abs(lo[i]), abs(hi[i])) if signed else max(hi[i], np.float32(0))
        raw = bound / reach
        out[i] = min(max(raw, least), most) if raw > 0 else empty


@kernel
def decode_int(codes: Any, scale: Any, zero: Any, out: Any) -> None:
    """(code - zero) * scale."""
    for block in range(codes.shape[0]):
        line, to, s, z = codes[block], out[block], _of(scale, block), _of(zero, block)
        for i in range(line.shape[0]):
            to[i] = (np.float32(line[i]) - z) * s


@kernel
def decode_table(codes: Any, scale: Any, zero: Any, values: Any, out: Any) -> None:
    """(values[code] - zero) * scale. values (n_blocks or 1, n_codes)."""
    if _is_short(codes.shape[1]) and scale.shape[0] > 1 and zero.shape[0] == 1 and values.shape[0] == 1:
        _decode_short_table(codes, scale.reshape(-1), zero[0, 0], values[0], out)
        return
    scaled = np.empty(values.shape[1], np.float32)
    for block in range(codes.shape[0]):
        line, to, s, z = codes[block], out[block], _of(scale, block), _of(zero, block)
        table = values[block if values.shape[0] > 1 else 0]
        if line.shape[0] < scaled.shape[0]:
            for i in range(line.shape[0]):
                to[i] = (table[line[i]] - z) * s
        else:
            for k in range(scaled.shape[0]):
                scaled[k] = (table[k] - z) * s
            for i in range(line.shape[0]):
                to[i] = scaled[line[i]]


@kernel
def _decode_short_table(codes: Any, scale: Any, zero: Any, values: Any, out: Any) -> None:
    width = codes.shape[1]
    together = _TOGETHER // width
    line, to = codes.reshape(-1), out.reshape(-1)
    s = np.empty(_TOGETHER, np.float32)
    for first in range(0, codes.shape[0], together):
        scales = scale[first : first + together]
        _repeat(scales, width, s)
        source, numbers = line[first * width :], to[first * width :]
        for i in range(scales.shape[0] * width):
            numbers[i] = (values[source[i]] - zero) * s[i]


@kernel(fastmath=ANY_ORDER)
def error_along(rows: Any, along: Any, scales: Any, zeros: Any, lowest: Any, highest: Any, out: Any) -> None:
    """Σ along · (x̂ − x) over each row for several scales; each part of a row stays in cache for all of them."""
    out[:] = 0
    for row in range(rows.shape[0]):
        for start in range(0, rows.shape[1], _TOGETHER):
            x, g = rows[row, start : start + _TOGETHER], along[row, start : start + _TOGETHER]
            for k in range(scales.shape[0]):
                s = scales[k]
                inverse = np.float32(1) / s if s != 0 else np.float32(0)
                low, high = lowest - zeros[k], highest - zeros[k]
                total = np.float32(0)
                for i in range(x.shape[0]):
                    code = min(max(np.rint(x[i] * inverse), low), high)
                    total += g[i] * (code * s - x[i])
                out[row, k] += float(total)
