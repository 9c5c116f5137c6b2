"""Attention, normalization and recurrence in integers: close to float, and the same bytes in C."""

from pathlib import Path

import numpy as np
import pytest
import torch
from compiled import codes_of, program_of, quantized, reference_bytes, run_c
from recurrent_toys import RECURRENT, recurrent
from toy_networks import network, sqnr_db

from lowbit.engines.compile import ENGINES
from lowbit.errors import UnsupportedError
from lowbit.integer.engine import IntegerReference
from lowbit.integer.program import Normalize, Program, Recurrent, Softmax, Tensor
from lowbit.integer.reference import run
from lowbit.integer.sequences import fixed
from lowbit.model import Model, load

BLOCK = """
    f (float[N,6,16] x) => (float[N,6,16] output) {
        q = MatMul (x, wq)  k = MatMul (x, wk)  v = MatMul (x, wv)
        kt = Transpose <perm = [0,2,1]> (k)
        scores = MatMul (q, kt)
        scaled = Mul (scores, quarter)
        share = Softmax <axis = -1> (scaled)
        mixed = MatMul (share, v)
        sum = Add (mixed, x)
        normal = LayerNormalization <axis = -1> (sum, gain, shift)
        up = MatMul (normal, wu)
        active = Gelu (up)
        output = MatMul (active, wd)
    }"""


def transformer() -> tuple[Model, dict[str, np.ndarray]]:
    r = np.random.default_rng(0)
    square = {f"w{n}": r.normal(size=(16, 16)) / 4 for n in "qkv"}
    ends = {"wu": r.normal(size=(16, 32)) / 4, "wd": r.normal(size=(32, 16)) / 5}
    beside = {"gain": r.uniform(0.5, 2, 16), "shift": r.normal(size=16) / 4, "quarter": np.float32(0.25)}
    return network(BLOCK, **square, **ends, **beside), {"x": r.normal(size=(64, 6, 16)).astype(np.float32)}


def test_a_transformers_block_is_31_db_from_float_and_the_same_bytes_in_c(tmp_path: Path):
    model, batch = transformer()
    file = quantized(model, batch)
    program = program_of(file)
    kinds = [type(layer).__name__ for layer in program.layers]
    assert kinds.count("Product") == 2
    assert {"Softmax", "Normalize"} <= set(kinds)
    exact, ours = model.run(batch)["output"], IntegerReference().compile(file.program)(batch)["output"]
    assert sqnr_db(exact, ours) > 31  # measured 31.9
    theirs = ENGINES["onnxruntime"].compile(file.program)(batch)["output"]
    assert np.abs(ours - theirs).max() < 3.5 * program.outputs[0].scale
    for rounding in ("onnxruntime", "twice"):
        program = program_of(file, rounding)
        codes = codes_of(program, batch)
        sanitized = ["-fsanitize=undefined", "-fno-sanitize-recover"]
        assert run_c(program, codes, tmp_path, "gcc", *sanitized) == reference_bytes(program, codes)


def alone(layer: Softmax | Normalize) -> Program:
    return Program((layer.input,), (layer.output,), ("y",), (layer,))


@pytest.mark.parametrize("scale", [0.01, 0.1, 0.7])
def test_softmax_is_within_half_a_step_and_a_hundredth(scale: float):
    x = Tensor("x", (1, 40), (0, 1), scale, 3)
    y = Tensor("y", (1, 40), (0, 1), 1 / 256, -128)
    layer = Softmax("y", x, y, fixed(scale * np.log2(np.e) * 2.0**16), fixed(2.0**-30 / y.scale), -128, 127)
    codes = np.random.default_rng(0).integers(-128, 128, (500, 40)).astype(np.int8)
    real = np.exp((codes.astype(float) - 3) * scale)
    wanted = real / real.sum(1, keepdims=True) * 256 - 128
    assert np.abs(np.clip(wanted, -128, 127) - run(alone(layer), {"x": codes})["y"]).max() < 0.51


def test_layer_normalization_is_within_half_a_step_and_a_hundredth():
    text = "f (float[N,40] x) => (float[N,40] y) { y = LayerNormalization (x, gain, shift) }"
    r = np.random.default_rng(0)
    gain, shift = r.uniform(0.5, 2, 40).astype(np.float32), r.normal(size=40).astype(np.float32)
    x = (r.normal(size=(300, 40)) * r.uniform(0.05, 3, (300, 1))).astype(np.float32)
    program = program_of(quantized(network(text, gain=gain, shift=shift), {"x": x}))
    (given,), (made,) = program.inputs, program.outputs
    codes = codes_of(program, {"x": x})["x"]
    real = (codes.astype(float) - given.zero) * given.scale
    normal = (real - real.mean(1, keepdims=True)) / np.sqrt(real.var(1, keepdims=True) + 1e-5)
    wanted = (normal * gain + shift) / made.scale + made.zero
    assert np.abs(np.clip(wanted, -128, 127) - run(program, {"x": codes})[made.name]).max() < 0.51


