"""Certificates: the largest accumulator that these weights can reach with any input codes, layer by layer.

All partial sums lie between bias + the sum of all negative products and bias + the sum of all positive ones, in
whichever order they are added.
"""

from dataclasses import dataclass

import numpy as np

from lowbit.errors import UnsupportedError
from lowbit.integer.program import Conv, Ints, Program

INT32 = 2**31 - 1


@dataclass(frozen=True)
class Bound:
    """What one layer's accumulators can reach.

    lowest, highest   over all outputs and all orders of summation
    bits              of the smallest signed integer that holds both
    pairs             highest |a·w + b·v| of two products of unsigned 8-bit codes that x86 adds in 16 bits (AVX2's
                      u8·s8 kernels take neighbours along the sum); above 32,767 they can saturate
    """

    layer: str
    lowest: int
    highest: int
    pairs: int

    @property
    def bits(self) -> int:
        return max(int(self.highest).bit_length(), int(-self.lowest - 1).bit_length()) + 1

    @property
    def saturates(self) -> bool:
        """Whether a 16-bit sum of two products can saturate."""
        return self.pairs > 2**15 - 1


def bounds_of(program: Program) -> list[Bound]:
    """A bound for each layer that multiplies with a weight."""
    return [_bound(layer) for layer in program.layers if isinstance(layer, Conv)]


def _bound(layer: Conv) -> Bound:
    rows = layer.weight.reshape(len(layer.weight), -1).astype(np.int64)
    low, high = layer.input.ends
    ends = []
    for lift in (0, -low):  # codes as they are, and as the C lifts them to 0 and above
        bias = layer.bias - lift * rows.sum(1)
        products = rows * (low + lift), rows * (high + lift)
        ends.append(bias + np.minimum(np.minimum(*products), 0).sum(1))
        ends.append(bias + np.maximum(np.maximum(*products), 0).sum(1))
    return Bound(layer.name, int(np.min(ends)), int(np.max(ends)), _pairs(rows))


def _pairs(rows: Ints) -> int:
    """The largest sum of two neighbouring products with codes of 0 … 255."""
    padded = np.pad(rows, ((0, 0), (0, rows.shape[1] % 2)))
    pairs = padded.reshape(len(rows), -1, 2)
    positive, negative = np.maximum(pairs, 0).sum(2), np.minimum(pairs, 0).sum(2)
    return int(max(positive.max(initial=0), -negative.min(initial=0)) * 255)


def check_accumulators(program: Program) -> None:
    """UnsupportedError where an accumulator can leave 32 bits, also as it is shifted up before rescaling."""
    layers = {layer.name: layer for layer in program.layers if isinstance(layer, Conv)}
    for bound in bounds_of(program):
        left = layers[bound.layer].rescale.left
        reach = max(bound.highest, -bound.lowest) << left
        if reach > INT32:
            raise UnsupportedError(
                f"layer '{bound.layer}': its accumulator can reach {reach:,}, which does not fit in 32 bits. Use fewer "
                "bits for its weights or activations."
            )
