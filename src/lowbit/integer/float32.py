"""The rule `onnxruntime`: factors as float32 has them, and the fixed point in which the C multiplies with them."""

from dataclasses import replace
from typing import TypeGuard

import numpy as np

from lowbit.integer.bounds import sums
from lowbit.integer.program import Conv, Layer
from lowbit.integer.tensors import Ints, Rescale


def in_float32(layer: Layer) -> TypeGuard[Conv]:
    """Whether onnxruntime has an integer kernel for it that rescales sums of products in float32."""
    return isinstance(layer, Conv) and max(layer.input.bits, layer.output.bits) <= 8


def with_float32_factors(layer: Layer) -> Layer:
    """The layer with the factors that onnxruntime multiplies with, if the rule is for it.

    Of factors so small that the fixed point does not hold their 24 bits, the bits that it holds.
    """
    if not in_float32(layer):
        return layer
    weight, given, made = (
        np.asarray(s, np.float32) for s in (layer.weight_scale, layer.input.scale, layer.output.scale)
    )
    exact = replace(layer, rescale=Rescale.of((weight * given / made).astype(np.float64)))
    _, up = fixed_point(exact)
    multiplier, lost = exact.rescale.multiplier, np.clip(-up, 0, 31).astype(np.int32)
    return replace(exact, rescale=replace(exact.rescale, multiplier=multiplier >> lost << lost))


def fixed_point(layer: Conv) -> tuple[int, Ints]:
    """(bits behind the point, bits that each output's accumulator is shifted up): as many as 32 bits hold.

    More bits say of more products that they are no tie: there the C rounds once. Below 0: the multiplier has to give
    up bits.
    """
    lows, highs = sums(layer.weight, layer.bias, layer.input.ends, lifted=True)
    rescale = layer.rescale
    exponent = rescale.left - rescale.shift.astype(np.int64)
    largest = (np.maximum(highs, -lows) * rescale.multiplier * 2.0 ** (exponent - 31)).max()
    bits = min(29 - int(np.floor(np.log2(max(largest, 1)))), 24)
    return bits, np.where(rescale.multiplier > 0, bits + exponent, 0)
