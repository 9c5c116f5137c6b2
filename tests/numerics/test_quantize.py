"""Quantizing: properties that hold for every format, and what happens at the edges."""

import hypothesis.extra.numpy as hnp
import hypothesis.strategies as st
import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import given, settings

from lowbit.errors import DataError, InputError, ShapeError
from lowbit.numerics import (
    ELEMENT,
    FORMATS,
    TENSOR,
    Fitted,
    Format,
    Int,
    QuantTensor,
    channel,
    encode_rows,
    fake_quantize_rows,
    group,
    quantize,
    scale_and_zero,
    to_rows,
)
from lowbit.numerics.formats import FIXED8, INT4, INT8, NVFP4, UINT8, VSQ4
from lowbit.numerics.grids import E2M1, E4M3, Pow2, is_whole
from lowbit.ranges import error

every_format = pytest.mark.parametrize("format", FORMATS.values(), ids=FORMATS)
# float32 numbers of every size that a network holds, zeros included
arrays = hnp.arrays(
    np.float32,
    hnp.array_shapes(max_dims=3, max_side=20),
    elements=st.floats(-1e6, 1e6, width=32) | st.sampled_from([0.0, 1e-30, -1e-30, 1.0]),
)


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@every_format
@settings(max_examples=25)
@given(arrays)
def test_what_is_stored_is_finite_and_of_the_same_shape(format, x):
    stored = quantize(x, format)
    back = stored.dequantize()
    assert back.shape == x.shape
    assert back.dtype == x.dtype
    assert np.isfinite(back).all()


@every_format
@settings(max_examples=25)
@given(arrays)
def test_a_stored_tensor_encodes_to_itself(format, x):
    """Under its own scales a dequantized tensor changes nothing more."""
    stored = quantize(torch.from_numpy(x), format)
    rows = to_rows(stored.dequantize(), format.block or ELEMENT)
    scale, zero = (v.reshape(-1, 1) for v in (stored.scale_values(), stored.zero_values()))
    codes = encode_rows(rows, scale, zero, format.grid, table=stored.table)
    again = QuantTensor(codes, Format(format.grid, group(rows.shape[1])), (1, rows.shape[1]), scale, None, stored.table)
    expected = rows + zero * scale  # `again` has no zero
    assert torch.allclose(again.dequantize(), expected, rtol=1e-5, atol=1e-6 * float(np.abs(x).max()) + 1e-30)


LOSSY_SCALES = {"vsq4", "vsq8", "nvfp4"}  # their second scale is rounded to nearest: a new range gives a new scale
REFITTED = {name for name, kind in FORMATS.items() if isinstance(kind.grid, Fitted)}


@pytest.mark.parametrize("name", sorted(set(FORMATS) - LOSSY_SCALES - REFITTED))
def test_quantizing_twice_changes_nothing(name):
    once = quantize(normal(64, 96), FORMATS[name])
    again = quantize(once.dequantize(), FORMATS[name])
    assert torch.allclose(again.dequantize(), once.dequantize(), rtol=1e-6, atol=0)


@pytest.mark.parametrize("name", sorted(REFITTED - {"bases4", "bases3", "pwlq4"}))
def test_refitting_a_codebook_changes_nothing(name):
    once = quantize(normal(64, 96), FORMATS[name])
    assert torch.allclose(quantize(once.dequantize(), FORMATS[name]).dequantize(), once.dequantize(), rtol=1e-6)


@pytest.mark.parametrize("rounding", ["nearest", "up", "down", "toward_zero"])
@every_format
def test_rounding_is_monotone(format, rounding):
    x = normal(2000).sort().values
    plain = Format(E2M1 if isinstance(format.grid, Fitted) else format.grid, format.block and TENSOR)
    y = quantize(x, plain, rounding=rounding).dequantize()
    assert (y.diff() >= 0).all()


