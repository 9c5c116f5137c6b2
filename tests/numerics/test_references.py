"""Formats of several levels against references written from the papers' text, one element at a time."""

import math

import pytest
import torch

from lowbit.numerics import quantize
from lowbit.numerics.formats import (
    MXFP4,
    MXFP6_E2M3,
    MXFP6_E3M2,
    MXFP8_E4M3,
    MXFP8_E5M2,
    MXINT8,
    NVFP4,
    VSQ4,
)


def data(*shape: int) -> torch.Tensor:
    """Values over many magnitudes, as real blocks have; with zeros and a block of zeros."""
    g = torch.Generator().manual_seed(1)
    x = torch.randn(shape, generator=g) * torch.exp(3 * torch.randn(shape[0], 1, generator=g))
    x[torch.rand(shape, generator=g) < 0.1] = 0
    x[3] = 0
    return x


def round_half_even(x: float) -> int:
    lower = math.floor(x)
    rest = x - lower
    return lower + (rest > 0.5 or (rest == 0.5 and lower % 2 == 1))


def to_float_element(x: float, mantissa_bits: int, smallest_exponent: int, largest: float) -> float:
    """Nearest value of a small float, ties to even mantissa, saturating."""
    if x == 0:
        return 0.0
    exponent = max(math.floor(math.log2(abs(x))), smallest_exponent)
    step = 2.0 ** (exponent - mantissa_bits)
    return math.copysign(min(round_half_even(abs(x) / step) * step, largest), x)


# Element formats of OCP MX 1.0, table 5: mantissa bits, smallest exponent, largest value, largest exponent.
ELEMENTS = {
    "mxfp8_e4m3": (MXFP8_E4M3, 3, -6, 448.0, 8),
    "mxfp8_e5m2": (MXFP8_E5M2, 2, -14, 57344.0, 15),
    "mxfp6_e3m2": (MXFP6_E3M2, 2, -2, 28.0, 4),
    "mxfp6_e2m3": (MXFP6_E2M3, 3, 0, 7.5, 2),
    "mxfp4": (MXFP4, 1, 0, 6.0, 2),
}


@pytest.mark.parametrize("name", ELEMENTS)
def test_ocp_mx(name):
    """Section 6.3: the shared scale is the largest power of two in the block over that of the element format."""
    mx, mantissa, smallest, largest, emax = ELEMENTS[name]
    x = data(12, 64)
    expected = torch.zeros_like(x)
    for row in range(x.shape[0]):
        for start in range(0, 64, 32):
            block = [float(v) for v in x[row, start : start + 32]]
            top = max(abs(v) for v in block)
            scale = 2.0 ** (math.floor(math.log2(top)) - emax) if top else 1.0
            for i, v in enumerate(block):
                expected[row, start + i] = to_float_element(v / scale, mantissa, smallest, largest) * scale
    assert torch.equal(quantize(x, mx).dequantize(), expected)


def test_mxint8():
    """Elements are two's complement with 6 fractional bits; the largest exponent is 0. -128 is not used."""
    x = data(12, 64)
    expected = torch.zeros_like(x)
    for row in range(x.shape[0]):
        for start in range(0, 64, 32):
            block = [float(v) for v in x[row, start : start + 32]]
            top = max(abs(v) for v in block)
            scale = 2.0 ** math.floor(math.log2(top)) if top else 1.0
            for i, v in enumerate(block):
                code = max(-127, min(127, round_half_even(v / scale * 64)))
                expected[row, start + i] = code / 64 * scale
    assert torch.equal(quantize(x, MXINT8).dequantize(), expected)


@pytest.mark.parametrize(("format", "mantissa"), [("mx4", 2), ("mx6", 4), ("mx9", 7)])
def test_shared_micro_exponents(format, mantissa):
    """Darvish Rouhani et al. 2023: 16 elements share the exponent of their largest; pairs share one bit that
    shifts them by one where the pair's own largest allows it; sign and m bits of magnitude remain."""
    x = data(12, 64)
    expected = torch.zeros_like(x)
    for row in range(x.shape[0]):
        for start in range(0, 64, 16):
            block = [float(v) for v in x[row, start : start + 16]]
            top = max(abs(v) for v in block)
            if top == 0:
                continue
            shared = math.floor(math.log2(top))
            for pair in range(0, 16, 2):
                largest = max(abs(block[pair]), abs(block[pair + 1]))
                shift = 0 if largest and math.floor(math.log2(largest)) >= shared else 1
                step = 2.0 ** (shared - shift - (mantissa - 1))
                for i in (pair, pair + 1):
                    magnitude = min(round_half_even(abs(block[i]) / step), 2**mantissa - 1)
                    expected[row, start + i] = math.copysign(magnitude * step, block[i])
    assert torch.equal(quantize(x, format).dequantize(), expected)


def test_vs_quant():
    """Dai et al. 2021 (arXiv 2102.04503): one scale per 16 elements, amax / 7; a channel's scales in 4-bit integers."""
    x = data(12, 64)
    expected = torch.zeros_like(x)
    for row in range(x.shape[0]):
        vectors = [[float(v) for v in x[row, start : start + 16]] for start in range(0, 64, 16)]
        scales = [max(abs(v) for v in vector) / 7 for vector in vectors]
        coarse = max(scales) / 15
        for k, vector in enumerate(vectors):
            scale = round_half_even(scales[k] / coarse) * coarse if coarse else 0.0
            for i, v in enumerate(vector):
                code = max(-7, min(7, round_half_even(v / scale))) if scale else 0
                expected[row, 16 * k + i] = code * scale
    assert torch.allclose(quantize(x, VSQ4).dequantize(), expected, rtol=1e-6)


def test_nvfp4():
    """E2M1 elements, one E4M3 scale per 16, one float32 scale per tensor so that the largest block scale is 448."""
    x = data(12, 64)
    whole = float(x.abs().max()) / (6 * 448)
    expected = torch.zeros_like(x)
    for row in range(x.shape[0]):
        for start in range(0, 64, 16):
            block = [float(v) for v in x[row, start : start + 16]]
            top = max(abs(v) for v in block)
            scale = to_float_element(top / 6 / whole, 3, -6, 448.0) * whole
            for i, v in enumerate(block):
                expected[row, start + i] = to_float_element(v / scale, 1, 0, 6.0) * scale if scale else 0.0
    assert torch.allclose(quantize(x, NVFP4).dequantize(), expected, rtol=1e-6)
