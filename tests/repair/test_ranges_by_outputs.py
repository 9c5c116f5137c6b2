"""Ranges judged at the outputs: what a loss makes of an error, and that recipes can ask for it."""

from itertools import product

import numpy as np
import pytest
import torch
from toy_networks import convolutions, images

import lowbit as lb
from lowbit.errors import InputError
from lowbit.metadata import from_text
from lowbit.presets import RECIPES
from lowbit.ranges import Auto, parse_range, range_words
from lowbit.recipe import Recipe
from lowbit.repair.projections import cross_entropy, squares


def covariance(weigh, y: torch.Tensor) -> torch.Tensor:
    """Mean of v vᵀ over all sign vectors."""
    vs = [weigh(y, torch.tensor(signs).reshape(y.shape)).reshape(-1) for signs in product([-1.0, 1.0], repeat=len(y))]
    return torch.stack([torch.outer(v, v) for v in vs]).mean(0)


def test_cross_entropy_weighs_as_its_second_derivative_does():
    y = torch.tensor([2.0, 0.5, -1.0, 0.0])
    p = y.softmax(0)
    by_hand = torch.autograd.functional.hessian(lambda z: -(p * z.log_softmax(0)).sum(), y)
    assert torch.allclose(covariance(cross_entropy, y), by_hand, atol=1e-6)


def test_an_error_that_all_logits_share_costs_no_cross_entropy():
    y = torch.tensor([2.0, 0.5, -1.0])
    same = torch.ones(3)
    assert float(same @ covariance(cross_entropy, y) @ same) == pytest.approx(0, abs=1e-6)
    assert float(same @ covariance(squares, y) @ same) == pytest.approx(3 / float(y @ y))


def test_probabilities_are_known_as_such():
    p = torch.tensor([0.7, 0.2, 0.1])
    assert torch.allclose(covariance(cross_entropy, p), torch.diag(1 / p), atol=1e-4)


def test_one_logit_is_that_of_a_yes():
    p = torch.tensor([[1.3]]).sigmoid()
    assert float(cross_entropy(torch.tensor([[1.3]]), torch.ones(1, 1))) ** 2 == pytest.approx(float(p * (1 - p)))


def test_a_recipe_asks_for_it_by_name():
    assert parse_range("auto:cross_entropy") == Auto("cross_entropy")
    assert range_words(Auto("cross_entropy")) == "auto:cross_entropy"
    with pytest.raises(InputError, match=r"loss 'entropy' does not exist. Did you mean 'cross_entropy'"):
        parse_range("auto:entropy")
    text = RECIPES["int8"]("onnxruntime").to_toml().replace('range = "auto"', 'range = "auto:cross_entropy"')
    quantized = lb.quantize(convolutions(), images(), Recipe.from_toml(text))
    winners = {row["range"] for row in from_text(quantized.metadata["lowbit.ledger"]) if row["role"] == "activation"}
    assert winners
    assert not any(words.startswith("auto") for words in winners)
    assert np.isfinite(quantized.run({"x": images()})["logits"]).all()
