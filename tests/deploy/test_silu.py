"""A convolution in front of a SiLU runs in the arithmetic that is faster there, read off the engine's own graph."""

import tempfile
from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from toy_networks import network

import lowbit as lb
from lowbit.engines.read_back import FLOAT, INTEGERS, read_back
from lowbit.network.place import place
from lowbit.report.ledger import Ledger

RNG = np.random.default_rng(0)
X = RNG.normal(size=(16, 128, 6, 6)).astype(np.float32)
SILU = "s = Sigmoid (a) m = Mul (a, s) y = Conv (m, u)"
CONVOLUTIONS = {  # weight, attributes, arithmetic
    "9 products, depthwise": ((128, 1, 3, 3), "group = 128", FLOAT),
    "64 products": ((128, 64, 1, 1), "group = 2", FLOAT),
    "128 products": ((128, 128, 1, 1), "group = 1", INTEGERS),
    "576 products": ((128, 64, 3, 3), "group = 2", INTEGERS),
}


def two_convolutions(case: str, between: str = SILU) -> lb.Model:
    shape, attributes, _ = CONVOLUTIONS[case]
    return network(
        f"t (float[N,128,6,6] x) => (float y) {{ a = Conv <{attributes}> (x, w) {between} }}",
        w=RNG.normal(size=shape) / 8,
        u=RNG.normal(size=(128, 128, 1, 1)) / 12,
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


@pytest.mark.parametrize("case", CONVOLUTIONS)
def test_a_convolution_of_few_products_in_front_of_a_silu_computes_in_float(case):
    quantized = lb.quantize(two_convolutions(case), X, "int8-fast")
    runs, found = read_back(quantized.program, "onnxruntime"), operators(quantized)
    (row,) = [row for row in Ledger.of(quantized).rows if row["tensor"] == "w"]
    assert row["arithmetic"] == runs.of("conv_0") == CONVOLUTIONS[case][2]
    assert runs.of("conv_3") == INTEGERS
    if CONVOLUTIONS[case][2] == FLOAT:
        assert (found["QuickGelu"], found["QLinearSigmoid"], found["QLinearMul"]) == (1, 0, 0)
    else:
        assert (found["QuickGelu"], found["QLinearSigmoid"], found["QLinearMul"]) == (0, 1, 1)


def test_its_weights_are_stored_in_int8_all_the_same_and_the_ledger_says_why_it_is_float():
    quantized = lb.quantize(two_convolutions("64 products"), X, "int8-fast")
    rows = Ledger.of(quantized).rows
    (weight,) = [row for row in rows if row["tensor"] == "w"]
    assert (weight["status"], weight["bits"]) == ("quantized", 8.5)  # 32 bits of scale for 64 values
    (reason,) = [row["reason"] for row in rows if row["layer"] == "conv_0" and row["role"] == "activation"]
    assert reason == "64 products an output save less time in integers than its SiLU loses there"


@pytest.mark.parametrize(
    "between",
    [
        "m = Relu (a) y = Conv (m, u)",
        "s = Sigmoid (a) y = Conv (s, u)",
        "s = Sigmoid (a) m = Mul (a, s) n = Add (m, a) y = Conv (n, u)",
        "s = Sigmoid (a) m = Mul (s, s) n = Mul (m, a) y = Conv (n, u)",
    ],
)
def test_without_a_silu_it_computes_in_integers(between):
    quantized = lb.quantize(two_convolutions("64 products", between), X, "int8-fast")
    assert read_back(quantized.program, "onnxruntime").of("conv_0") == INTEGERS


@pytest.mark.parametrize(("target", "integer"), [("onnxruntime", False), ("generic", True), ("openvino", True)])
def test_the_target_says_how_many_products_are_few(target, integer):
    placement = place(two_convolutions("64 products").program, lb.RECIPES["int8"](target))
    assert ("conv_0" in placement.integer) is integer
