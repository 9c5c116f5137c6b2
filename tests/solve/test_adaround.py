"""Learned rounding: against exhaustive search, against nearest and GPTQ, for grouped layers and for any grid."""

import itertools
import sys

import numpy as np
import pytest
import torch
from torch import Tensor

from lowbit.numerics import quantize
from lowbit.recipe import TensorSpec
from lowbit.solve import Moments, adaround, gptq, nearest
from lowbit.solve.adaround import LayerError, LearnedRounding


def moments(inputs: int, groups: int = 1, noise: float = 0.0, samples: int = 2000) -> Moments:
    """Of inputs of which neighbours share most; with noise, the quantized network multiplies something else."""
    drawn = torch.randn(groups, samples, inputs + 4, generator=torch.Generator().manual_seed(1))
    x = drawn.unfold(2, 5, 1).mean(-1).double() + 0.3
    rough = x + noise * torch.randn(x.shape, generator=torch.Generator().manual_seed(3))
    return Moments(rough.mT @ rough, x.mT @ rough, samples)


def weights(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(2))


def errors(weight: Tensor, words: str, known: Moments) -> dict[str, Tensor]:
    """Squared error of each output by solver."""
    spec, measure = TensorSpec(words), LayerError(weight, known)
    return {solve.__name__: measure.of_outputs(solve(weight, spec, known)) for solve in (nearest, gptq, adaround)}


def test_it_finds_what_searching_all_roundings_finds():
    """10 weights an output, each down or up: 1,024 roundings of each."""
    weight, known = weights(6, 10), moments(10)
    start, measure = nearest(weight, TensorSpec("int4 channel:0")), LayerError(weight, known)
    rounding = LearnedRounding(start, weight)
    choices = torch.tensor(list(itertools.product([0.0, 1.0], repeat=10)))
    every = rounding.below + choices[:, None] * rounding.gap - measure.wanted[0]
    best = torch.einsum("roi,ij,roj->ro", every.double(), measure.moments[0].double(), every.double()).amin(0)
    found = {name: float(error.sum() / best.sum()) for name, error in errors(weight, "int4 channel:0", known).items()}
    assert found["adaround"] < 1.05  # measured 1.011
    assert found["gptq"] > 1.1  # measured 1.15
    assert found["nearest"] > 1.5  # measured 1.77


@pytest.mark.parametrize(
    ("shape", "groups", "words"),
    [
        ((16, 24), 1, "int4 channel:0"),
        ((16, 24), 1, "int4 group:8"),
        ((16, 24), 1, "nf4"),
        ((16, 24), 1, "mxfp4"),
        ((16, 24), 1, "codebook:3"),
        ((8, 6, 3, 3), 4, "int4 channel:0"),
        ((12, 1, 3, 3), 12, "int4 channel:0"),  # depthwise
        ((12, 1, 3, 3), 12, "apot4"),
    ],
)
def test_no_output_is_worse_than_with_nearest_or_gptq(shape, groups, words, monkeypatch):
    monkeypatch.setattr(sys.modules["lowbit.solve.adaround"], "STEPS", 20)  # however short it learns
    known = moments(int(np.prod(shape[1:])), groups, noise=0.2)
    found = errors(weights(*shape), words, known)
    assert (found["adaround"] <= found["nearest"] * (1 + 1e-6)).all()
    assert (found["adaround"] <= found["gptq"] * (1 + 1e-6)).all()


def test_correlated_inputs_lose_less_than_with_gptq():  # Nagel et al. 2020
    found = errors(weights(16, 48), "int4 channel:0", moments(48, noise=0.1))
    assert found["adaround"].sum() < 0.95 * found["gptq"].sum() < 0.4 * found["nearest"].sum()  # measured


def test_learned_rounding_starts_at_the_weight_and_ends_at_a_neighbour():
    weight = weights(4, 16)
    rounding = LearnedRounding(quantize(weight, "int4 channel:0"), weight)
    assert torch.allclose(rounding.values(), weight, atol=1e-6)
    assert torch.equal(
        torch.as_tensor(rounding.settled().codes), torch.as_tensor(quantize(weight, "int4 channel:0").codes)
    )
    assert float(rounding.undecided(1.0).detach()) > 1
    with torch.no_grad():
        rounding.v.copy_(torch.where(rounding.v > 0, 9.0, -9.0))
    assert float(rounding.undecided(0.0)) == 0
    assert torch.equal(rounding.values(), torch.as_tensor(rounding.settled().dequantize()))


def test_without_moments_it_rounds_to_nearest():
    weight, spec = weights(4, 16), TensorSpec("int4 channel:0")
    assert torch.equal(torch.as_tensor(adaround(weight, spec).codes), torch.as_tensor(nearest(weight, spec).codes))
