"""The loops of the reference, as the formulas say them: one sample at a time, int32 accumulators, no float.

All tensors are (samples, size) of int8 or int16 and lie channels last. numba compiles each function at its first call.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from lowbit.machine_code import kernel

Ints = NDArray[Any]


@kernel
def once(accumulator: int, multiplier: int, shift: int, left: int) -> int:
    """accumulator · multiplier · 2^(left − 31 − shift), the product rounded once, half up.

    The product's low 31 bits are dropped first, so that the rest is 32-bit arithmetic; floor(floor(a / 2^i) / 2^j) =
    floor(a / 2^(i + j)), so nothing is lost. It is made of two products, so that accumulators may have 47 bits.
    """
    up = accumulator << left
    high = ((up >> 16) * multiplier + (((up & 0xFFFF) * multiplier) >> 16)) >> 15
    return ((high >> (shift - 1)) + 1) >> 1


@kernel
def twice(accumulator: int, multiplier: int, shift: int, left: int) -> int:
    """The same product as TFLite and ARM round it: to nearest at bit 31 (ties up), then half away from zero."""
    exponent = left - shift
    up, down = max(exponent, 0), max(-exponent, 0)
    product = (accumulator << up) * multiplier
    nudge = (1 << 30) if product >= 0 else 1 - (1 << 30)
    total = product + nudge
    high = total >> 31 if total >= 0 else -((-total) >> 31)
    mask = (1 << down) - 1
    threshold = (mask >> 1) + (1 if high < 0 else 0)
    return (high >> down) + (1 if (high & mask) > threshold else 0)


@kernel
def half_even(value: int, drop: int) -> int:
    """value / 2^drop, rounded to the nearest whole number, ties to the even one."""
    return (value + (1 << (drop - 1)) - 1 + ((value >> drop) & 1)) >> drop


@kernel
def single(value: int) -> int:
    """The nearest value with 24 bits, which is what a float32 has; ties to the even one."""
    drop = 0
    while abs(value) >> drop >= 1 << 32:
        drop += 8
    while abs(value) >> drop >= 1 << 24:
        drop += 1
    return half_even(value, drop) << drop if drop else value


@kernel
def as_float32(accumulator: int, multiplier: int, shift: int, left: int) -> int:
    """The same product as float32 rounds it, multiplier having 24 bits: onnxruntime's rule."""
    return half_even(single(single(accumulator) * multiplier), 31 + shift - left)


RULES = {"once": 0, "twice": 1, "onnxruntime": 2}


@kernel
def rescale(accumulator: int, multiplier: int, shift: int, left: int, rule: int) -> int:
    """By the program's rule, a number of RULES; see Rounding in tensors.py."""
    if rule == 2:
        return as_float32(accumulator, multiplier, shift, left)
    return twice(accumulator, multiplier, shift, left) if rule else once(accumulator, multiplier, shift, left)


@kernel
def convolve(
    x: Ints, y: Ints, weight: Ints, total: Ints, bias: Ints, multiplier: Ints, shift: Ints, left: int, rule: int,
    size: Any, out: Any, strides: Any, pads: Any, dilations: Any, zero: int, ends: Any,
) -> None:  # fmt: skip
    """y[position, o] = zero_y + rescale(bias[o] + Σ weight[group, tap, c, o] · x[position + tap, c]).

    total       accumulators of one position, (outputs,): int32, or int64 for 16-bit x
    weight      of the accumulators' type, (groups, depth, height, width, inputs of a group, outputs of a group)
    size, out   depth, height, width, channels of x and y
    zero        what lies outside x
    ends        (zero_y, lowest, highest code)
    rule        of rounding, a number of RULES
    """
    groups, taps_d, taps_h, taps_w, inputs, outputs = weight.shape
    value = np.zeros_like(total[:1])  # of the accumulators' type
    for s in range(x.shape[0]):
        for at in range(out[0] * out[1] * out[2]):
            d, h, w = at // (out[1] * out[2]), at // out[2] % out[1], at % out[2]
            total[:] = bias
            for i in range(taps_d):
                from_d = d * strides[0] - pads[0] + i * dilations[0]
                for j in range(taps_h):
                    from_h = h * strides[1] - pads[1] + j * dilations[1]
                    for k in range(taps_w):
                        from_w = w * strides[2] - pads[2] + k * dilations[2]
                        inside = 0 <= from_d < size[0] and 0 <= from_h < size[1] and 0 <= from_w < size[2]
                        read = ((from_d * size[1] + from_h) * size[2] + from_w) * size[3]
                        for g in range(groups):
                            for c in range(inputs):
                                value[0] = x[s, read + g * inputs + c] if inside else zero
                                row = weight[g, i, j, k, c]
                                for o in range(outputs):
                                    total[g * outputs + o] += value[0] * row[o]
            for o in range(out[3]):
                code = rescale(int(total[o]), multiplier[o], shift[o], left, rule) + ends[0]
                y[s, at * out[3] + o] = min(max(code, ends[1]), ends[2])


@kernel
def add(a: Ints, b: Ints, y: Ints, zeros: Any, multipliers: Any, shift: int, ends: Any) -> None:
    """y = zero_y + (Σ (operand − its zero) · its multiplier + 2^(shift−1)) >> shift; b's values repeat along a's."""
    for s in range(a.shape[0]):
        for i in range(a.shape[1]):
            total = (np.int64(a[s, i]) - zeros[0]) * multipliers[0]
            total += (np.int64(b[s % b.shape[0], i % b.shape[1]]) - zeros[1]) * multipliers[1]
            code = ((total + (1 << (shift - 1))) >> shift) + ends[0]
            y[s, i] = min(max(code, ends[1]), ends[2])


