"""Stochastic rounding: right on average, the same for a seed, new at each call without one."""

import pytest
import torch

from lowbit.numerics import Format, Int, quantize, stochastic
from lowbit.numerics.grids import E2M1


@pytest.mark.parametrize("grid", [Int(4), E2M1], ids=repr)
def test_stochastic_rounding_keeps_the_mean_and_its_seed(grid):
    x = torch.full((100_000,), 0.3)
    draw = [quantize(x, Format(grid, None), rounding=f"stochastic:{seed}").dequantize() for seed in (1, 1, 2)]
    assert torch.equal(draw[0], draw[1])
    assert not torch.equal(draw[0], draw[2])
    assert abs(float(draw[0].mean()) - 0.3) < 0.005  # σ of the mean is 0.0015


def test_stochastic_rounding_goes_on_in_its_sequence():
    rounding, x = stochastic(3), torch.full((1000,), 0.5)
    first, second = (quantize(x, Format(Int(4), None), rounding=rounding).codes for _ in range(2))
    assert not torch.equal(first, second)


def test_stochastic_rounding_without_a_seed_draws_anew_at_each_call():  # it drew the same numbers each time
    x = torch.full((1000,), 0.5)

    def two() -> list[list[int]]:
        return [quantize(x, "int4 rounding:stochastic", (-8.0, 7.0)).codes.tolist() for _ in range(2)]

    torch.manual_seed(0)
    first, second = two()
    torch.manual_seed(0)
    assert first != second
    assert two() == [first, second]
