"""What rewrites of the written graph are for, read off the optimized graph of a default session of onnxruntime.

Each is held against the same file without the rewrite: where both run alike, the rewrite has lost its reason.
"""

from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from small_networks import NETWORKS
from toy_networks import network, sqnr_db

import lowbit as lb
from lowbit.deploy import write
from lowbit.deploy.kernels import REWRITES
from lowbit.errors import MismatchError
from lowbit.targets import TARGETS

INT8 = lb.Recipe(lb.RECIPES["int8"]().rules)
_rng = np.random.default_rng(0)
SQUARE, BIAS, ONES = _rng.normal(size=(64, 64)) / 8, _rng.normal(size=64), np.ones(64)


def engine_runs(quantized: lb.Model, folder: Path) -> Counter[str]:
    """Operators of the saved file as a default session runs it."""
    quantized.save(folder / "net.onnx")
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.optimized_model_filepath = str(folder / "optimized.onnx")
    onnxruntime.InferenceSession(str(folder / "net.onnx"), options, providers=["CPUExecutionProvider"])
    return Counter(node.op_type for node in onnx.load(folder / "optimized.onnx").graph.node)


@pytest.fixture
def without(monkeypatch):
    return lambda rewrite: monkeypatch.setattr(write, rewrite, lambda program: [])


@pytest.mark.parametrize("shape", [(1, 16), (2, 16)], ids=str)
def test_a_product_with_a_bias_behind_it_stays_in_integers(shape, tmp_path, without):
    dims = ",".join(map(str, shape))
    text = f"m (float[{dims},64] x) => (float[{dims},64] y) {{ a = MatMul (x, w) y = Add (a, c) }}"
    model = network(text, w=SQUARE, c=BIAS)
    data = [{"x": _rng.normal(size=(*shape, 64)).astype(np.float32)} for _ in range(4)]
    found = engine_runs(lb.quantize(model, data, INT8), tmp_path)
    assert found == {"QuantizeLinear": 1, "MatMulIntegerToFloat": 1}  # with the bias inside
    standard = replace(INT8, target="generic")
    found = engine_runs(lb.quantize(model, data, standard), tmp_path)
    assert found == {"QuantizeLinear": 1, "MatMulIntegerToFloat": 1, "Add": 1}
    without("keep_bias_apart")
    with pytest.raises(MismatchError, match="the ledger says integers, and onnxruntime computes it in float"):
        lb.quantize(model, data, standard)


def test_a_residual_sum_in_front_of_a_layer_norm_is_not_fused_with_it(tmp_path, without):
    text = """m (float[N,16,64] x) => (float[N,16,64] y) {
        a = MatMul (x, w) b = Add (a, c) s = Add (b, x) y = LayerNormalization <axis = -1> (s, g, h) }"""
    model = network(text, w=SQUARE, c=BIAS, g=ONES, h=BIAS)
    x = _rng.normal(size=(8, 16, 64)).astype(np.float32)
    found = engine_runs(lb.quantize(model, x, INT8), tmp_path)
    assert (found["Sum"], found["LayerNormalization"], found["SkipLayerNormalization"]) == (1, 1, 0)
    without("keep_residuals_apart")
    found = engine_runs(lb.quantize(model, x, INT8), tmp_path)
    assert (found["LayerNormalization"], found["SkipLayerNormalization"]) == (0, 1)


def test_an_embedding_is_looked_up_in_codes(tmp_path):
    """No operator at run time makes floats of the whole table: only the rows that were looked up are decoded."""
    table = _rng.normal(size=(500, 64))
    text = "m (int64[N,16] ids) => (float[N,16,64] y) { e = Gather (t, ids) y = MatMul (e, w) }"
    model = network(text, t=table, w=SQUARE)
    ids = _rng.integers(0, 500, size=(8, 16))
    quantized = lb.quantize(model, ids, lb.Recipe(lb.RECIPES["int8-weights"]().rules))
    engine_runs(quantized, tmp_path)
    nodes = onnx.load(tmp_path / "optimized.onnx").graph
    held = {tensor.name: tuple(tensor.dims) for tensor in nodes.initializer}
    read_whole = [node.op_type for node in nodes.node for name in node.input if held.get(name) == table.shape]
    assert read_whole
    assert set(read_whole) <= {"Gather", "GatherBlockQuantized"}
    codes = {t.name: t.data_type for t in nodes.initializer if tuple(t.dims) == table.shape}
    assert onnx.TensorProto.FLOAT not in codes.values()