@settings(max_examples=50)
@given(arrays, st.integers(2, 16), st.booleans())
def test_the_error_inside_the_range_is_at_most_half_a_step(x, bits, affine):
    stored = quantize(x, Format(Int(bits, signed=not affine), zero_point=affine))
    step = float(stored.scale_values().reshape(-1)[0])
    # An affine range moves by up to half a step when its zero is rounded; the ends then clip by that much.
    limit = step * (1.0 if affine else 0.5) * (1 + 1e-5) + 1e-6 * np.abs(x).max()
    assert np.abs(stored.dequantize() - x).max() <= limit


@pytest.mark.parametrize("rounding", ["up", "down", "toward_zero"])
@pytest.mark.parametrize("grid", [Int(4), E2M1], ids=repr)
def test_directed_roundings_go_their_way(grid, rounding):
    x = normal(1000)
    y = quantize(x, Format(grid), (-10.0, 10.0), rounding).dequantize()
    ways = {"up": y >= x, "down": y <= x, "toward_zero": y.abs() <= x.abs()}
    inside = x.abs() < 9
    assert ways[rounding][inside].all()


def test_an_affine_range_holds_zero_exactly():
    scale, zero = scale_and_zero(torch.tensor([[2.0]]), torch.tensor([[6.0]]), UINT8)
    assert (float(scale), float(zero)) == (pytest.approx(6 / 255), 0.0)
    x = torch.tensor([-3.0, 0.0, 5.0])
    assert quantize(x, UINT8).dequantize()[1] == 0


def test_the_step_of_a_symmetric_range_of_64_in_4_bits():
    scale, _ = scale_and_zero(torch.tensor([[-32.0]]), torch.tensor([[32.0]]), Format(Int(4), zero_point=True))
    assert round(float(scale), 2) == 4.27  # 64 / 15


def test_reach_absorbs_the_three_conventions_of_int8():
    x = torch.tensor([-1.0, 1.0])
    scales = [float(quantize(x, Format(Int(8), reach=reach)).scale_values()) for reach in (None, 127.5, 128.0)]
    assert scales == pytest.approx([1 / 127, 1 / 127.5, 1 / 128])


def test_a_power_of_two_scale_clips_nothing():
    stored = quantize(normal(1000), FIXED8)
    scale = float(stored.scale_values())
    assert np.log2(scale).is_integer()
    assert error(normal(1000), FIXED8).clipped == 0


def test_codes_of_integers_are_the_integers():
    stored = quantize(torch.tensor([-1.0, 0.5, 1.0]), Format(Int(8, narrow=True)))
    assert stored.codes.dtype == torch.int8
    assert stored.codes.tolist() == [-127, 64, 127]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_any_torch_dtype_comes_back_as_it_was(dtype):
    assert quantize(normal(8, 8).to(dtype), "int8").dequantize().dtype == dtype


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64, ml_dtypes.bfloat16])
def test_any_numpy_dtype_comes_back_as_it_was(dtype):
    stored = quantize(normal(8, 8).numpy().astype(dtype), "nvfp4")
    assert isinstance(stored.codes, np.ndarray)
    assert stored.dequantize().dtype == dtype


def test_numpy_and_torch_give_the_same_codes():
    x = normal(30, 50)
    for kind in FORMATS.values():
        assert np.array_equal(quantize(x.numpy(), kind).codes, quantize(x, kind).codes.numpy())


def test_memory_that_is_not_contiguous_changes_nothing():
    x = normal(40, 60)
    assert torch.equal(quantize(x.t(), "int4 group:7").codes, quantize(x.t().contiguous(), "int4 group:7").codes)
    assert np.array_equal(
        quantize(x.numpy()[::-1, ::2], "nf4").codes, quantize(x.numpy()[::-1, ::2].copy(), "nf4").codes
    )


@every_format
def test_zeros_stay_zeros(format):
    found = quantize(torch.zeros(8, 40), format).dequantize().abs()
    if is_whole(format.grid) and not isinstance(format.grid, Int):  # lloyd2 and others have no 0: ±38 at least
        assert (found <= 38 * torch.finfo(torch.float32).tiny).all()
    else:
        assert (found < 1e-37).all()


