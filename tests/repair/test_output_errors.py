"""The price of a quantizer by gradients, held against switching that quantizer on by itself."""

import numpy as np
import pytest
import torch
from toy_networks import convolutions, images, label_losses, network

from lowbit.model import Model
from lowbit.network.calibrate import forward, observe, solve_weights
from lowbit.network.network import Network
from lowbit.network.place import place
from lowbit.numerics import INT8, UINT8, channel
from lowbit.ranges import MinMax
from lowbit.recipe import Recipe, Rule, TensorSpec
from lowbit.repair.prove import Calibration, float_outputs, judging_error
from lowbit.repair.ranges import choose_ranges
from lowbit.repair.sensitivity import output_errors, quantizer_costs

MINMAX = Recipe((Rule("*", TensorSpec(INT8.with_block(channel(0)), MinMax()), TensorSpec(UINT8, MinMax())),))


def calibrated(model: Model, batches: list, recipe: Recipe = MINMAX) -> Network:
    simulation = Network(model.program, place(model.program, recipe))
    observe(simulation, batches)
    solve_weights(simulation)
    choose_ranges(simulation, batches)
    return simulation


def in_batches(x: np.ndarray) -> list[dict[str, np.ndarray]]:
    """Of 8: a weight's error is one for all samples of a batch, so only more batches make its price surer."""
    return [{"x": x[i : i + 8]} for i in range(0, len(x), 8)]


def prices(simulation: Network, batches: list) -> dict[str, float]:
    """What each quantizer adds, a batch; 64 batches: √(2/64) = 18 % of spread for weights."""
    return {n: c / len(batches) for n, c in quantizer_costs(simulation, batches).items()}


def switched_on(simulation: Network, names: list[str], batches: list) -> dict[str, float]:
    """Squared error of the outputs, relative to their power, with one quantizer at work at a time."""
    exact = float_outputs(simulation, batches)
    found = {}
    for name in names:
        with simulation.mode("quantize", [simulation.quantizers[name]]):
            rough = [forward(simulation, batch) for batch in batches]
        noise = sum(float((a["logits"] - b["logits"]).square().sum()) for a, b in zip(exact, rough, strict=True))
        found[name] = noise / sum(float(a["logits"].square().sum()) for a in exact)
    return found


def test_the_gradient_prices_each_quantizer_as_switching_it_on_does():
    batches = in_batches(images(512))
    simulation = calibrated(convolutions(), batches)
    priced = prices(simulation, batches)
    found = switched_on(simulation, list(priced), batches)
    assert len(found) == 7  # the input, three values behind kernels, three weights
    for name, cost in priced.items():
        assert cost == pytest.approx(found[name], rel=0.35), name


def test_with_labels_the_price_ranks_as_the_change_of_their_loss_does():
    """Seven tensors in 4, 6 and 8 bits, one at a time; every third label is another class than the network's own."""
    x = images(48)
    answers, other = convolutions().run({"x": x})["logits"].argmax(1), np.arange(48) % 3 == 0
    batches, labels = [{"x": x[i : i + 1]} for i in range(48)], [*np.where(other, answers + 1, answers)[:, None] % 4]
    priced, found = [], []
    for bits in (4, 6, 8):
        specs = TensorSpec(f"int{bits} channel:0", "minmax"), TensorSpec(f"uint{bits}", "minmax")
        recipe = Recipe((Rule("*", *specs),))
        simulation = calibrated(convolutions(), [{"x": x}], recipe)
        costs = quantizer_costs(simulation, batches, "labels", labels)
        exact = label_losses(float_outputs(simulation, batches), labels)
        for name, cost in costs.items():
            with simulation.mode("quantize", [simulation.quantizers[name]]):
                rough = [forward(simulation, batch) for batch in batches]
            priced.append(cost)
            found.append(float((label_losses(rough, labels) - exact).square().sum()))
    ranks = [np.argsort(np.argsort(values)) for values in (priced, found)]
    assert len(priced) == 21
    assert np.corrcoef(*ranks)[0, 1] >= 0.9  # measured: 0.99


@pytest.mark.parametrize("loss", ["squares", "cross_entropy", "labels"])
def test_what_networks_are_judged_by_has_the_unit_of_the_prices(loss):
    x = images(64)
    judging, single = in_batches(x), [{"x": x[i : i + 1]} for i in range(64)]
    recipe = Recipe((Rule("conv2*", TensorSpec("int4 channel:0", "minmax")),))
    simulation, labels = calibrated(convolutions(), judging, recipe), np.arange(64) % 4
    given = [labels[i : i + 8] for i in range(0, 64, 8)]
    calibration = Calibration([], [], judging, [], lambda: [], judging_labels=given)
    costs = quantizer_costs(simulation, single, loss, labels[:, None])
    judged = judging_error(simulation, calibration, float_outputs(simulation, judging), loss)
    assert list(costs) == ["conv2.weight"]
    assert judged == pytest.approx(costs["conv2.weight"] / 64, rel=0.35)


def test_a_kernel_and_torch_agree_on_what_a_candidate_costs():
    batches = [{"x": images(16)}]
    simulation = calibrated(convolutions(), batches)
    now = {n: [(q.format, q.scale, q.zero)] for n, q in simulation.activations().items()}
    by_kernel = output_errors(simulation, now, batches)
    as_set = output_errors(simulation, dict.fromkeys(now, ()), batches)
    for name in now:
        assert float(by_kernel[name]) == pytest.approx(float(as_set[name]), rel=1e-3)


def test_a_reader_in_float_adds_nothing_to_the_price():
    """x is quantized for the product alone; what the other reader of x passes on, ten times as much, is exact."""
    rng = np.random.default_rng(0)
    model = network(
        """
        two (float[N,16] x) => (float[N,16] logits) {
            s = Sigmoid (x)
            p = MatMul (s, w)
            t = Mul (s, ten)
            logits = Sub (p, t)
        }""",
        w=rng.normal(size=(16, 16)) / 4,
        ten=np.full(16, 10.0),
    )
    batches = in_batches(rng.normal(size=(512, 16)).astype(np.float32))
    simulation = calibrated(model, batches)
    assert list(simulation.activations()) == ["s"]
    assert prices(simulation, batches)["s"] == pytest.approx(switched_on(simulation, ["s"], batches)["s"], rel=0.35)


def test_pricing_leaves_the_parameters_as_they_were():
    batches = [{"x": images(16)}]
    simulation = calibrated(convolutions(), batches)
    before = {n: (p.clone(), p.requires_grad) for n, p in simulation.module.named_parameters()}
    quantizer_costs(simulation, batches)
    for name, parameter in simulation.module.named_parameters():
        assert torch.equal(parameter, before[name][0])
        assert parameter.requires_grad == before[name][1]
        assert parameter.grad is None