@pytest.mark.parametrize("name", ["mobile", "residual"])
def test_no_relu_or_clip_is_left_where_codes_saturate_anyway(name, tmp_path):
    model, batch = NETWORKS[name]()
    found = engine_runs(lb.quantize(model, batch), tmp_path)
    assert not {"Relu", "Clip", "DequantizeLinear"} & set(found)
    assert found["QLinearConv"] == {"mobile": 4, "residual": 2}[name]
    written = {node.op_type for node in onnx.load(tmp_path / "net.onnx").graph.node}
    assert not {"Relu", "Clip"} & written


def test_a_relu_stays_where_codes_go_below_zero():
    """Signed codes with zero 0, as TensorRT wants them: −128…127 does not cut at 0, so someone else must."""
    text = "m (float[N,3,8,8] x) => (float[N,4,8,8] y) { a = Conv (x, w) r = Relu (a) y = Conv (r, v) }"
    model = network(text, w=_rng.normal(size=(4, 3, 1, 1)), v=_rng.normal(size=(4, 4, 1, 1)))
    x = _rng.normal(size=(8, 3, 8, 8)).astype(np.float32)
    quantized = lb.quantize(model, x, target="tensorrt")
    relu = next(node for node in quantized.program.graph if node.op_type == "Relu")
    assert relu.inputs[0].producer().op_type == "Conv"
    assert next(iter(relu.outputs[0].uses())).node.op_type == "QuantizeLinear"
    exact, rough = model.run({"x": x})["y"], quantized.run({"x": x})["y"]
    assert np.abs(exact - rough).max() < 0.05 * np.abs(exact).max()


@pytest.mark.parametrize(
    ("text", "products"),
    [
        ("a = MatMul (x, w) b = Mul (x, half) c = Add (a, b) y = MatMul (c, v)", {"MatMulIntegerToFloat": 2}),
        ("a = MatMul (x, w) c = Add (x, a) y = MatMul (c, v)", {"MatMulIntegerToFloat": 2}),
        ("a = MatMul (x, w) b = MatMul (x, v) y = Add (a, b)", {"MatMulIntegerToFloat": 2}),
        ("a = Gemm (x, w) b = Add (a, x) y = LayerNormalization <axis = -1> (b, g)", {"QGemm": 1}),
        ("a = Gemm (x, w) b = MatMul (x, v) y = Add (a, b)", {"QGemm": 1, "MatMulIntegerToFloat": 1}),
    ],
)
def test_a_matrix_with_activations_added_to_it_is_multiplied_in_integers(text, products, tmp_path):
    """onnxruntime makes float Gemms of MatMul + Add, and of Gemm + Sum, before it looks for integers."""
    held = {"w": SQUARE, "v": SQUARE.T, "half": np.float32(0.5), "g": ONES}
    used = {name: value for name, value in held.items() if name in text.replace("axis", "")}
    model = network(f"m (float[N,64] x) => (float[N,64] y) {{ {text} }}", **used)
    x = _rng.normal(size=(64, 64)).astype(np.float32)
    quantized = lb.quantize(model, x, INT8)
    found = engine_runs(quantized, tmp_path)
    assert {op: count for op, count in found.items() if "Gemm" in op or "MatMul" in op} == products
    assert sqnr_db(model.run({"x": x})["y"], lb.load(tmp_path / "net.onnx").run({"x": x})["y"]) > 30  # measured 36


def test_every_target_has_its_rewrites():
    assert set(REWRITES) == set(TARGETS)
