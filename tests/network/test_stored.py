"""What the quantizer of a weight gives, and where its gradient goes, in each of its states."""

import pytest
import torch

from lowbit.errors import InputError
from lowbit.network.stored import WeightQuant
from lowbit.numerics import Format, Int, KMeans, QuantTensor, quantize
from lowbit.recipe import TensorSpec

WEIGHT = torch.tensor([[0.1, -0.9, 0.4], [1.1, 0.6, -0.2]])
MASK = WEIGHT.abs() > 0.3


def quantizer(stored: QuantTensor | None = None, trains: str | None = None) -> WeightQuant:
    made = WeightQuant(TensorSpec("int8"))
    made.mode = "quantize"
    if stored is not None:
        made.store(stored, trains)
    return made


def shared(*values: float) -> QuantTensor:
    codes, table = torch.zeros(2, 3, dtype=torch.uint8), torch.tensor([values])
    start = QuantTensor(codes, Format(KMeans(2)), (2, 3), None, table=table)
    return start.encode(WEIGHT * MASK)


def gradient(made: WeightQuant, of: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """What the quantizer gives for WEIGHT, and the gradient of Σ 1 … 6 · values by the weight or `of`."""
    weight = WEIGHT.clone().requires_grad_()
    values = made(weight)
    return values.detach(), torch.autograd.grad(
        (values * torch.arange(1.0, 7).reshape(2, 3)).sum(), weight if of is None else of
    )[0]


def test_pruned_weights_are_0_and_get_their_gradient_all_the_same():  # Guo et al. 2016: they can come back
    made = quantizer()
    made.mask = MASK
    values, found = gradient(made)
    assert torch.equal(values, WEIGHT * MASK)
    assert found.flatten().tolist() == [1, 2, 3, 4, 5, 6]


def test_codes_that_train_follow_the_weight():
    made = quantizer(shared(-1.0, 0.0, 0.5, 1.0), "codes")
    made.mask = MASK
    values, found = gradient(made)
    assert values.tolist() == [[0.0, -1.0, 0.5], [1.0, 0.5, 0.0]]
    assert found.flatten().tolist() == [1, 2, 3, 4, 5, 6]
    assert made(WEIGHT - 0.5)[1].tolist() == [0.5, 0.0, 0.0]  # 0.6, 0.1 and a pruned one


def test_values_that_train_get_the_sum_of_their_places_and_0_stays():  # Han et al. 2016, section 3.2
    made = quantizer(shared(-1.0, 0.0, 0.5, 1.0), "values")
    values, found = gradient(made, made.table)
    assert values.tolist() == [[0.0, -1.0, 0.5], [1.0, 0.5, 0.0]]
    assert found.tolist() == [[2, 0, 3 + 5, 4]]
    with torch.no_grad():
        made.table[0, 3] = 2.0
    assert made.current(WEIGHT).dequantize()[1, 0] == 2.0


def test_stored_codes_stay_whatever_the_weight_does():
    made = quantizer(quantize(WEIGHT, Format(Int(8))))
    values, found = gradient(made)
    assert torch.equal(values, made.stored.dequantize())
    assert torch.equal(made(2 * WEIGHT), values)
    assert found.flatten().tolist() == [1, 2, 3, 4, 5, 6]
    with pytest.raises(InputError, match="has no table of values that could train"):
        made.store(made.stored, "values")
