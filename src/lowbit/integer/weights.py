"""Weights as they lie in flash, for the loops of kernels.c and channels.c; two a byte where they fit in 4 bits."""

import numpy as np

from lowbit.integer.program import Conv
from lowbit.integer.tensors import Ints, spatial

BLOCK = 64  # accumulators on the stack
TOGETHER = 8  # positions that share each weight that was read
LANES = 16  # outputs that are computed together where rows are short
SHORT = 32  # products of a short row
REACH = 512  # codes of a line that TOGETHER positions of a short row read


def in_lanes(layer: Conv) -> bool:
    """Whether outputs, not the products of one output, are what a vector register holds.

    A row of 32 products or less is too short for a loop of its own: 48 x 48 positions from 8 to 16 channels took
    165 µs by rows, 9 µs so. Positions at borders are computed one by one, so that lines with borders have to be long.
    """
    short = layer.weight[0].size <= SHORT and layer.dilations[2] == 1 and len(layer.weight) >= LANES // 2
    plain = layer.groups == 1 and layer.input.bits <= 8 and not layer.packed
    single = layer.weight.shape[1:4] == (1, 1, 1) and layer.pads == (0, 0, 0)
    *lines, line, _ = spatial(layer.output)
    if single and layer.strides == (1, 1, 1):
        line *= int(np.prod(lines))
    near = ((TOGETHER - 1) * layer.strides[2] + layer.weight.shape[3]) * layer.weight.shape[4] <= REACH
    return short and plain and near and line >= (TOGETHER if single else 4 * TOGETHER)


def neighbours(layer: Conv) -> int:
    """Positions of a depthwise layer that are computed together, as if they were channels: they lie beside each other.

    Loops of 64 are what gcc and clang turn into vector instructions: 48 x 48 positions of 8 channels took 153 µs one
    by one.
    """
    return max(1, BLOCK // len(layer.weight)) if layer.depthwise and not layer.packed else 1


def per_output(layer: Conv, array: Ints) -> Ints:
    """Biases, multipliers or shifts as the C holds them: what it computes together has them beside each other."""
    if in_lanes(layer):
        blocks = np.pad(array, (0, -len(array) % LANES), mode="edge").reshape(-1, 1, LANES)
        return np.broadcast_to(blocks, (len(blocks), BLOCK // LANES, LANES)).reshape(-1)
    return np.tile(array, neighbours(layer))


def row_of(layer: Conv) -> int:
    """Codes of a row as it lies, with the zeros at its end. Where codes are packed, each half is a loop's length."""
    products = int(layer.weight[0].size)
    if layer.depthwise:
        return len(layer.weight) * neighbours(layer)
    if in_lanes(layer):
        return products
    return 2 * _filled(-(-products // 2)) if layer.packed else _filled(products)


def _filled(codes: int) -> int:
    """With zeros up to a whole vector of 32 where that adds at most 5/8.

    A rest takes a loop of its own: the 40 products of kws took 28 µs, as 48 they took 42, as 64 they take 13.
    """
    whole = -(-codes // 32) * 32
    return whole if 8 * whole <= 13 * codes else codes


def stored(layer: Conv) -> Ints:
    """The weights as the C holds them.

    depthwise   (taps, row_of); packed: (bytes,), of two neighbours the first in the low 4 bits
    in_lanes    (blocks of 16 outputs, row_of, 16)
    others      (outputs, row_of); packed: (outputs, row_of / 2), code i in the low bits of byte i, and code
                i + row_of / 2 in its high bits, so that both halves are read in order
    packed codes are 8 higher, 0 … 15
    """
    rows = layer.rows
    if layer.depthwise:
        taps = np.tile(rows.T, neighbours(layer))
        if not layer.packed:
            return taps
        flat = np.pad(taps.reshape(-1), (0, taps.size % 2))
        return _two(flat[::2], flat[1::2])
    if in_lanes(layer):
        filled = np.pad(rows, ((0, -len(rows) % LANES), (0, 0)))
        return np.ascontiguousarray(filled.reshape(-1, LANES, rows.shape[1]).swapaxes(1, 2))
    wide = np.pad(rows, ((0, 0), (0, row_of(layer) - rows.shape[1])))
    return _two(*np.split(wide, 2, axis=1)) if layer.packed else wide


def _two(low: Ints, high: Ints) -> Ints:
    return np.asarray((low.astype(np.int16) + 8 + 16 * (high.astype(np.int16) + 8)).astype(np.uint8))
