"""Recurrent layers with states of fixed scale: the simulation, the integer program, and the proof that holds both."""

import re
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
import torch
from benchmarks.integer_sequences import MAKERS
from recurrent_toys import RECURRENT, recurrent
from toy_networks import network, sqnr_db

import lowbit as lb
from lowbit.deploy.export import export
from lowbit.deploy.proof import verify
from lowbit.errors import InputError, MismatchError, ShapeError, UnsupportedError, UnusedRuleError
from lowbit.integer.engine import IntegerReference
from lowbit.integer.sequences import CELL, STATE
from lowbit.network.network import Network
from lowbit.network.quantized_recurrence import QuantizedRecurrence
from lowbit.numerics import spell_format
from lowbit.report.ledger import Ledger
from lowbit.targets import TARGETS

WIDE = lb.Recipe(
    (lb.Rule("*", lb.TensorSpec("int8 channel:0", "minmax"), lb.TensorSpec("int16", "minmax")),), target="integer"
)


def simulated(network: Network, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    with torch.no_grad(), network.mode("quantize"):
        outputs = network.module(*(torch.from_numpy(batch[str(v.name)]) for v in network.program.graph.inputs))
    return {name: y.numpy() for name, y in outputs.items()}


def with_states(**formats: str) -> lb.Recipe:
    rules = tuple(lb.Rule(f"state:*.{state}", activations=kind) for state, kind in formats.items())
    return lb.Recipe((*WIDE.rules, *rules), target="integer")


@pytest.mark.parametrize("case", RECURRENT)
def test_16_bit_states_of_the_simulation_are_30_steps_from_the_integer_program(case: str):
    """25 at most: gates of the integer program have steps that are 8 of a state's, and its tanh is off by 3."""
    model, samples = recurrent(case)
    simulation = lb.simulation(model, samples[:2], WIDE)
    run = IntegerReference().compile(export(simulation))
    for batch in samples[:2]:
        own, deployed = simulated(simulation, batch), run(batch)
        for name in own:
            step = CELL if name == "c" else STATE
            assert np.abs(own[name] - deployed[name].reshape(own[name].shape)).max() < 30 * step, name


def test_the_target_names_the_formats_of_the_integer_program():
    for operator, states in TARGETS["integer"].states.items():
        steps = {"h": STATE, "c": CELL}
        assert {s: (k.grid, float(k.scale.grid.values()[0])) for s, k in states.items()} == {
            s: (lb.Int(16), steps[s]) for s in (("h", "c") if operator == "LSTM" else ("h",))
        }


@pytest.mark.parametrize("case", ["LSTM with states", "GRU with its reset before", "RNN"])
def test_the_proof_holds_codes_to_one_step_and_sees_a_wrong_weight(case: str):
    model, samples = recurrent(case)
    simulation = lb.simulation(model, samples, "int8-fast", target="integer")
    program = export(simulation)
    parity = verify(simulation, program, samples[:4], IntegerReference())
    assert parity.worst[1] <= 1
    assert parity.one_step < 0.005  # measured 0.002 at most
    codes = program.graph.initializers["r_codes"]
    codes.const_value = ir.tensor(codes.const_value.numpy()[:, ::-1].copy())
    told = (
        r"layer '\w+_0': integer and the simulation differ by .* of the power of '[yhc]', .* a target that keeps them"
    )
    with pytest.raises(MismatchError, match=told):
        verify(simulation, program, samples[:1], IntegerReference())


def test_quantizing_tells_that_layers_of_any_length_were_held_against_integers():
    rng = np.random.default_rng(0)
    weights = {"w": rng.normal(size=(1, 24, 5)) / 2, "r": rng.normal(size=(1, 24, 8)) / 3, "b": np.ones((1, 48)) / 9}
    text = """f (float[N,T,5] x) => (float[T,1,N,8] y) {
        steps = Transpose <perm = [1,0,2]> (x)  y = GRU <hidden_size = 8> (steps, w, r, b) }"""
    x = rng.normal(size=(12, 7, 5)).astype(np.float32)
    model = lb.quantize(network(text, **weights), {"x": x}, "int8-fast", target="integer")
    notes = model.program.metadata_props["lowbit.passes"]
    assert "states of recurrent layers were held against integers on 4 of 4 samples" in notes
    rows = {row["tensor"]: row for row in Ledger.of(model).rows}
    assert rows["gru_1.h"]["format"] == "int16 scale:2^-15"
    assert rows["b"]["reason"] == "a bias of two products; the integer program has it in 32 bits, at the scale of each"


def test_states_that_amplify_rounding_are_a_warning_and_a_note():
    """Recurrent weights of spectral radius 1.7: 100 steps leave 0.0015 of the power between the two."""
    rng = np.random.default_rng(0)
    weights = {"w": rng.normal(size=(1, 32, 5)), "r": 1.7 * rng.normal(size=(1, 32, 32)) / 32**0.5}
    text = """f (float[N,T,5] x) => (float[T,1,N,32] y) {
        steps = Transpose <perm = [1,0,2]> (x)  y = RNN <hidden_size = 32> (steps, w, r) }"""
    x = 0.1 * rng.normal(size=(12, 100, 5)).astype(np.float32)
    with pytest.warns(UserWarning, match="'rnn_1': integer and the simulation differ by .* keeps them in float"):
        file = lb.quantize(network(text, **weights), {"x": x}, "int8-fast", target="integer")
    assert "States that amplify rounding" in file.program.metadata_props["lowbit.passes"]
    assert file.run({"x": x})["y"].shape == (100, 1, 12, 32)


def test_steps_are_no_samples():
    """The first axis of an input is the batch of an integer program, unless a recurrent layer goes along it."""
    rng = np.random.default_rng(0)
    weights = {"w": rng.normal(size=(1, 8, 5)) / 2, "r": rng.normal(size=(1, 8, 8)) / 3}
    model = network("f (float[T,1,5] x) => (float[T,1,1,8] y) { y = RNN <hidden_size = 8> (x, w, r) }", **weights)
    file = lb.quantize(model, [{"x": rng.normal(size=(7, 1, 5)).astype(np.float32)}], "int8-fast", target="integer")
    with pytest.raises(ShapeError, match="--shape T=…"):
        IntegerReference().compile(file.program)
    x = rng.normal(size=(9, 1, 5)).astype(np.float32)
    ours = IntegerReference(sizes={"T": 9}).compile(file.program)({"x": x})["y"]
    assert np.abs(file.run({"x": x})["y"] - ours).max() < 0.01  # a step of 8 bits


@pytest.mark.parametrize(
    ("shape", "told"),
    [
        ("[?,?,5]", "held against integers on 2 of 2 samples"),
        ("[]", "left out: .* input 'x' has the shape None: .* says the axes"),
    ],
)
def test_a_dimension_without_a_name_is_called_by_its_input_and_place(shape: str, told: str):
    rng = np.random.default_rng(0)
    weights = {"w": rng.normal(size=(1, 8, 5)) / 2, "r": rng.normal(size=(1, 8, 8)) / 3}
    text = f"""f (float{shape} x) => (float[] y) {{
        steps = Transpose <perm = [1,0,2]> (x)  y = RNN <hidden_size = 8> (steps, w, r) }}"""
    x = rng.normal(size=(8, 7, 5)).astype(np.float32)
    file = lb.quantize(network(text, **weights), {"x": x}, "int8-fast", target="integer")
    assert re.search(told, file.program.metadata_props["lowbit.passes"])
    if shape != "[]":
        with pytest.raises(ShapeError, match="--shape x_1=…"):
            IntegerReference().compile(file.program)


@pytest.mark.parametrize("case", ["LSTM", "GRU", "GRU with its reset before", "RNN"])
def test_a_gradient_reaches_the_weights_through_3_steps(case: str):
    """Straight through the rounding of W, R and all states: what the float network has, to 10 %."""
    model, samples = recurrent(case)
    simulation = lb.simulation(model, samples[:2], "int8-fast", target="integer")
    r, x = simulation.parameter("r"), torch.from_numpy(samples[0]["x"]).requires_grad_()
    found = []
    for mode in ("off", "quantize"):
        with simulation.mode(mode):
            y = simulation.module(x)["y"][2]
        found.append([g.flatten() for g in torch.autograd.grad(y.square().sum(), (r, x))])
    for exact, rough in zip(*found, strict=True):
        assert torch.cosine_similarity(exact, rough, dim=0) > 0.99
    first = found[1][1].reshape(x.shape)[0]
    assert bool((first != 0).all())


def test_a_recurrent_network_trains_with_its_states_in_16_bits_and_its_file_is_proved():
    model, samples = recurrent("GRU")
    x = torch.from_numpy(samples[0]["x"])
    prepared = lb.prepare(model, None, "int8", calibration=samples, target="integer")
    (rounding,) = (m for m in prepared.modules() if isinstance(m, QuantizedRecurrence))
    assert [q.mode for q in rounding.states.values()] == ["quantize"]
    weights = next(p for p in prepared.parameters() if p.shape == (1, 72, 24))
    before, losses = weights.detach().clone(), []
    optimizer = torch.optim.SGD(prepared.parameters(), 0.1)
    for _ in range(3):
        losses.append((prepared(x)["y"] - 0.2).square().mean())
        optimizer.zero_grad()
        losses[-1].backward()
        optimizer.step()
    assert losses[-1] < losses[0]
    assert not torch.equal(weights, before)
    file = lb.convert(prepared)
    assert "held against integers on 1 of 1 samples" in file.program.metadata_props["lowbit.passes"]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["silero", "charlstm"])
