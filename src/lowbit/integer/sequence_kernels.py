"""The loops of the layers in sequences.py, as its formulas say them; codes of the samples as in kernels.py."""

from typing import Any

import numpy as np

from lowbit.integer.kernels import Ints, line, once, rescale
from lowbit.machine_code import kernel


@kernel
def product(
    a: Ints, b: Ints, y: Ints, sizes: Any, zeros: Any, multiplier: int, shift: int, left: int, rule: int, ends: Any
) -> None:
    """sizes: leading axes in one, rows of a, of b, and how long they are."""
    count, rows, columns, depth = sizes
    for s in range(a.shape[0]):
        for n in range(count):
            for i in range(rows):
                for j in range(columns):
                    first, second = (n * rows + i) * depth, (n * columns + j) * depth
                    total = 0
                    for k in range(depth):
                        total += (np.int64(a[s, first + k]) - zeros[0]) * (np.int64(b[s, second + k]) - zeros[1])
                    code = rescale(total, multiplier, shift, left, rule) + ends[0]
                    y[s, (n * rows + i) * columns + j] = min(max(code, ends[1]), ends[2])


@kernel
def softmax(x: Ints, y: Ints, length: int, exponent: Any, factor: Any, halves: Any, ends: Any) -> None:
    """The reciprocal of the sum is taken once a row; powers are in steps of 2^−30."""
    powers = np.zeros(length, np.int64)
    for s in range(x.shape[0]):
        for row in range(0, x.shape[1], length):
            most = -(1 << 15)
            for i in range(length):
                most = max(most, int(x[s, row + i]))
            total = 0
            for i in range(length):
                u = ((most - int(x[s, row + i])) * exponent[0]) >> exponent[1]
                whole, part = u >> 16, u & 0xFFFF
                power = halves[4]
                for c in range(3, -1, -1):
                    power = ((power * part) >> 16) + halves[c]
                powers[i] = power >> min(whole, 31)
                total += powers[i]
            inverse = (1 << 60) // total
            for i in range(length):
                p = (powers[i] * inverse) >> 30
                code = ((p * factor[0] + (1 << (factor[1] - 1))) >> factor[1]) + ends[0]
                y[s, row + i] = min(max(code, ends[1]), ends[2])


@kernel
def root(value: int) -> int:
    """⌊√value⌋ for 2^60 ≤ value < 2^62, by Newton's method from above."""
    found = 1 << 31
    while True:
        lower = (found + value // found) >> 1
        if lower >= found:
            return found
        found = lower


@kernel
def normalize(x: Ints, y: Ints, weight: Ints, bias: Ints, shift: int, epsilon: int, ends: Any) -> None:
    """length² · variance is n Σ x² − (Σ x)², exact; it is shifted up by `up` bits, an even number, for its root."""
    length = len(weight)
    for s in range(x.shape[0]):
        for row in range(0, x.shape[1], length):
            total, squares = 0, 0
            for i in range(length):
                value = int(x[s, row + i])
                total += value
                squares += value * value
            spread = max(length * squares - total * total + epsilon, 1)
            up = 0
            while spread < 1 << 60:
                spread, up = spread << 2, up + 1
            inverse = (1 << 60) // root(spread)
            for i in range(length):
                v = ((length * np.int64(x[s, row + i]) - total) * inverse) >> (40 - up)
                code = ((((v * weight[i]) >> shift) + bias[i] + 128) >> 8) + ends[0]
                y[s, row + i] = min(max(code, ends[1]), ends[2])


@kernel
def tanh(t: int, table: Ints) -> int:
    """t is cut to 16 bits."""
    return line(min(max(t, -(1 << 15)), (1 << 15) - 1), table)


@kernel
def sigmoid(half: int, table: Ints) -> int:
    """Of twice the argument, in steps of 2^−15."""
    return (tanh(half, table) + (1 << 15) + 1) >> 1


@kernel
def gates(x: Ints, weight: Ints, bias: Ints, multiplier: Ints, shift: Ints, left: int, t: Ints) -> None:
    """t = rescale(bias + weight · x), a row for each gate of each hidden value."""
    for o in range(len(weight)):
        total = int(bias[o])
        for i in range(len(x)):
            total += int(weight[o, i]) * int(x[i])
        t[o] = once(total, multiplier[o], shift[o], left)


@kernel
def recurrent(
    x: Ints, h: Ints, c: Ints, y: Ints, kind: int, reverse: bool, weights: Any, biases: Any, multipliers: Any,
    shifts: Any, lefts: Any, table: Ints,
) -> None:  # fmt: skip
    """x (samples, steps, inputs), y (samples, steps, or one more with c, hidden); h and c (samples, hidden) change.

    kind   a place in KINDS
    """
    n, rows = h.shape[1], len(weights[1])
    given, own, reset = np.zeros(rows, np.int64), np.zeros(rows, np.int64), np.zeros(n, np.int64)
    first = 2 * n if kind == 2 else rows  # gates whose product is with h
    for s in range(x.shape[0]):
        for step in range(x.shape[1]):
            at = x.shape[1] - 1 - step if reverse else step
            gates(x[s, at], weights[0], biases[0], multipliers[0], shifts[0], lefts[0], given)
            gates(
                h[s], weights[1][:first], biases[1][:first], multipliers[1][:first], shifts[1][:first], lefts[1],
                own[:first],
            )  # fmt: skip
            if kind == 2:
                for i in range(n):
                    reset[i] = (sigmoid(given[n + i] + own[n + i], table) * int(h[s, i]) + (1 << 14)) >> 15
                gates(
                    reset, weights[1][first:], biases[1][first:], multipliers[1][first:], shifts[1][first:], lefts[1],
                    own[first:],
                )  # fmt: skip
            if kind == 0:
                lstm(given + own, h[s], c[s], table)
            elif kind == 3:
                for i in range(n):
                    h[s, i] = tanh(given[i] + own[i], table)
            else:
                gru(given, own, h[s], kind == 1, table)
            y[s, at] = h[s]
        if kind == 0:
            y[s, x.shape[1]] = c[s]


@kernel
def lstm(t: Ints, h: Ints, c: Ints, table: Ints) -> None:
    n = len(h)
    for i in range(n):
        write, out, keep = sigmoid(t[i], table), sigmoid(t[n + i], table), sigmoid(t[2 * n + i], table)
        cell = (keep * int(c[i]) + ((write * tanh(t[3 * n + i], table)) >> 4) + (1 << 14)) >> 15
        c[i] = min(max(cell, -(1 << 15)), (1 << 15) - 1)
        h[i] = (out * tanh(2 * int(c[i]), table) + (1 << 14)) >> 15


@kernel
def gru(given: Ints, own: Ints, h: Ints, resets: bool, table: Ints) -> None:
    """resets: the candidate's product is multiplied here; else what it is the product of was."""
    n = len(h)
    for i in range(n):
        keep, product = sigmoid(given[i] + own[i], table), own[2 * n + i]
        if resets:
            product = (sigmoid(given[n + i] + own[n + i], table) * product + (1 << 14)) >> 15
        new = tanh(given[2 * n + i] + product, table)
        h[i] = (keep * int(h[i]) + ((1 << 15) - keep) * new + (1 << 14)) >> 15
