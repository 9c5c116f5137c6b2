"""Every grid is its table of values; the values are those of the standards."""

import ml_dtypes
import numpy as np
import pytest
import torch

from lowbit.errors import InputError
from lowbit.numerics import AdditivePow2, Codebook, Float, Int, Pow2, SignedPow2, quantize
from lowbit.numerics.formats import Format
from lowbit.numerics.grids import BFLOAT16, E2M1, E2M3, E3M2, E3M4, E4M3, E5M2, E8M0, FLOAT16

STANDARD = {
    "float8_e4m3fn": E4M3,
    "float8_e5m2": E5M2,
    "float8_e3m4": E3M4,
    "float8_e4m3": Float(4, 3, "ieee"),
    "float8_e4m3fnuz": Float(4, 3, "fnuz"),
    "float8_e5m2fnuz": Float(5, 2, "fnuz"),
    "float6_e2m3fn": E2M3,
    "float6_e3m2fn": E3M2,
    "float4_e2m1fn": E2M1,
}
WIDE = {"float16": (FLOAT16, np.float16), "bfloat16": (BFLOAT16, ml_dtypes.bfloat16)}


def standard_values(dtype: type, bits: int) -> np.ndarray:
    codes = np.arange(1 << bits, dtype=np.uint8 if bits <= 8 else np.uint16)
    with np.errstate(invalid="ignore"):
        values = codes.view(dtype).astype(np.float64)
    return np.unique(values[np.isfinite(values)] + 0.0)


@pytest.mark.parametrize("name", STANDARD)
def test_small_floats_have_the_values_of_ml_dtypes(name):
    grid = STANDARD[name]
    assert np.array_equal(grid.values(), standard_values(getattr(ml_dtypes, name), grid.bits))


@pytest.mark.parametrize("name", WIDE)
def test_half_precision_floats_have_the_values_of_numpy(name):
    grid, dtype = WIDE[name]
    assert np.array_equal(grid.values(), standard_values(dtype, 16))


@pytest.mark.parametrize("name", STANDARD)
def test_bit_patterns_are_those_of_ml_dtypes(name):
    grid, dtype = STANDARD[name], getattr(ml_dtypes, name)
    values = grid.values().astype(np.float32)
    bits = quantize(values, Format(grid, None)).to_bits()
    assert bits.dtype == np.uint8
    assert np.array_equal(bits.view(dtype).astype(np.float32), values)


def test_bit_patterns_of_other_grids():
    torch_bits = quantize(torch.tensor([1.0, -448.0]), Format(E4M3, None)).to_bits()
    assert torch_bits.view(torch.float8_e4m3fn).float().tolist() == [1, -448]
    halves = quantize(np.float32([1.5, -2.0]), Format(BFLOAT16, None)).to_bits()
    assert halves.dtype == np.uint16
    assert halves.view(ml_dtypes.bfloat16).astype(np.float32).tolist() == [1.5, -2]
    assert quantize(np.float32([-1, 7, -8]), Format(Int(4), None)).to_bits().tolist() == [0b1111, 0b0111, 0b1000]
    scales = quantize(np.float32([1, 0.5]), Format(E8M0, None)).to_bits()
    assert scales.view(ml_dtypes.float8_e8m0fnu).astype(np.float32).tolist() == [1, 0.5]


def test_e8m0_has_the_values_of_ml_dtypes():
    codes = np.arange(255, dtype=np.uint8)  # 255 is NaN
    assert np.array_equal(E8M0.values(), codes.view(ml_dtypes.float8_e8m0fnu).astype(np.float64))


@pytest.mark.parametrize("name", STANDARD)
def test_rounding_agrees_with_ml_dtypes_on_every_value_every_tie_and_their_neighbours(name):
    grid, dtype = STANDARD[name], getattr(ml_dtypes, name)
    values = grid.values()
    ties = (values[1:] + values[:-1]) / 2
    points = np.concatenate([values, ties]).astype(np.float32)
    points = np.concatenate(
        [points, np.nextafter(points, np.float32(np.inf)), np.nextafter(points, np.float32(-np.inf))]
    )
    points = points[np.abs(points) <= values[-1]]  # beyond the ends we clip, where ml_dtypes may give infinity or NaN
    expected = points.astype(dtype).astype(np.float32)
    got = quantize(points, Format(grid, None)).dequantize()
    assert np.array_equal(got, expected)