@every_format
def test_a_tile_of_zeros_leaves_its_neighbours_alone(format):
    x = normal(32, 64)
    expected = quantize(x[1:], format).dequantize()
    x[0] = 0
    if format.block in (TENSOR, None):
        return
    assert torch.equal(quantize(x, format).dequantize()[1:], expected)


@every_format
@pytest.mark.parametrize("value", [3.0, -3.0, 1e-3, 1e-30, -1e30])
def test_a_constant_tensor_is_stored_nearly_exactly(format, value):
    if format.block is None or (format.grid.bits == 1 and format.zero_point is False and value < 0):
        pytest.skip("without a scale the grid must reach the value")
    x = torch.full((4, 32), value)
    back = quantize(x, format).dequantize()
    # Power-of-two scales miss a constant by up to their rounding; all else lands on it.
    coarse = format.scale is not None
    assert torch.allclose(back, x, rtol=0.5 if coarse else 1e-5, atol=1e-37 if coarse else 0.0)


@every_format
@pytest.mark.parametrize("ends", [(1, 1), (-1, -1), (1, -1), (1, 0)])
def test_the_largest_floats_come_back_finite(format, ends):  # int8 gave 127 · (3.4e38 / 127) = infinity
    x = torch.tensor(ends * 16) * torch.finfo(torch.float32).max
    back = quantize(x, format).dequantize()
    assert torch.isfinite(back).all()
    # What lies beyond the largest value that all codes allow is clipped.
    assert format.block is None or (back[0] / x[0] - 1).abs() <= 0.71


def test_denormal_tensors_keep_a_normal_scale():
    stored = quantize(torch.full((4,), 1e-42), INT8)
    assert float(stored.scale_values()) == 2.0**-126
    assert stored.dequantize().abs().max() <= 1e-42


@every_format
@pytest.mark.parametrize("shape", [(0,), (0, 4), (4, 0), (1,), (1, 1), ()])
def test_empty_and_one_element_tensors(format, shape):
    if any(axis >= len(shape) for axis, _ in _axes(format)):
        pytest.skip("the format names an axis")
    if shape == () and any(_axes(format)):
        pytest.skip("a scalar has no axis to group")
    x = torch.full(shape, 2.0)
    back = quantize(x, format).dequantize()
    assert back.shape == x.shape


def _axes(format: Format) -> list[tuple[int, int]]:
    inner = [] if format.scale is None else _axes(format.scale)
    return inner + list(format.block.lengths if format.block else ())


@every_format
def test_nan_and_infinity_are_refused_with_their_place(format):
    x = torch.ones(4, 32)
    x[2, 5] = float("nan")
    with pytest.raises(DataError, match=r"1 NaN among 128 values, the first at index \(2, 5\)"):
        quantize(x, format)
    x[2, 5] = -float("inf")
    with pytest.raises(DataError, match=r"1 infinite value"):
        quantize(x, format)


def test_a_fixed_scale_under_which_codes_are_infinite_is_refused():
    with pytest.raises(
        InputError, match=r"'int8 scale:2\^127': its scale is at least 1.70141e\+38, .* at most 2.66e\+36"
    ):
        quantize(torch.ones(4), "int8 scale:2^127")
    assert float(quantize(torch.ones(4) * 2.0**125, "int8 scale:2^120").dequantize()[0]) == 2.0**125


def test_numbers_beyond_float32_are_infinite():
    with pytest.raises(DataError, match=r"1 infinite value\(s\) among 2 values, the first at index \(1,\)"):
        quantize(np.array([1.0, 1e300]), INT8)


def test_infinity_clips_to_given_bounds():
    x = torch.tensor([float("inf"), -float("inf"), 0.5])
    assert quantize(x, INT8, (-1.0, 1.0)).codes.tolist() == [127, -127 - 1, 64]


