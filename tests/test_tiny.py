"""The whole path on a toy, in under five seconds: `pytest -m tiny`. When this fails, look here first."""

import numpy as np
import onnx
import pytest
from toy_networks import convolutions, images, sqnr_db

import lowbit as lb
from lowbit.report.ledger import Ledger

pytestmark = pytest.mark.tiny


def test_a_network_becomes_integers_and_still_does_its_job(tmp_path):
    model = convolutions()
    quantized = lb.quantize(model, images())
    quantized.save(tmp_path / "toy.int8.onnx")

    stored = {t.name: t for t in onnx.load(tmp_path / "toy.int8.onnx").graph.initializer}
    assert stored["conv1.weight"].data_type == onnx.TensorProto.INT8
    assert stored["conv1.bias"].data_type == onnx.TensorProto.INT32
    assert onnx.TensorProto.UINT8 in {t.data_type for t in stored.values()}  # zero points of activations
    assert not any(t.data_type == onnx.TensorProto.FLOAT and np.prod(t.dims) > 16 for t in stored.values())

    x = images(seed=2)
    exact = model.run({"x": x})["logits"]
    rough = lb.load(tmp_path / "toy.int8.onnx").run({"x": x})["logits"]
    assert sqnr_db(exact, rough) > 30  # measured 37

    report = lb.compare(model, quantized, (x, exact.argmax(1)), metric="top1", latency=False)
    assert report.reference.metric == 1.0
    assert report.kept == "keeps"


def test_the_recipe_and_the_ledger_travel_in_the_file(tmp_path):
    lb.quantize(convolutions(), images()).save(tmp_path / "toy.int8.onnx")
    model = lb.load(tmp_path / "toy.int8.onnx")
    assert lb.Recipe.from_toml(model.metadata["lowbit.recipe"]) == lb.RECIPES["int8"]()
    rows = {row["tensor"]: row for row in Ledger.of(model).rows}
    assert rows["conv1.weight"]["format"] == "int8 channel:0"
    assert {row["status"] for row in rows.values()} <= {"quantized", "float", "kept"}


def test_a_tensor_is_quantized_in_one_line():
    x = np.linspace(-1, 1, 1000, dtype=np.float32)
    quantized = lb.quantize_tensor(x, "int8")
    assert np.abs(np.asarray(quantized.dequantize()) - x).max() <= 1 / 127 / 2 + 1e-7  # half a step
    assert lb.error(x, "int8").sqnr_db > 45