@kernel
def add_twice(a: Ints, b: Ints, y: Ints, zeros: Any, factors: Any, sign: int, ends: Any) -> None:
    """TFLite's sum: operands 20 bits up and rescaled, then their sum; factors are (multiplier, shift, left) of each."""
    for s in range(a.shape[0]):
        for i in range(a.shape[1]):
            first = (np.int64(a[s, i]) - zeros[0]) << 20
            second = (np.int64(b[s % b.shape[0], i % b.shape[1]]) - zeros[1]) << 20
            total = twice(int(first), factors[0][0], factors[0][1], factors[0][2])
            total += sign * twice(int(second), factors[1][0], factors[1][1], factors[1][2])
            code = twice(total, factors[2][0], factors[2][1], factors[2][2]) + ends[0]
            y[s, i] = min(max(code, ends[1]), ends[2])


@kernel
def mean_twice(x: Ints, y: Ints, channels: int, zero: int, factor: Any, ends: Any) -> None:
    """TFLite's mean of all places: the sum rescaled, the number of places being part of the multiplier."""
    places = x.shape[1] // channels
    for s in range(x.shape[0]):
        for c in range(channels):
            total = -places * zero
            for i in range(places):
                total += x[s, i * channels + c]
            code = twice(total, factor[0], factor[1], factor[2]) + ends[0]
            y[s, c] = min(max(code, ends[1]), ends[2])


@kernel
def multiply(
    a: Ints, b: Ints, y: Ints, zeros: Any, multiplier: int, shift: int, left: int, rule: int, ends: Any
) -> None:
    """y = zero_y + rescale((a − zero_a) · (b − zero_b)); b's values repeat along a's."""
    for s in range(a.shape[0]):
        for i in range(a.shape[1]):
            product = (np.int64(a[s, i]) - zeros[0]) * (np.int64(b[s % b.shape[0], i % b.shape[1]]) - zeros[1])
            code = rescale(int(product), multiplier, shift, left, rule) + ends[0]
            y[s, i] = min(max(code, ends[1]), ends[2])


@kernel
def average(
    x: Ints, y: Ints, size: Any, out: Any, taps: Any, strides: Any, pads: Any, counted: bool, zero: int,
    multiplier: int, shift: int, ends: Any,
) -> None:  # fmt: skip
    """y = zero_y + Σ (x − zero) · multiplier / (places · 2^shift), the quotient rounded once, half up."""
    for s in range(x.shape[0]):
        for at in range(out[0] * out[1] * out[2]):
            d, h, w = at // (out[1] * out[2]), at // out[2] % out[1], at % out[2]
            first_d, first_h, first_w = d * strides[0] - pads[0], h * strides[1] - pads[1], w * strides[2] - pads[2]
            begin_d, end_d = max(first_d, 0), min(first_d + taps[0], size[0])
            begin_h, end_h = max(first_h, 0), min(first_h + taps[1], size[1])
            begin_w, end_w = max(first_w, 0), min(first_w + taps[2], size[2])
            places = (end_d - begin_d) * (end_h - begin_h) * (end_w - begin_w)
            divisor = (taps[0] * taps[1] * taps[2] if counted else places) << shift
            for c in range(out[3]):
                total = -np.int64(places) * zero
                for i in range(begin_d, end_d):
                    for j in range(begin_h, end_h):
                        for k in range(begin_w, end_w):
                            total += x[s, ((i * size[1] + j) * size[2] + k) * size[3] + c]
                code = (2 * total * multiplier + divisor) // (2 * divisor) + ends[0]
                y[s, at * out[3] + c] = min(max(code, ends[1]), ends[2])


@kernel
def largest(x: Ints, y: Ints, size: Any, out: Any, taps: Any, strides: Any, pads: Any, dilations: Any) -> None:
    """y = the largest x of a window."""
    for s in range(x.shape[0]):
        for at in range(out[0] * out[1] * out[2]):
            d, h, w = at // (out[1] * out[2]), at // out[2] % out[1], at % out[2]
            for c in range(out[3]):
                most = -(1 << 15)
                for i in range(taps[0]):
                    for j in range(taps[1]):
                        for k in range(taps[2]):
                            from_d = d * strides[0] - pads[0] + i * dilations[0]
                            from_h = h * strides[1] - pads[1] + j * dilations[1]
                            from_w = w * strides[2] - pads[2] + k * dilations[2]
                            if 0 <= from_d < size[0] and 0 <= from_h < size[1] and 0 <= from_w < size[2]:
                                read = ((from_d * size[1] + from_h) * size[2] + from_w) * size[3] + c
                                most = max(most, int(x[s, read]))
                y[s, at * out[3] + c] = most


@kernel
def line(x: int, table: Ints) -> int:
    """The straight line between the two of 513 entries that x, of 16 bits, lies between; rounded half up."""
    at = x + (1 << 15)
    first = int(table[at >> 7])
    return first + (((int(table[(at >> 7) + 1]) - first) * (at & 127) + 64) >> 7)


@kernel
def interpolate(x: Ints, y: Ints, table: Ints) -> None:
    for s in range(x.shape[0]):
        for i in range(x.shape[1]):
            y[s, i] = line(int(x[s, i]), table)
