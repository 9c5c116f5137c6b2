"""GRU and RNN whose products are in integers: a Scan in the file, the same steps in the simulation, and the proof."""

from dataclasses import replace

import numpy as np
import onnx_ir as ir
import pytest
import torch
from toy_networks import network, sqnr_db

import lowbit as lb
from lowbit import targets
from lowbit.deploy.export import export
from lowbit.deploy.proof import verify
from lowbit.engines.compile import ENGINES
from lowbit.engines.read_back import read_back
from lowbit.errors import DataError, MismatchError, ModelError
from lowbit.report.ledger import Ledger

STATES = 16
GATES = {"GRU": 3, "RNN": 1}


@pytest.fixture(autouse=True)
def small_layers_count_too(monkeypatch):
    """Integers from the first state on; real targets ask for some hundred, from where they are faster."""
    every = {name: replace(t, dynamic=dict.fromkeys(t.dynamic, 1)) for name, t in targets.TARGETS.items()}
    monkeypatch.setattr(targets, "TARGETS", every)


def recurrence(op: str, directions: int = 1, how: str = "", lengths: bool = True, first: bool = True) -> lb.Model:
    """A recurrent layer of 24 inputs, its sequence lengths and first states, all batch first."""
    rng, gates = np.random.default_rng(4), GATES[op] * STATES
    given = ", int32[B] lengths" * lengths + f", float[B,{directions},{STATES}] first" * first
    start = "h = Transpose <perm = [1,0,2]> (first)" if first else ""
    read = [" lengths" if lengths else "", " h" if first else ""]
    return network(
        f"""
        toy (float[B,T,24] x{given}) => (float[B,{directions},T,{STATES}] y, float[B,{directions},{STATES}] last) {{
            steps = Transpose <perm = [1,0,2]> (x)
            {start}
            ys, hs = {op} <hidden_size = {STATES}{how}> (steps, w, r, b,{read[0]},{read[1]})
            y = Transpose <perm = [2,1,0,3]> (ys)
            last = Transpose <perm = [1,0,2]> (hs)
        }}""",
        w=rng.normal(size=(directions, gates, 24)) / 4,
        r=rng.normal(size=(directions, gates, STATES)) / 4,
        b=rng.normal(size=(directions, 2 * gates)) / 10,
    )


def sequences(model: lb.Model, lengths: tuple[int, ...] = (20, 3, 11, 1, 0), steps: int = 20) -> dict[str, np.ndarray]:
    rng, every = np.random.default_rng(5), {}
    for port in model.inputs:
        shape = [{"B": len(lengths), "T": steps}.get(str(d), d) for d in port.shape]
        every[port.name] = rng.normal(size=shape).astype(np.float32)
    return every | ({"lengths": np.array(lengths, np.int32)} if "lengths" in every else {})


FORMS = [
    ("GRU", 1, ""),
    ("GRU", 1, ", linear_before_reset = 1"),
    ("GRU", 1, ', direction = "reverse"'),
    ("GRU", 2, ', direction = "bidirectional", linear_before_reset = 1'),
    ("RNN", 1, ""),
    ("RNN", 1, ', activations = ["Relu"]'),
    ("RNN", 2, ', direction = "bidirectional"'),
]


@pytest.mark.parametrize("given", [(True, True), (False, False)], ids=["lengths and states", "x alone"])
@pytest.mark.parametrize(("op", "directions", "how"), FORMS)
def test_the_file_computes_what_the_simulation_does(op, directions, how, given):
    model = recurrence(op, directions, how, *given)
    quantized = lb.quantize(model, None, "int8-dynamic")
    layer = next(node.name for node in model.program.graph if node.op_type == op)
    assert read_back(quantized.program, "onnxruntime").operators[layer] == "DynamicQuantizeMatMul"
    assert op not in {node.op_type for node in quantized.program.graph}
    simulation, batch = lb.simulation(model, None, "int8-dynamic"), sequences(model)
    with simulation.mode("quantize"), torch.no_grad():
        own = simulation.module(*map(torch.from_numpy, batch.values()))
    found, exact = ENGINES["onnxruntime"].compile(quantized.program, threads=1)(batch), model.run(batch)
    for name in ("y", "last"):
        assert np.abs(found[name] - own[name].numpy()).max() < 0.01  # a state on a tie; most runs 2e-7
        assert sqnr_db(exact[name], found[name]) > 30


