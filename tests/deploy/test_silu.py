"""A SiLU between two integer layers is one float operator of onnxruntime, read off the engine's own graph."""

import tempfile
from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from toy_networks import network

import lowbit as lb
from lowbit.engines.read_back import INTEGERS, read_back
from lowbit.network.place import place
from lowbit.repair.wider import layers_around
from lowbit.report.ledger import Ledger

RNG = np.random.default_rng(0)
X = RNG.normal(size=(16, 32, 6, 6)).astype(np.float32)
SILU = "s = Sigmoid (a) m = Mul (a, s) y = Conv (m, u)"


def two_convolutions(between: str = SILU, groups: int = 1) -> lb.Model:
    return network(
        f"t (float[N,32,6,6] x) => (float y) {{ a = Conv <group = {groups}> (x, w) {between} }}",
        w=RNG.normal(size=(32, 32 // groups, 1, 1)) / 6,
        u=RNG.normal(size=(32, 32, 1, 1)) / 6,
    )


def operators(model: lb.Model) -> Counter[str]:
    """How often each operator is in the graph that a default session of onnxruntime runs."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    with tempfile.TemporaryDirectory() as folder:
        options.optimized_model_filepath = str(Path(folder) / "optimized.onnx")
        model.save(Path(folder) / "model.onnx")
        onnxruntime.InferenceSession(str(Path(folder) / "model.onnx"), options, providers=["CPUExecutionProvider"])
        return Counter(node.op_type for node in onnx.load(options.optimized_model_filepath).graph.node)


@pytest.mark.parametrize("between", [SILU, SILU.replace("a, s", "s, a")])
@pytest.mark.parametrize("groups", [1, 32])
def test_both_convolutions_compute_in_integers_and_the_silu_between_them_is_one_quickgelu(between, groups):
    quantized = lb.quantize(two_convolutions(between, groups), X, "int8-fast")
    runs, found = read_back(quantized.program, "onnxruntime"), operators(quantized)
    assert runs.of("conv_0") == runs.of("conv_3") == INTEGERS
    assert (found["QuickGelu"], found["QLinearSigmoid"], found["QLinearMul"], found["Sigmoid"]) == (1, 0, 0, 0)


def test_the_file_loads_again_and_the_ledger_says_why_the_silu_is_float(tmp_path):
    quantized = lb.quantize(two_convolutions(), X, "int8-fast")
    quantized.save(tmp_path / "q.onnx")
    again = lb.load(tmp_path / "q.onnx").run({"x": X})["y"]
    assert np.array_equal(again, quantized.run({"x": X})["y"])
    reasons = {row["layer"]: row["reason"] for row in Ledger.of(quantized).rows if row["status"] == "float"}
    assert reasons["mul_2"] == "Mul of a SiLU, which target 'onnxruntime' computes faster in float"


@pytest.mark.parametrize(
    ("between", "integer"),
    [
        ("s = Sigmoid (a) y = Conv (s, u)", {"sigmoid_1"}),
        ("s = Sigmoid (a) m = Mul (s, s) n = Mul (m, a) y = Conv (n, u)", {"sigmoid_1", "mul_2", "mul_3"}),
        ("s = Sigmoid (a) m = Mul (a, s) n = Add (m, s) y = Conv (n, u)", {"sigmoid_1", "mul_2", "add_3"}),
    ],
)
def test_a_sigmoid_that_is_no_silu_computes_in_integers(between, integer):
    runs = read_back(lb.quantize(two_convolutions(between), X, "int8-fast").program, "onnxruntime")
    assert {name for name in integer if runs.of(name) == INTEGERS} == integer


@pytest.mark.parametrize(("target", "integer"), [("onnxruntime", False), ("generic", True)])
def test_the_target_says_where_a_silu_computes(target, integer):
    placement = place(two_convolutions().program, lb.RECIPES["int8"](target))
    assert ("sigmoid_1" in placement.integer, "mul_2" in placement.integer) == (integer, integer)
    assert "conv_0" in placement.integer


def test_a_silu_that_is_float_anyway_is_no_layer_to_leave_in_float():
    program = two_convolutions().program
    placement = place(program, lb.RECIPES["int8"]("onnxruntime"))
    assert layers_around(program, placement, "a") == ["conv_0"]
