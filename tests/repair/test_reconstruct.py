"""Reconstruction and learned ranges: outputs come closer to float, in the written file too; blocks are the network."""

import numpy as np
import pytest
import torch
from test_steps import measured
from toy_networks import convolutions, images, network, sqnr_db

import lowbit as lb
from lowbit.model import Model
from lowbit.network.blocks import find_blocks
from lowbit.network.calibrate import observe, solve_weights
from lowbit.network.network import Network
from lowbit.network.place import place
from lowbit.recipe import Recipe, Rule, TensorSpec
from lowbit.repair.learn_ranges import learn_ranges
from lowbit.repair.prove import output_error
from lowbit.repair.ranges import choose_ranges
from lowbit.repair.reconstruct import reconstruct


@pytest.fixture(autouse=True)
def short(monkeypatch):
    """100 steps, and larger ones."""
    for name, rate in (("WEIGHT", 0.003), ("FACTOR", 0.003), ("SCALE", 0.004), ("BIAS", 0.002)):
        monkeypatch.setattr(f"lowbit.repair.learn.{name}_RATE", rate)
    for module in ("reconstruct", "learn_ranges"):
        monkeypatch.setattr(f"lowbit.repair.{module}.STEPS", 100)


def recipe(weights: str, activations: str, *steps: str, range: str = "minmax", solve: str = "nearest") -> Recipe:
    rule = Rule("*", TensorSpec(weights, solve=solve), TensorSpec(activations, range))
    return Recipe((rule,), steps)


def residual(channels: int = 8) -> Model:
    """x → conv → relu → two residual blocks → mean over pixels → fc → logits (N, 4); the blocks' first is depthwise."""
    rng = np.random.default_rng(0)
    block = """
        {a}1 = Conv <pads = [1,1,1,1], group = GROUPS> ({a}, {a}d) {a}2 = Relu ({a}1)
        {a}3 = Conv ({a}2, {a}p, {a}q) {a}4 = Add ({a}3, {a}) {b} = Relu ({a}4)"""
    weights = {
        f"{a}{kind}": rng.normal(size=shape) / (size**0.5)
        for a in "uv"
        for kind, shape, size in (
            ("d", (channels, 1, 3, 3), 9),
            ("p", (channels, channels, 1, 1), channels),
            ("q", (channels,), 9),
        )
    }
    block = block.replace("GROUPS", str(channels))
    return network(
        "r (float[N,3,8,8] x) => (float[N,4] logits) { s = Conv <pads = [1,1,1,1]> (x, stem) u = Relu (s)"
        + block.format(a="u", b="v")
        + block.format(a="v", b="w")
        + " g = GlobalAveragePool (w) f = Flatten (g) logits = Gemm (f, fc, bias) }",
        stem=rng.normal(size=(channels, 3, 3, 3)) / 5,
        fc=rng.normal(size=(channels, 4)),
        bias=rng.normal(size=4),
        **weights,
    )


def calibrated(model: Model, chosen: Recipe, batches: list) -> Network:
    simulation = Network(model.program, place(model.program, chosen))
    observe(simulation, batches)
    choose_ranges(simulation, batches)
    solve_weights(simulation, batches)
    return simulation


def in_batches(x: np.ndarray) -> list[dict[str, np.ndarray]]:
    return [{"x": x[i : i + 16]} for i in range(0, len(x), 16)]


# ---- blocks ----------------------------------------------------------------------------------------------------------


def test_blocks_of_a_residual_network_end_where_one_value_goes_on():
    simulation = calibrated(residual(), recipe("int4 channel:0", "uint8"), in_batches(images(16)))
    blocks = find_blocks(simulation.module, most=2)
    assert [block.layers for block in blocks] == [1, 2, 2, 1]
    assert [[n.meta["value"] for n in block.reads] for block in blocks] == [["x"], ["u"], ["v"], ["f"]]
    assert [[n.meta["value"] for n in block.makes] for block in blocks] == [["u"], ["v"], ["f"], ["logits"]]
    assert [block.layers for block in find_blocks(simulation.module, most=3)] == [3, 3]


def test_blocks_hold_every_node_that_follows_from_the_inputs_once():
    simulation = calibrated(residual(), recipe("int4 channel:0", "uint8"), in_batches(images(16)))
    nodes = [node for block in find_blocks(simulation.module) for node in block.nodes]
    assert len(set(nodes)) == len(nodes)
    assert {n.meta["op"] for n in nodes if "layer" in n.meta} == {"Conv", "Gemm"}
    assert sum("layer" in n.meta for n in nodes) == 6