@pytest.mark.parametrize("name", WIDE)
def test_rounding_to_half_precision_agrees_with_numpy(name):
    grid, dtype = WIDE[name]
    values = grid.values()
    ties = ((values[1:] + values[:-1]) / 2).astype(np.float32)
    points = np.concatenate([values.astype(np.float32), ties, np.nextafter(ties, np.float32(0))])
    got = quantize(points, Format(grid, None)).dequantize()
    assert np.array_equal(got, points.astype(dtype).astype(np.float32))


def test_e2m1_has_these_fifteen_values():
    assert Float(2, 1).values().tolist() == [-6, -4, -3, -2, -1.5, -1, -0.5, 0, 0.5, 1, 1.5, 2, 3, 4, 6]


def test_the_largest_values_are_those_of_the_ocp_specification():
    largest = [grid.values()[-1] for grid in (E4M3, E5M2, E3M2, E2M3, E2M1)]
    assert largest == [448, 57344, 28, 7.5, 6]


@pytest.mark.parametrize(("bits", "signed", "ends"), [(1, True, (-1, 0)), (1, False, (0, 1)), (8, True, (-128, 127))])
def test_integers_reach_from_minimum_to_maximum(bits, signed, ends):
    grid = Int(bits, signed)
    assert (grid.minimum, grid.maximum) == ends
    assert grid.values().tolist() == list(range(ends[0], ends[1] + 1))


def test_narrow_leaves_out_the_lowest_integer():
    assert (Int(4).minimum, Int(4, narrow=True).minimum, Int(4).maximum) == (-8, -7, 7)


def test_logarithmic_grid_of_3_bits():
    assert SignedPow2(3).values().tolist() == [-1, -0.5, -0.25, 0, 0.25, 0.5, 1]


def test_powers_of_two_upwards_from_the_lowest():
    assert Pow2(2, -1).values().tolist() == [0.5, 1, 2, 4]


def test_apot_of_5_bits_is_two_terms_of_two_bits():
    # {0, 1, 1/4, 1/16} + {0, 1/2, 1/8, 1/32}, scaled by 2/3
    sums = sorted({(a + b) / 1.5 for a in (0, 1, 1 / 4, 1 / 16) for b in (0, 1 / 2, 1 / 8, 1 / 32)})
    values = AdditivePow2(5).values()
    assert np.allclose(values[values >= 0], sums)
    assert len(values) == 31


def test_apot_of_4_bits_has_one_term_of_one_bit():
    # {0, 1/2, 1/4, 1/16} + {0, 1/8}: the authors' levels for 3 bits beside the sign
    sums = sorted({(a + b) / 0.625 for a in (0, 1 / 2, 1 / 4, 1 / 16) for b in (0, 1 / 8)})
    values = AdditivePow2(4).values()
    assert np.allclose(values[values >= 0], sums)


@pytest.mark.parametrize(
    "make",
    [
        lambda: Int(0),
        lambda: Int(17),
        lambda: Int(1, narrow=True),
        lambda: Int(4, signed=False, narrow=True),
        lambda: Float(9, 2),
        lambda: Float(4, 3, "ocp"),
        lambda: Pow2(8, 0),
        lambda: SignedPow2(1),
        lambda: Codebook((1.0, 0.0)),
        lambda: Codebook((0.0, float("nan"))),
    ],
)
def test_impossible_grids_are_refused(make):
    with pytest.raises(InputError):
        make()


def test_ties_of_integers_go_to_even():
    x = torch.tensor([-2.5, -1.5, -0.5, 0.5, 1.5, 2.5])
    assert quantize(x, Format(Int(8), None)).codes.tolist() == [-2, -2, 0, 0, 2, 2]
