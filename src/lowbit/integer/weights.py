"""Weights as they lie in flash: rows for the loops of kernels.c, two a byte where a layer's fit in 4 bits."""

import numpy as np

from lowbit.integer.program import Conv, Ints


def row_of(layer: Conv) -> int:
    """Codes of a row as it lies, with the zeros at its end. Where codes are packed, each half is a loop's length."""
    products = int(layer.weight[0].size)
    return 2 * _filled(-(-products // 2)) if layer.packed else _filled(products)


def _filled(codes: int) -> int:
    """With zeros up to a whole vector of 32 where that adds at most 5/8.

    A rest takes a loop of its own: the 40 products of kws took 28 µs, as 48 they took 42, as 64 they take 13.
    """
    whole = -(-codes // 32) * 32
    return whole if 8 * whole <= 13 * codes else codes


def stored(layer: Conv) -> Ints:
    """The weights as the C holds them.

    depthwise   (taps, channels); packed: (bytes,), of two neighbours the first in the low 4 bits
    others      (outputs, row_of); packed: (outputs, row_of / 2), code i in the low bits of byte i, and code
                i + row_of / 2 in its high bits, so that both halves are read in order
    packed codes are 8 higher, 0 … 15
    """
    rows = layer.weight.reshape(len(layer.weight), -1)
    if layer.depthwise:
        taps = np.ascontiguousarray(rows.T)
        if not layer.packed:
            return taps
        flat = np.pad(taps.reshape(-1), (0, taps.size % 2))
        return _two(flat[::2], flat[1::2])
    wide = np.pad(rows, ((0, 0), (0, row_of(layer) - rows.shape[1])))
    return _two(*np.split(wide, 2, axis=1)) if layer.packed else wide


def _two(low: Ints, high: Ints) -> Ints:
    return np.asarray((low.astype(np.int16) + 8 + 16 * (high.astype(np.int16) + 8)).astype(np.uint8))
