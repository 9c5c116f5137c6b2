"""Certificates: the largest accumulator that these weights can reach with any input codes, layer by layer.

All partial sums lie between bias + the sum of all negative products and bias + the sum of all positive ones, in
whichever order they are added.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from lowbit.errors import UnsupportedError
from lowbit.integer.program import Conv, Layer, Program
from lowbit.integer.sequences import Product, Recurrent
from lowbit.integer.tensors import Ints, Rescale

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


def layer_bounds(layer: Layer) -> Iterator[tuple[Bound, Rescale]]:
    """A bound for each sum of products, and what its accumulators are multiplied with.

    Of a layer with a weight, of the two of a recurrent one, of two values.
    """
    if isinstance(layer, Conv):
        lifted = layer.input.bits <= 8
        yield _bound(layer.name, layer.weight, layer.bias, layer.input.ends, lifted), layer.rescale
    elif isinstance(layer, Recurrent):
        yield _bound(f"{layer.name} (input)", layer.weight, layer.bias, layer.input.ends), layer.rescale
        ends = layer.output.ends
        yield _bound(f"{layer.name} (state)", layer.recurrent, layer.bias_recurrent, ends), layer.again
    elif isinstance(layer, Product):
        reach = [max(abs(end - tensor.zero) for end in tensor.ends) for tensor in layer.inputs]
        total = layer.depth * reach[0] * reach[1]
        yield Bound(layer.name, -total, total, 0), layer.rescale


def _bound(name: str, weight: Ints, bias: Ints, ends: tuple[int, int], lifted: bool = False) -> Bound:
    lows, highs = sums(weight, bias, ends, lifted)
    return Bound(name, int(lows.min()), int(highs.max()), _pairs(weight.reshape(len(weight), -1).astype(np.int64)))


def sums(weight: Ints, bias: Ints, ends: tuple[int, int], lifted: bool = False) -> tuple[Ints, Ints]:
    """(lowest, highest) sum of each output, (outputs,). lifted: the C reads 8-bit codes as 0 and above."""
    rows = weight.reshape(len(weight), -1).astype(np.int64)
    low, high = ends
    lows, highs = [], []
    for lift in (0, -low) if lifted else (0,):
        moved = bias - lift * rows.sum(1)
        products = rows * (low + lift), rows * (high + lift)
        lows.append(moved + np.minimum(np.minimum(*products), 0).sum(1))
        highs.append(moved + np.maximum(np.maximum(*products), 0).sum(1))
    return np.min(lows, 0), np.max(highs, 0)


def _pairs(rows: Ints) -> int:
    """The largest sum of two neighbouring products with codes of 0 … 255."""
    padded = np.pad(rows, ((0, 0), (0, rows.shape[1] % 2)))
    pairs = padded.reshape(len(rows), -1, 2)
    positive, negative = np.maximum(pairs, 0).sum(2), np.minimum(pairs, 0).sum(2)
    return int(max(positive.max(initial=0), -negative.min(initial=0)) * 255)


def check_accumulators(program: Program) -> None:
    """UnsupportedError where an accumulator can leave its bits, also as it is shifted up before rescaling.

    It has 32 bits; beside 16-bit codes 47, which is what rescaling takes. Gates stay in 32 bits: a sum of theirs too.
    """
    for layer in program.layers:
        wide = any(t.bits > 8 for t in layer.inputs) and not isinstance(layer, Recurrent)
        for bound, rescale in layer_bounds(layer):
            reach, room = max(bound.highest, -bound.lowest) << rescale.left, 2**46 - 1 if wide else INT32
            if reach > room:
                raise UnsupportedError(
                    f"layer '{bound.layer}': its accumulator can reach {reach:,}, which does not fit in "
                    f"{room.bit_length() + 1} bits. Use fewer bits for its weights or activations."
                )
            if isinstance(layer, Recurrent) and reach * _largest(rescale) > 2**29:
                raise UnsupportedError(f"layer '{bound.layer}': its gates can reach beyond 2^29 steps of 2^-12.")


def _largest(rescale: Rescale) -> float:
    """The largest factor on an accumulator that was shifted up already."""
    return float((rescale.multiplier * 2.0 ** -(31.0 + rescale.shift)).max())