FAST = ("LSTM with states", "GRU", "GRU with its reset before and a state")  # a C compiler runs in each


@pytest.mark.parametrize("case", [c if c in FAST else pytest.param(c, marks=pytest.mark.slow) for c in RECURRENT])
def test_recurrent_layers_with_16_bit_states_are_30_db_from_float_and_the_same_bytes_in_c(case: str, tmp_path: Path):
    model, samples = recurrent(case)
    file = quantized(model, samples)
    program = program_of(file)
    assert any(isinstance(layer, Recurrent) for layer in program.layers)
    for batch in samples[:2]:
        exact, ours = model.run(batch), IntegerReference().compile(file.program)(batch)
        for name, values in exact.items():
            assert sqnr_db(values, ours[name].reshape(values.shape)) > 30, name
    rng = np.random.default_rng(0)
    codes = {t.name: rng.integers(-128, 128, (6, t.size)).astype(np.int8) for t in program.inputs}
    sanitized = ["-fsanitize=undefined,address", "-fno-sanitize-recover"]
    assert run_c(program, codes, tmp_path, "gcc", *sanitized) == reference_bytes(program, codes)


@pytest.mark.parametrize(("op", "gates"), [("LSTM", 4), ("GRU", 3), ("RNN", 1)])
def test_one_step_of_one_value_is_40_db_from_float(op: str, gates: int):
    rng = np.random.default_rng(0)
    weights = {
        "w": rng.normal(size=(1, gates, 1)),
        "r": rng.normal(size=(1, gates, 1)),
        "b": rng.normal(size=(1, 2 * gates)),
    }
    text = f"f (float[1,1,1] x) => (float[1,1,1,1] y) {{ y = {op} <hidden_size = 1> (x, w, r, b) }}"
    model = network(text, **weights)
    samples = [{"x": rng.uniform(-1, 1, (1, 1, 1)).astype(np.float32)} for _ in range(8)]
    run_integers = IntegerReference().compile(quantized(model, samples).program)
    exact, ours = (np.array([run(x)["y"].item() for x in samples]) for run in (model.run, run_integers))
    assert sqnr_db(exact, ours) > 40


class Suppressor(torch.nn.Module):
    """The shape of a noise suppressor: two GRUs, gains behind them."""

    def __init__(self) -> None:
        super().__init__()
        self.layers, self.behind = torch.nn.GRU(16, 40, 2, batch_first=True), torch.nn.Linear(40, 16)

    def forward(self, x):
        return self.behind(self.layers(x)[0])


@pytest.mark.slow
def test_stacked_grus_exported_from_torch_are_30_db_from_float_and_the_same_bytes_in_c(tmp_path: Path):
    torch.manual_seed(0)
    x = np.random.default_rng(0).normal(size=(24, 20, 16)).astype(np.float32)
    model = load(Suppressor().eval(), torch.tensor(x[:1]))
    batch = {model.inputs[0].name: x}
    file = quantized(model, batch)
    program = program_of(file)
    assert [type(layer) for layer in program.layers].count(Recurrent) == 2
    ((name, exact),) = model.run(batch).items()
    assert sqnr_db(exact, IntegerReference().compile(file.program)(batch)[name]) > 30
    codes = codes_of(program, batch)
    assert run_c(program, codes, tmp_path, "gcc") == reference_bytes(program, codes)


def test_a_recurrent_form_without_integers_is_named():
    text = """f (float[12,1,10] x) => (float[12,1,1,24] y) {
        y, h = RNN <hidden_size = 24, activations = ["Relu"]> (x, w, r, b)
    }"""
    shapes = {"w": (1, 24, 10), "r": (1, 24, 24), "b": (1, 48)}
    weights = {name: np.random.default_rng(0).normal(size=shape) for name, shape in shapes.items()}
    with pytest.raises(UnsupportedError, match="RNN with Relu, whose states have no bound"):
        quantized(network(text, **weights), [{"x": np.ones((12, 1, 10), np.float32)}])
