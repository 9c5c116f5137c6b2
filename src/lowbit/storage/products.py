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
    """The bits of a float32 that makes `product` of `numbers`, to the bit; None if there is none.

    The quotient of the largest elements is within two units in the last place of every factor that can be.
    """
    if not np.isfinite(product).all() or not np.isfinite(numbers).all():
        return None
    at = int(np.abs(numbers).argmax())
    if numbers[at] == 0 or product[at] == 0:
        return None
    with np.errstate(all="ignore"):
        quotient = np.float32(np.float64(product[at]) / np.float64(numbers[at]))
        if (
            not np.isfinite(quotient)
            or np.abs(numbers.astype(np.float64) * quotient - product).max()
            > 1e-5 * np.abs(product.astype(np.float64)).max()
        ):
            return None
    bits = int(quotient.view(np.uint32))
    wanted = product.view(np.uint32)
    for step in (0, 1, -1, 2, -2):
        if 0 <= bits + step < 1 << 32 and np.array_equal(multiplied(numbers, bits + step).view(np.uint32), wanted):
            return bits + step
    return None
