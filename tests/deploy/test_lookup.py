"""Rows of tables: looked up as codes, in every format, and decoded together where a Concat joins them."""

from collections import Counter

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch
from toy_networks import network

import lowbit as lb
from lowbit.errors import DataError
from lowbit.numerics import parse_format, spell_format

PACKED = "int4 channel:0 scale:uint8 scale_tensor"


def joined(*, stacked: bool) -> lb.Model:
    """Rows of four tables of 300 × 16, stacked or side by side; ids (rows, 4)."""
    rng = np.random.default_rng(0)
    tables = {f"w{k}": rng.standard_normal((300, 16)) for k in range(4)}
    columns = {f"c{k}": np.array(k) for k in range(4)}
    rows, joins = [], []
    for k in range(4):
        rows.append(f"i{k} = Gather<axis=1>(ids, c{k}) e{k} = Gather(w{k}, i{k})")
        joins.append(f"u{k} = Unsqueeze(e{k}, one)" if stacked else "")
    parts = ", ".join(f"u{k}" if stacked else f"e{k}" for k in range(4))
    shape = "n, 4, 16" if stacked else "n, 64"
    text = f"g (int64[n, 4] ids) => (float[{shape}] y) {{ {' '.join(rows + joins)} y = Concat<axis=1>({parts}) }}"
    return network(text, **tables, **columns, one=np.array([1]))


def table(rows: int, columns: int) -> lb.Model:
    weights = np.random.default_rng(0).standard_normal((rows, columns))
    return network(f"g (int64[n, 4] ids) => (float[n, 4, {columns}] y) {{ y = Gather(w, ids) }}", w=weights)


def ids(rows: int = 5, columns: int = 4, below: int = 300) -> np.ndarray:
    return np.random.default_rng(0).integers(0, below, (rows, columns))


def simulated(model: lb.Model, recipe: str, x: np.ndarray) -> np.ndarray:
    network = lb.simulation(model, None, recipe)
    with network.mode("quantize"), torch.no_grad():
        (y,) = network.module(torch.from_numpy(x)).values()
    return y.numpy()


def what_runs(model: lb.Model, path: str) -> Counter[str]:
    """Operators of onnxruntime's optimized graph."""
    options = ort.SessionOptions()
    options.optimized_model_filepath, options.log_severity_level = path, 3
    ort.InferenceSession(ir.to_proto(model.program).SerializeToString(), options, providers=["CPUExecutionProvider"])
    return Counter(node.op_type for node in ir.load(path).graph)


@pytest.mark.parametrize("stacked", [True, False], ids=["stacked", "side by side"])
@pytest.mark.parametrize(
    "words", [PACKED, "int2 channel:0 scale:int8 scale_tensor", "int8 channel:0 scale:int6 scale_tensor"]
)
def test_joined_rows_are_what_was_simulated(words, stacked):
    model = joined(stacked=stacked)
    quantized = lb.quantize(model, None, words)
    exact = simulated(model, words, ids(5))
    for rows in (0, 1, 5):
        (y,) = quantized.run({"ids": ids(5)[:rows]}).values()
        assert np.array_equal(y, exact[:rows])


def test_joined_rows_take_one_gather_a_table_and_are_decoded_once(tmp_path):
    runs = what_runs(lb.quantize(joined(stacked=True), None, PACKED), str(tmp_path / "optimized.onnx"))
    assert runs["Gather"] == 4
    assert runs["DequantizeLinear"] == 2  # of scales and of codes
    assert "Unsqueeze" not in runs


@pytest.mark.parametrize(
    "words",
    [
        "int8 channel:0",
        "int4 channel:0 affine",
        "int3 group:16",
        "nf4",
        "e4m3",
        "mxfp4",
        "mx6",
        "nvfp4",
        "vsq4",
        "codebook4",
        "bases2",
        "apot4",
    ],
)
def test_a_large_table_in_any_format_is_what_was_simulated(words):
    model = table(600, 32)
    (y,) = lb.quantize(model, None, words).run({"ids": ids(below=600)}).values()
    assert np.array_equal(y, simulated(model, words, ids(below=600)))


@pytest.mark.parametrize(("rows", "runs"), [(512, {"Gather": 1}), (513, {"Gather": 2, "Cast": 1, "Mul": 1})])
def test_rows_of_a_table_of_16384_values_cost_one_gather(rows, runs, tmp_path):
    quantized = lb.quantize(table(rows, 32), None, "int8 channel:0")
    assert what_runs(quantized, str(tmp_path / "optimized.onnx")) == runs
    (y,) = quantized.run({"ids": ids(below=rows)}).values()
    assert np.array_equal(y, simulated(table(rows, 32), "int8 channel:0", ids(below=rows)))
    assert quantized.save(tmp_path / "small.onnx") < 1.3 * rows * 32  # a byte a value, four for each scale


def test_rows_of_one_number_deploy():
    model = table(2000, 1)
    (y,) = lb.quantize(model, None, PACKED).run({"ids": ids(below=2000)}).values()
    assert y.shape == (5, 4, 1)
    assert np.array_equal(y, simulated(model, PACKED, ids(below=2000)))


def test_a_packed_table_takes_its_bits(tmp_path):
    model = joined(stacked=True)
    assert lb.quantize(model, None, PACKED).save(tmp_path / "small.onnx") < 4 * 300 * (8 + 1) + 5000  # float: 76,800


def test_scale_tensor_is_a_word():
    words = parse_format(PACKED)
    assert spell_format(words) == "int4 channel:0 scale:uint8 scale_tensor"
    assert words.bits_per_element((100_000, 16)) == pytest.approx(4.5, abs=1e-4)


@pytest.mark.parametrize("recipe", [None, "int4 channel:0", PACKED])
def test_an_index_out_of_range_is_told(recipe):
    model = table(300, 16)
    model = model if recipe is None else lb.quantize(model, None, recipe)
    with pytest.raises(DataError, match=r"index 300 lies outside the table of 300 rows( that node '.+' reads)?\. Give"):
        model.run({"ids": np.array([[1, 2, 3, 300]])})


def test_an_index_out_of_range_in_the_data_is_told():
    with pytest.raises(DataError, match="index -301 lies outside the table of 300 rows"):
        lb.quantize(table(300, 16), {"ids": np.array([[1, 2, 3, -301]])}, PACKED)


def test_a_table_that_two_nodes_read_is_stored_once():
    weights = np.random.default_rng(0).standard_normal((300, 16))
    ports = "g (int64[n, 4] ids, int64[n] more) => (float[n, 4, 16] y, float[n, 16] z)"
    text = ports + "{ y = Gather(w, ids) z = Gather(w, more) }"
    model = lb.quantize(network(text, w=weights), None, "int4 channel:0")
    stored = sum(value.const_value.nbytes for value in model.program.graph.initializers.values())
    assert stored == 300 * (8 + 4)  # the second node read the float table before: 300 * 64 bytes more
    y, z = model.run({"ids": ids(), "more": ids()[:, 0]}).values()
    assert np.array_equal(y[:, 0], z)
