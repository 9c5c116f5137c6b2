"""Quantizers that learn: gradients against autograd of the formulas, and what is stored against what was trained."""

import numpy as np
import pytest
import torch
from torch import Tensor

from lowbit.errors import InputError, UnsupportedError
from lowbit.network.learners import LearnedRange, activation_learner, weight_learner
from lowbit.network.quantizers import FakeQuant
from lowbit.network.stored import WeightQuant
from lowbit.numerics import parse_format, quantize
from lowbit.ranges import METHODS, MSE, Learned, MinMax, Percentile, parse_range, quantize_tensor, range_words
from lowbit.recipe import Recipe, Rule, TensorSpec

WEIGHTS = [
    *(
        (method, kind)
        for method in ("ste", "lsq", "lsq+", "ema", "dorefa")
        for kind in ("int3 channel:0", "int4 narrow")
    ),
    ("lsq", "int8 group:4"),
    ("lsq", "e2m1 channel:0"),
    ("apot", "apot3 channel:0"),
    ("apot", "apot4"),
    ("dorefa", "lloyd2 channel:0"),
    ("xnor", "binary channel:0"),
    ("twn", "ternary channel:0"),
    ("lqnets", "bases2 channel:0"),
    ("lqnets", "bases3"),
]


def normal(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def activation(method: str, scale: float, zero: float = 0.0, bits: int = 2) -> LearnedRange:
    made = activation_learner(Learned(method), parse_format(f"uint{bits}"), torch.tensor(scale), torch.tensor(zero))
    assert isinstance(made, LearnedRange)
    return made


def straight(x: Tensor) -> Tensor:
    return x + (x.round() - x).detach()


def test_scale_gradient_of_lsq_is_equation_3_by_hand():
    # Esser et al. 2020: below 0: −Q_N = 0; inside: round(v) − v; above: Q_P = 3. N = 4 values, g = 1 / √(4 · 3).
    learner, x = activation("lsq", 0.5), torch.tensor([[-1.0, 0.3, 0.9, 7.0]], requires_grad=True)
    y = learner(x)
    assert y.tolist() == [[0.0, 0.5, 1.0, 1.5]]
    y.sum().backward()
    by_hand = (0 + (1 - 0.6) + (2 - 1.8) + 3) / 12**0.5
    assert float(learner.end.grad) == pytest.approx(by_hand / 0.5, rel=1e-6)  # s = 0.5 · p: SGD moves s by by_hand
    assert x.grad.tolist() == [[0.0, 1.0, 1.0, 0.0]]


@pytest.mark.parametrize("method", ["lsq", "lsq+", "pact"])
def test_activation_gradients_are_those_of_the_formula_by_autograd(method):
    learner, x = activation(method, 0.3, zero=1.0 if method != "pact" else 0.0, bits=3), normal(2, 5, 4) * 2
    along = normal(2, 5, 4).flip(0)
    x.requires_grad_()
    learner(x).backward(along)
    s, z = learner.scale_and_zero()
    other, step = x.detach().clone().requires_grad_(), s.clone().requires_grad_()
    beta = (-z * s).clone().requires_grad_()
    if method == "pact":
        alpha = (s * 7).clone().requires_grad_()
        clipped = torch.minimum(other.clamp_min(0), alpha)
        formula = clipped + ((clipped / s).round() * s - clipped).detach()
    elif method == "lsq+":
        formula = straight(((other - beta) / step).clamp(0, 7)) * step + beta
    else:
        formula = straight((other / step).clamp(-float(z), 7 - float(z))) * step
    assert torch.allclose(learner(x), formula, atol=1e-6)
    formula.backward(along)
    assert torch.allclose(x.grad, other.grad)
    if method == "pact":
        assert torch.allclose(learner.end.grad * 2.1, alpha.grad, rtol=1e-5)
        assert float(learner.penalty().detach()) == pytest.approx(1e-4)  # (α / α₀)², α = α₀ yet
        return
    assert torch.allclose(learner.end.grad * 0.3, step.grad / (20 * (7 - float(z))) ** 0.5, rtol=1e-4)
    if method == "lsq+":
        assert torch.allclose(learner.offset.grad * 0.3, beta.grad, rtol=1e-5)


@pytest.mark.parametrize("method", ["ste", "dorefa"])
def test_a_fixed_range_has_no_parameter_and_stops_gradients_outside(method):
    learner, x = activation(method, 0.5), torch.tensor([-1.0, 0.3, 0.9, 7.0], requires_grad=True)
    learner(x).sum().backward()
    assert not list(learner.parameters())
    assert x.grad.tolist() == [0.0, 1.0, 1.0, 0.0]


def test_extremes_move_by_a_tenth_of_the_way_in_training_and_not_in_evaluation():
    learner = activation_learner(Learned("ema"), parse_format("uint8"), torch.tensor(1 / 255), torch.tensor(0.0))
    x = torch.tensor([0.0, 2.0], requires_grad=True)
    learner(x).sum().backward()
    assert float(learner.high) == pytest.approx(1.1)  # from 1, towards 2
    assert x.grad.tolist() == [1.0, 0.0]  # 2 lies outside of the range yet
    learner.eval()(x)
    assert float(learner.high) == pytest.approx(1.1)


@pytest.mark.parametrize(("method", "words"), WEIGHTS)
def test_what_is_stored_of_a_weight_is_bit_for_bit_what_was_trained(method, words):
    weight = normal(6, 3, 2, 2) * 0.3
    learner = weight_learner(Learned(method), quantize(weight, words), weight)
    before = learner(weight)
    assert (before - weight).square().mean() < weight.square().mean()
    parameter = torch.nn.Parameter(weight.clone())
    optimizer = torch.optim.SGD([parameter, *learner.parameters()], lr=0.05)
    for _ in range(3):
        optimizer.zero_grad()
        (learner(parameter) - weight.flip(0)).square().sum().backward()
        assert parameter.grad.abs().max() > 0
        optimizer.step()
    learner.eval()
    after = learner(parameter)
    assert not torch.equal(after, before)
    assert torch.equal(torch.as_tensor(learner.stored(parameter).dequantize()), after)


@pytest.mark.parametrize("words", ["int3 channel:0", "apot4 channel:0", "lloyd2 channel:0"])
def test_gradient_of_a_learned_weight_scale_is_the_formulas_by_autograd(words):
    weight = (normal(4, 10) * 0.3).requires_grad_()
    stored = quantize(weight.detach() * 0.7, words)
    learner, along = weight_learner(Learned("lsq"), stored, weight), normal(4, 10).flip(0)
    learner(weight).backward(along)
    values = torch.as_tensor(stored.format.grid.values()).float()
    step, other = learner.unit.clone().requires_grad_(), weight.detach().clone().requires_grad_()
    steps = (other / step).clamp(values[0], values[-1])
    nearest = values[(steps.detach()[..., None] - values).abs().argmin(-1)]
    formula = (steps + (nearest - steps).detach()) * step
    assert torch.allclose(learner(weight), formula, atol=1e-6)
    formula.backward(along)
    assert torch.allclose(weight.grad, other.grad)
    apart = float(values[-1] - values[0]) / (len(values) - 1)
    factor = 1 / (10 * float(values[-1]) / apart) ** 0.5 / apart**2
    assert torch.allclose(learner.step.grad * learner.unit, step.grad * factor, rtol=1e-4)


def test_binary_and_ternary_scales_are_the_papers_means():
    weight = torch.tensor([[0.1, -0.4, 0.2, 0.9]])
    binary = weight_learner(Learned("xnor"), quantize(weight, "binary channel:0"), weight)(weight)
    assert torch.allclose(binary, torch.tensor([[0.4, -0.4, 0.4, 0.4]]))  # the mean of |w|
    ternary = weight_learner(Learned("twn"), quantize(weight, "ternary channel:0"), weight)(weight)
    assert torch.allclose(ternary, torch.tensor([[0.0, -0.65, 0.0, 0.65]]))  # beyond 0.28: the mean of 0.4 and 0.9


def test_dorefa_rounds_the_normalized_tanh_of_equation_9():
    weight = torch.tensor([[0.5, -1.0, 0.1, 2.0]])
    rounded = weight_learner(Learned("dorefa"), quantize(weight, "lloyd2"), weight)(weight)
    squeezed = torch.tanh(weight) / torch.tanh(torch.tensor(2.0))  # 0.479, −0.790, 0.103, 1
    levels = torch.tensor([-1, -38 / 127, 38 / 127, 1])
    codes = levels[(squeezed[..., None] - levels).abs().argmin(-1)]
    scale = (codes * weight).sum() / codes.square().sum()
    assert torch.allclose(rounded, codes * scale)


def test_lqnets_basis_solves_the_least_squares_for_its_codes():
    weight = normal(1, 400)
    learner = weight_learner(Learned("lqnets"), quantize(weight, "bases2"), weight)
    signs = torch.where(learner(weight) > 0, 1.0, -1.0)
    small = torch.where((learner(weight).abs() > learner.factors[0, 0]), signs, -signs)
    basis = torch.stack([signs[0], small[0]], dim=1)
    solved = torch.linalg.lstsq(basis, weight[0]).solution
    assert torch.allclose(learner.factors[0], solved, atol=2e-3)  # a fixed point of algorithm 1
    normal_step = float((learner(weight) - weight).square().mean())
    assert normal_step == pytest.approx(0.1175, abs=0.02)  # the best four values of a normal variable: Max 1960


def test_a_mask_keeps_pruned_weights_at_zero_and_their_gradient():
    weight = normal(4, 8)
    quantizer = WeightQuant(TensorSpec("int4 channel:0", range="lsq"))
    quantizer.store(quantize(weight, "int4 channel:0"))
    quantizer.mask = torch.ones(4, 8, dtype=torch.bool)
    quantizer.mask[:, 0] = False
    quantizer.learn(weight)
    x = weight.clone().requires_grad_()
    y = quantizer.rounded(x)
    y.sum().backward()
    assert not y[:, 0].any()
    assert x.grad[:, 0].tolist() == [1.0] * 4
    assert torch.equal(torch.as_tensor(quantizer.current(x.detach()).dequantize()), y.detach())


def test_an_activation_settles_to_what_it_learned():
    quantizer = FakeQuant(TensorSpec("uint4", range="lsq+"), ("x",))
    quantizer.set_parameters(torch.tensor(0.1), torch.tensor(3.0))
    quantizer.mode = "quantize"
    learner, x = quantizer.learn(), normal(40)
    optimizer = torch.optim.SGD(learner.parameters(), lr=0.01)
    for _ in range(5):
        optimizer.zero_grad()
        (quantizer(x) - x).square().sum().backward()
        optimizer.step()
    learned = quantizer(x)
    quantizer.settle()
    assert quantizer.learner is None
    assert float(quantizer.scale) != pytest.approx(0.1)
    assert torch.equal(quantizer(x), learned)


def test_bfloat16_rounds_like_float32_and_keeps_its_gradient():
    learner, x = activation("lsq", 0.3, bits=4), (normal(3, 2, 5, 5) * 3).bfloat16().requires_grad_()
    y = learner(x)
    wide = x.detach().float()
    assert torch.equal(y, learner(wide).bfloat16())
    y.sum().backward()
    assert torch.equal(x.grad, ((wide / 0.3 >= 0) & (wide / 0.3 <= 15)).bfloat16())


def test_words_of_learned_ranges_are_read_and_written():
    assert parse_range("lsq") == Learned("lsq", MSE())
    assert parse_range("pact:percentile:99.9") == Learned("pact", Percentile(99.9))
    for words in (*METHODS, "lsq:minmax", "lsq+:percentile:99.9"):
        assert range_words(parse_range(words)) == words
    recipe = Recipe((Rule("*", TensorSpec("int2 channel:0", "lsq"), TensorSpec("uint2", "pact:minmax")),))
    assert Recipe.from_toml(recipe.to_toml()) == recipe
    with pytest.raises(InputError, match="does not learn"):
        parse_range("lsq:lsq")


def test_untrained_a_learned_range_is_its_start():
    weight = normal(4, 6).numpy()
    spec = TensorSpec("int4 channel:0", range=Learned("lsq", MinMax()))
    learned, started = (quantize_tensor(weight, spec.format, r).dequantize() for r in (spec.range, MinMax()))
    assert np.array_equal(learned, started)


@pytest.mark.parametrize(
    ("method", "words", "message"),
    [("xnor", "uint2", "serves weights only"), ("lsq", "e2m1", "integers with one")],
)
def test_an_activation_that_cannot_learn_says_why(method, words, message):
    with pytest.raises(UnsupportedError, match=message):
        activation_learner(Learned(method), parse_format(words), torch.tensor(1.0), torch.tensor(0.0))


def test_a_weight_that_cannot_learn_says_why():
    weight = normal(4, 32)
    for method, words, message in (
        ("pact", "int4", "activations only"),
        ("lqnets", "int4", "'bases2' for two bits"),
        ("lsq", "mxfp4", "learns scales in float32"),
    ):
        with pytest.raises(UnsupportedError, match=message):
            weight_learner(Learned(method), quantize(weight, words), weight)