@pytest.mark.parametrize("op", GATES)
@pytest.mark.parametrize("steps", [1, 300])
def test_the_file_takes_any_length_in_time(op, steps):
    model = recurrence(op, lengths=False)
    quantized, batch = lb.quantize(model, None, "int8-dynamic"), sequences(model, lengths=(0,) * 3, steps=steps)
    simulation = lb.simulation(model, None, "int8-dynamic")
    with simulation.mode("quantize"), torch.no_grad():
        own = simulation.module(*map(torch.from_numpy, batch.values()))
    found = quantized.run(batch)
    assert found["y"].shape == own["y"].shape == (3, 1, steps, STATES)
    assert np.abs(found["last"] - own["last"].numpy()).max() < 0.01


@pytest.mark.parametrize("recipe", [None, "int8-dynamic"])
def test_an_lstm_without_a_sequence_is_refused_and_without_a_step_gives_none(recipe):
    """onnxruntime ends the whole process where there is no sequence."""
    rng = np.random.default_rng(0)
    model = network(
        "toy (float[T,batch,8] x) => (float[T,1,batch,4] y) { y = LSTM <hidden_size = 4> (x, w, r) }",
        w=rng.normal(size=(1, 16, 8)),
        r=rng.normal(size=(1, 16, 4)),
    )
    model = model if recipe is None else lb.quantize(model, None, recipe)
    assert model.run({"x": np.zeros((0, 2, 8), np.float32)})["y"].shape == (0, 1, 2, 4)
    with pytest.raises(DataError, match=r"input 'x' \(3, 0, 8\) is empty: .* Give one step of one sequence at least"):
        model.run({"x": np.zeros((3, 0, 8), np.float32)})


def test_no_steps_at_all_are_refused():
    """onnxruntime's float GRU ends the whole process there."""
    model = recurrence("GRU", lengths=False)
    quantized, batch = lb.quantize(model, None, "int8-dynamic"), sequences(model, lengths=(0,) * 3, steps=0)
    with pytest.raises(ModelError, match=r"'x' \(3, 0, 24\) is empty, and onnxruntime failed .* Scan node"):
        quantized.run(batch)
    with pytest.raises(DataError, match=r"input 'x' \(3, 0, 24\) is empty: .* Give one step of one sequence at least"):
        model.run(batch)
    simulation = lb.simulation(model, None, "int8-dynamic")
    with simulation.mode("quantize"), torch.no_grad():
        assert simulation.module(*map(torch.from_numpy, batch.values()))["y"].shape == (3, 1, 0, STATES)


@pytest.mark.parametrize(("op", "wrong"), [("GRU", 21), ("RNN", -1)])
def test_a_length_outside_the_steps_is_refused(op, wrong):
    model = recurrence(op)
    batch = sequences(model) | {"lengths": np.array([20, 3, wrong, 1, 0], np.int32)}
    for run in (model.run, lb.quantize(model, None, "int8-dynamic").run):
        with pytest.raises(DataError, match="a sequence length lies outside 0 to 20, the number of steps"):
            run(batch)
    simulation = lb.simulation(model, None, "int8-dynamic")
    with simulation.mode("quantize"), pytest.raises(DataError, match=f"outside 0 to 20, .*: .* {wrong}, 1, 0"):
        simulation.module(*map(torch.from_numpy, batch.values()))