def test_nan_stays_nan_in_simulation():
    rows = torch.tensor([[1.0, float("nan")]])
    one, zero = torch.ones(1, 1), torch.zeros(1, 1)
    for grid in (Int(8), E4M3, E2M1, FORMATS["nf4"].grid):
        assert fake_quantize_rows(rows, one, zero, grid).isnan().tolist() == [[False, True]]


def test_integers_are_no_input():
    with pytest.raises(InputError, match="int64"):
        quantize(torch.arange(4), INT8)


@pytest.mark.parametrize(("bits", "lowest"), [(1, -1), (5, -149), (7, -149), (7, -60), (8, -128)])
def test_powers_of_two_come_back_down_to_the_least_float32(bits, lowest):
    grid = Pow2(bits, lowest)
    x = torch.from_numpy(grid.values()).float()
    assert quantize(x, Format(grid, None)).codes.tolist() == list(range(1 << bits))


@pytest.mark.parametrize("x", ["3.5", [1 + 2j], np.array(["a"])], ids=str)
def test_what_is_no_number_is_no_input(x):
    with pytest.raises(InputError, match="convert them to a floating type first"):
        quantize(x, INT8)


def test_a_list_is_an_array_of_its_numbers():
    assert quantize([1.0, 2.0, 127.0], INT8).dequantize().tolist() == [1, 2, 127]


@pytest.mark.parametrize("width", [1, 2, 3, 4, 8, 12, 16, 24])
@pytest.mark.parametrize("name", ["int4", "uint4", "nf4", "e2m1", "binary", "log4"])
def test_short_blocks_give_the_codes_that_each_gives_alone(name, width):  # blocks of 2, 4, 8 and 16 share a loop
    words = f"{name} group:{width}"
    x = normal(700, width) * normal(700, 1, seed=1).exp()
    together, alone = quantize(x, words), [quantize(row, words) for row in x]
    assert torch.equal(together.codes, torch.stack([q.codes for q in alone]))
    assert torch.equal(together.dequantize(), torch.stack([q.dequantize() for q in alone]))


def test_bounds_must_fit_the_blocks():
    with pytest.raises(ShapeError, match="3 and 3 entries"):
        quantize(normal(4, 4), INT8.with_block(channel(0)), (torch.zeros(3), torch.ones(3)))
    with pytest.raises(InputError, match="finite"):
        quantize(normal(4, 4), INT8, (0.0, float("inf")))
    with pytest.raises(InputError, match="at most its upper"):
        quantize(normal(4, 4), INT8, (1.0, 0.0))


def test_bounds_clip():
    assert quantize(torch.tensor([-5.0, 0.0, 5.0]), INT8, (-1.0, 1.0)).dequantize().tolist() == pytest.approx(
        [-128 / 127, 0, 1]
    )


def test_a_second_scale_of_zero_makes_exact_zeros():
    x = torch.ones(1, 32)
    x[0, 16:] = 1e-6  # its scale is below half of 1/15 of the largest
    assert quantize(x, VSQ4).dequantize()[0, 16:].tolist() == [0.0] * 16


def test_error_reads_the_cost_and_the_noise():
    x = normal(1000, 64)
    measured = error(x, INT4.with_block(group(64)))
    back = quantize(x, "int4 group:64").dequantize()
    assert measured.mse == pytest.approx(float(((x - back) ** 2).mean()), rel=1e-5)
    assert measured.sqnr_db == pytest.approx(10 * np.log10(float((x**2).mean()) / measured.mse), abs=1e-3)
    assert (measured.bits, measured.clipped) == (4.5, 0.0)
    assert error(torch.zeros(4), INT4).sqnr_db == float("inf")


def test_the_clipped_share_is_what_lies_beyond_half_a_step():
    x = torch.linspace(-2, 2, 4001)
    assert error(x, INT8, (-1.0, 1.0)).clipped == pytest.approx(0.5, abs=0.01)


def test_scales_that_share_a_scale_are_stored_as_codes():
    stored = quantize(normal(8, 64), NVFP4)
    assert isinstance(stored.scale, QuantTensor)
    assert stored.scale.shape == (8, 4)
    assert stored.scale_values().shape == (8, 4)