def test_real_networks_agree_with_the_integer_program_in_every_layer(name: str, data: Path):
    network, calibration, samples = MAKERS[name]()
    port = network.inputs[0].name
    simulation = lb.simulation(network, {port: calibration}, "int8-fast", target="integer")
    program = export(simulation)
    parity = verify(simulation, program, [{port: sample[None]} for sample in samples[:6]], IntegerReference())
    assert parity.worst[1] <= 1
    assert parity.one_step < 1e-4  # measured 3e-5
    (deployed,) = IntegerReference().compile(program)({port: samples[:6]}).values()
    ((output, own),) = simulated(simulation, {port: samples[:6]}).items()
    assert np.abs(own - deployed).max() < 1.5 * float(simulation.quantizers[output].scale)


def test_states_of_few_bits_lie_on_their_grid_and_cost_decibels():
    model, samples = recurrent("LSTM")
    exact, found = model.run(samples[0])["y"], {}
    for name, recipe in {
        "float": with_states(h="float", c="float"),
        "16 bits": WIDE,
        "8 bits": with_states(h="int8 scale:2^-7"),
        "8 bits of c": with_states(h="int8 scale:2^-7", c="int8 scale:2^-5"),
    }.items():
        made = simulated(lb.simulation(model, samples[:2], recipe), samples[0])
        found[name] = sqnr_db(exact, made["y"])
        if name.startswith("8"):
            assert np.abs(made["y"] * 128 - np.rint(made["y"] * 128)).max() < 0.02  # the output has 16 bits behind it
    assert abs(found["16 bits"] - found["float"]) < 0.5
    assert found["16 bits"] > found["8 bits"] + 3 > found["8 bits of c"] + 3


