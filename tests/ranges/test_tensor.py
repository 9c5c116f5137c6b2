"""A tensor under a range: `range=` is what its bounds are, and says so where there is nothing to choose."""

import numpy as np
import pytest
import torch

import lowbit as lb
from lowbit.errors import InputError
from lowbit.ranges import RawRows


def normal(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("range", ["mse", "percentile:99", lb.OCTAV(), lb.ACIQ("gauss")], ids=str)
@pytest.mark.parametrize("words", ["int4", "int4 channel:0", "uint4 group:16", "nvfp4"])
def test_a_range_gives_the_codes_of_its_bounds(words, range):
    x, kind = normal(8, 64), lb.parse_format(words)
    bounds = lb.parse_range(range).bounds(RawRows.of(x, kind.block), kind)
    assert torch.equal(lb.quantize_tensor(x, words, range=range).codes, lb.quantize_tensor(x, words, bounds).codes)
    assert lb.error(x, words, range=range) == lb.error(x, words, bounds)


def test_without_a_range_bounds_are_the_extremes():
    x = normal(8, 64)
    assert lb.error(x, "int4 channel:0") == lb.error(x, "int4 channel:0", range="minmax")
    assert lb.error(x, "int4", range="mse").sqnr_db > lb.error(x, "int4").sqnr_db + 1  # 17.1, 15.7


def test_numpy_stays_numpy():
    stored = lb.quantize_tensor(normal(8, 64).numpy(), "int4", range="mse")
    assert isinstance(stored.codes, np.ndarray)


def test_a_range_for_a_format_without_a_scale_is_refused():
    with pytest.raises(InputError, match="has no scale"):
        lb.error(normal(4), "bf16", range="mse")


def test_rounding_goes_with_a_range():
    x = torch.full((10_000,), 0.3)
    y = lb.quantize_tensor(x, "int2", rounding=lb.stochastic(0), range=lb.MinMax())
    assert abs(float(y.dequantize().mean()) - 0.3) < 0.01


def test_groups_run_along_the_last_axis_and_do_not_cross_it():  # what the docstring says of a convolution
    assert lb.quantize_tensor(normal(8, 32, 3, 3), "mxfp4").tile == (1, 1, 1, 3)
    assert lb.quantize_tensor(normal(8, 32, 3, 3), "mxfp4 axis:1").tile == (1, 32, 1, 1)