def test_branches_that_never_meet_are_cut_behind_a_few_layers():
    rng = np.random.default_rng(0)
    names = [f"{side}{i}" for side in "ab" for i in range(4)]
    text = " ".join(
        f"{s}x{i} = MatMul ({s}r{i - 1}, {s}{i}) {s}r{i} = Relu ({s}x{i})".replace("ar-1", "x").replace("br-1", "x")
        for i in range(4)
        for s in "ab"
    )
    model = network(
        "t (float[N,8] x) => (float[N,8] ar3, float[N,8] br3) { " + text + " }",
        **{name: rng.normal(size=(8, 8)) / 3 for name in names},
    )
    batches = in_batches(rng.normal(size=(32, 8)).astype(np.float32))
    simulation = calibrated(model, recipe("int4 channel:0", "uint8"), batches)
    blocks = find_blocks(simulation.module, most=2)
    assert [block.layers for block in blocks] == [2, 2, 4]
    assert len(blocks[1].reads) == 2
    calibration = measured(simulation, batches)
    reconstruct(simulation, calibration)
    assert output_error(simulation, batches, calibration.exact) < calibration.error


# ---- steps -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("weights", "activations"),
    [("int3 channel:0", "uint8"), pytest.param("int3 channel:0", "uint4", marks=pytest.mark.slow), ("nf4", "float")],
)
def test_reconstruction_brings_outputs_closer_in_any_format(weights, activations):
    batches, others = in_batches(images(64)), in_batches(images(64, seed=7))
    rule = Rule("*", TensorSpec(weights), None if activations == "float" else TensorSpec(activations, "minmax"))
    simulation = calibrated(residual(32), Recipe((rule,)), batches)  # 1024 weights: fewer are not stored in NF4
    seen, unseen = measured(simulation, batches), measured(simulation, others)
    assert seen.error > 1e-4
    assert len(reconstruct(simulation, seen)) == 1
    assert output_error(simulation, others, unseen.exact) < 0.7 * unseen.error


@pytest.mark.slow
def test_the_written_file_is_as_close_as_the_reconstructed_network():
    model, x, unseen = residual(), images(96), images(64, seed=7)
    exact = model.run({"x": unseen})["logits"]
    found = {}
    for steps in ((), ("reconstruct",)):
        chosen = recipe("int3 channel:0", "uint4", *steps)
        found[steps] = sqnr_db(exact, lb.quantize(model, x, chosen).run({"x": unseen})["logits"])
        if steps:
            simulation = lb.simulation(model, x, chosen)
            with simulation.mode("quantize"), torch.no_grad():
                simulated = simulation.module(torch.from_numpy(unseen))["logits"].numpy()
            assert found[steps] == pytest.approx(sqnr_db(exact, simulated), abs=0.3)
    assert found["reconstruct",] > found[()] + 2


def test_learned_ranges_mend_a_range_that_one_outlier_has_widened():
    x = images(64)
    x[0, 0, 0, 0] = 400.0
    batches, others = in_batches(x), in_batches(images(64, seed=7))
    simulation = calibrated(convolutions(), recipe("int8 channel:0", "uint8"), batches)
    calm, before = measured(simulation, others), float(simulation.quantizers["x"].scale)
    assert learn_ranges(simulation, measured(simulation, others)) == ["learned 4 ranges"]
    assert float(simulation.quantizers["x"].scale) < before
    assert output_error(simulation, others, calm.exact) < 0.8 * calm.error


def test_what_was_learned_is_plain_again_and_can_be_undone():
    batches = in_batches(images(32))
    simulation = calibrated(convolutions(), recipe("int3 channel:0", "uint8"), batches)
    undo, calibration = simulation.undo(), measured(simulation, batches)
    reconstruct(simulation, calibration)
    assert not any(q.learner is not None for q in simulation.activations().values())
    assert all(q.latent is None for _, q in simulation.constants().values())
    undo()
    assert output_error(simulation, batches, calibration.exact) == calibration.error


def test_the_interrupt_of_a_user_ends_it():
    batches = in_batches(images(32))
    simulation = calibrated(convolutions(), recipe("int3 channel:0", "uint8"), batches)
    calibration = measured(simulation, batches)

    def interrupt(word: str) -> None:
        assert word == "reconstructing block 1 of 1"
        raise KeyboardInterrupt

    calibration.stage = interrupt
    with pytest.raises(KeyboardInterrupt):
        reconstruct(simulation, calibration)
    assert all(q.mode == "off" for q in simulation.quantizers.values())