def test_a_rule_speaks_of_one_state_of_one_layer():
    model, samples = recurrent("LSTM")
    layer = next(iter(model.program.graph)).name
    recipe = lb.Recipe((*WIDE.rules, lb.Rule(f"state:{layer}.c", activations="fp16")), target="integer")
    (states,) = lb.simulation(model, samples[:2], recipe).placement.states.values()
    assert {s: spell_format(spec.format) for s, spec in states.items()} == {"h": "int16 scale:2^-15", "c": "fp16"}
    assert lb.Recipe.from_toml(recipe.to_toml()) == recipe


def test_rules_of_states_that_can_not_be_are_refused_in_words():
    model, samples = recurrent("GRU")
    with pytest.raises(UnsupportedError, match=r"rule 'state:\*.h': states in other formats .* can be simulated"):
        lb.quantize(model, samples, with_states(h="int8 scale:2^-7"))
    with pytest.raises(UnusedRuleError, match=r"rule 'state:\*.c' matched no state. States are: state:gru_0.h"):
        lb.simulation(model, samples, with_states(c="float"))
    static = lb.Recipe((*WIDE.rules, lb.Rule("state:*", activations="float")))
    with pytest.raises(UnusedRuleError, match=r"keeps the states of recurrent layers in float.*: integer"):
        lb.simulation(model, samples, static)
    for given in (
        {"activations": "int8"},
        {"activations": "uint8 scale:2^-7"},
        {"weights": "int8"},
        {"activations": "fp16", "prune": 0.5},
        {},
    ):
        with pytest.raises(InputError, match=r"rule 'state:\*': a state has activations alone, in a format"):
            lb.Rule("state:*", **given)


def test_a_sequence_that_ends_is_simulated_as_if_it_were_alone():
    rng = np.random.default_rng(0)
    weights = {"w": rng.normal(size=(2, 96, 10)) / 2, "r": rng.normal(size=(2, 96, 24)) / 4}
    text = """f (float[12,3,10] x, int32[3] n) => (float[12,2,3,24] y) {
        y = LSTM <hidden_size = 24, direction = "bidirectional"> (x, w, r, , n) }"""
    x, n = rng.normal(size=(12, 3, 10)).astype(np.float32), np.array([12, 5, 0], np.int32)
    simulation = lb.simulation(network(text, **weights), [{"x": x, "n": n}], WIDE)
    together = simulated(simulation, {"x": x, "n": n})["y"]
    alone = simulated(simulation, {"x": np.roll(x, -1, 1), "n": np.array([5, 0, 12], np.int32)})["y"]
    assert np.array_equal(together[:, :, 1], alone[:, :, 0])
    assert not together[5:, :, 1].any()
    assert together[:5, :, 1].any()
