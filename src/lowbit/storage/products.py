"""Vectors that are another vector times a number: the scales of a quantized layer's bias are those of its weight times
the scale of its input, to the bit, and need not be stored twice."""

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]


def multiplied(numbers: Floats, factor: int) -> Floats:
    """Each number times the float32 of the bits `factor`, rounded to the nearest float32, ties to even."""
    with np.errstate(all="ignore"):
        return numbers * np.uint32(factor).view(np.float32)


def factor_between(product: Floats, numbers: Floats) -> int | None:
    """The bits of a float32 that makes `product` of `numbers`, to the bit; None if there is none but 0.

    The quotient of the largest elements is within two units in the last place of every factor that can be.
    """
    at = int(np.abs(numbers).argmax())
    with np.errstate(all="ignore"):
        quotient = np.float32(np.float64(product[at]) / np.float64(numbers[at]))
        if not quotient or not np.allclose(numbers * quotient, product, rtol=1e-5, atol=0):
            return None
    for step in (0, 1, -1, 2, -2):
        bits = int(quotient.view(np.uint32)) + step
        if bits > 0 and np.array_equal(multiplied(numbers, bits).view(np.uint32), product.view(np.uint32)):
            return bits
    return None