@pytest.mark.parametrize("op", ["LSTM", "GRU", "RNN"])
def test_rows_of_one_element_are_what_the_simulation_computes(op):
    rng, gates = np.random.default_rng(0), {"LSTM": 4, **GATES}[op]
    model = network(
        f"toy (float[T,batch,1] x) => (float[T,1,batch,1] y) {{ y = {op} <hidden_size = 1> (x, w, r, b) }}",
        w=rng.normal(size=(1, gates, 1)),
        r=rng.normal(size=(1, gates, 1)),
        b=rng.normal(size=(1, 2 * gates)),
    )
    quantized, simulation = lb.quantize(model, None, "int8-dynamic"), lb.simulation(model, None, "int8-dynamic")
    assert op not in {node.op_type for node in quantized.program.graph}
    for x in (np.ones((1, 1, 1), np.float32), np.zeros((3, 1, 1), np.float32), rng.normal(size=(4, 1, 1))):
        with simulation.mode("quantize"), torch.no_grad():
            own = simulation.module(torch.tensor(x, dtype=torch.float32))["y"].numpy()
        assert np.abs(quantized.run({"x": x.astype(np.float32)})["y"] - own).max() < 1e-6


def test_what_stands_behind_the_end_of_a_sequence_does_not_count():
    model = recurrence("GRU")
    quantized, batch = lb.quantize(model, None, "int8-dynamic"), sequences(model, (20, 3))
    before = quantized.run(batch)
    batch["x"][1, 3:] = 1e6
    after = quantized.run(batch)
    assert all(np.array_equal(before[name], after[name]) for name in before)
    assert np.all(after["y"][1, :, 3:] == 0)


def test_the_proof_sees_a_wrong_weight_of_a_gru():
    model = recurrence("GRU", how=", linear_before_reset = 1")
    simulation = lb.simulation(model, None, "int8-dynamic")
    program = export(simulation)
    codes = program.graph.initializers["r_codes"]
    codes.const_value = ir.tensor(codes.const_value.numpy()[:, ::-1].copy())
    with pytest.raises(MismatchError, match=r"layer 'gru_2': onnxruntime and the simulation differ by .* of 'ys'"):
        verify(simulation, program, [sequences(model)])


def test_few_states_stay_in_float_with_weights_in_int8(monkeypatch):
    fewest = {name: replace(t, dynamic={"GRU": STATES + 1}) for name, t in targets.TARGETS.items()}
    monkeypatch.setattr(targets, "TARGETS", fewest)
    quantized = lb.quantize(recurrence("GRU", lengths=False), None, "int8-dynamic")
    rows = {row["tensor"]: row for row in Ledger.of(quantized).rows}
    assert (rows["w"]["format"], rows["w"]["arithmetic"]) == ("int8 channel:1", "float")
    assert rows["ys"]["reason"] == "GRU of 16 states, which target 'onnxruntime' computes faster in float under 17"


def test_targets_say_from_how_many_states_integers_are_faster(monkeypatch):
    monkeypatch.undo()
    found = targets.find_target("onnxruntime").dynamic
    assert (found["GRU"], found["RNN"], found["LSTM"]) == (320, 192, 1)


@pytest.mark.parametrize("op", GATES)
def test_a_range_for_each_row_is_simulated(op):
    """One sequence a hundred times larger than the others takes the range of all of them, but not of their rows."""
    model, found = recurrence(op, lengths=False), {}
    batch = sequences(model, (0,) * 4)
    batch["x"][0] *= 100
    exact = model.run(batch)["y"][1:]
    for kind in ("uint8", "uint8 group:0"):
        spec = lb.TensorSpec(kind, "minmax", dynamic=True)
        simulation = lb.simulation(model, None, lb.Recipe((lb.Rule("*", "int8 channel:0", spec),)))
        with simulation.mode("quantize"), torch.no_grad():
            found[kind] = sqnr_db(exact, simulation.module(*map(torch.from_numpy, batch.values()))["y"].numpy()[1:])
    assert found["uint8 group:0"] > found["uint8"] + 15
