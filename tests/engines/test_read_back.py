"""What an engine makes of a file, held against the ledger: a difference is an error in either direction."""

import json

import numpy as np
import pytest
from toy_networks import convolutions, images, network

import lowbit as lb
from lowbit.engines.read_back import BY_BLOCK, FLOAT, INTEGERS, ReadBack, read_back
from lowbit.errors import MismatchError
from lowbit.flows import ptq
from lowbit.report.ledger import Ledger

LAYERS = ["conv_0", "conv_3", "gemm_7"]


@pytest.mark.parametrize("engine", ["onnxruntime", "openvino"])
def test_the_layers_of_a_quantized_toy_run_in_integers_and_those_of_the_float_one_do_not(engine):
    pytest.importorskip(engine)
    quantized = lb.quantize(convolutions(), images(), target=engine)
    assert [read_back(quantized.program, engine).of(name) for name in LAYERS] == [INTEGERS] * 3
    assert [read_back(convolutions().program, engine).of(name) for name in LAYERS] == [FLOAT] * 3


@pytest.mark.parametrize("last", ["MatMul (r, v)", "Gemm (r, v)"])
def test_a_layer_that_makes_the_output_is_read_back_from_openvino(last):
    """OpenVINO calls it by the name of the output."""
    pytest.importorskip("openvino")
    rng = np.random.default_rng(0)
    text = f"m (float[N,32] x) => (float[N,8] y) {{ a = Gemm (x, w) r = Relu (a) y = {last} }}"
    model = network(text, w=rng.normal(size=(32, 32)), v=rng.normal(size=(32, 8)))
    quantized = lb.quantize(model, rng.normal(size=(32, 32)).astype(np.float32), target="openvino")
    found = read_back(quantized.program, "openvino")
    assert [found.of(str(n.name)) for n in quantized.program.graph if n.op_type in ("Gemm", "MatMul")] == [INTEGERS] * 2
    assert [port.name for port in quantized.outputs] == ["y"]


def test_a_kernel_that_rounds_activations_by_block_is_called_so():
    model = network(
        "m (float[N,64] x) => (float[N,64] y) { y = MatMul (x, w) }", w=np.random.default_rng(0).normal(size=(64, 64))
    )
    spec = lb.Rule("*", lb.TensorSpec("int4 group:32"), lb.TensorSpec("int8 group:32"))
    quantized = lb.quantize(model, np.ones((4, 64), np.float32) * np.arange(64, dtype=np.float32), lb.Recipe((spec,)))
    assert read_back(quantized.program, "onnxruntime").of("matmul_0") == BY_BLOCK
    assert {row["tensor"]: row.get("arithmetic") for row in Ledger.of(quantized).rows}["w"] == BY_BLOCK


@pytest.mark.parametrize(
    ("kept", "found", "said"),
    [
        ((), {"conv_0": INTEGERS, "gemm_7": INTEGERS}, r"'conv_3' \(Conv, weight 'conv2.weight'\).*integers.*in float"),
        (("conv_3",), dict.fromkeys(LAYERS, INTEGERS), r"'conv_3' \(Conv, .*says float.*QLinearConv \(integers\)"),
    ],
)
def test_a_difference_between_ledger_and_engine_is_an_error_that_names_the_layer(kept, found, said, monkeypatch):
    monkeypatch.setattr(
        ptq, "read_back", lambda program, engine: ReadBack(engine, found, dict.fromkeys(found, "QLinearConv"))
    )
    with pytest.raises(MismatchError, match=said):
        lb.quantize(convolutions(), images(), lb.RECIPES["int8"]().keep_float(*kept))


def test_the_ledger_states_the_arithmetic_of_every_layer():
    rows = Ledger.of(lb.quantize(convolutions(), images(), lb.RECIPES["int8"]().keep_float("conv_3"))).rows
    stated = {row["tensor"]: row["arithmetic"] for row in rows if "arithmetic" in row}
    assert stated == {"conv1.weight": INTEGERS, "conv2.weight": FLOAT, "fc.weight": INTEGERS}


def test_an_engine_that_is_not_installed_is_said_to_be_unread():
    parity = json.loads(lb.quantize(convolutions(), images(), target="tensorrt").metadata["lowbit.parity"])
    assert parity["read_back"] == "tensorrt is not installed here: what it makes of the file was not read back"
    assert json.loads(lb.quantize(convolutions(), images()).metadata["lowbit.parity"])["read_back"] == "onnxruntime"
