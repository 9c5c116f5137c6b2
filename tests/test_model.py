"""A model says what it takes, refuses the rest by name, and saves itself whole or not at all."""

import os
import resource

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

import lowbit.engines.compile as engines
import lowbit.model as model_module
from lowbit.errors import DataError, InputError, ShapeError
from lowbit.model import Model, load


def linear(columns: int = 3) -> onnx.ModelProto:
    """y = x·w."""
    weight = np.arange(2 * columns, dtype=np.float32).reshape(2, columns)
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["y"])],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", 2])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["N", columns])],
        [numpy_helper.from_array(weight, "w")],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)


X = np.ones((1, 2), np.float32)


def test_a_model_shows_its_ports():
    assert repr(load(linear())) == "Model('ModelProto', inputs=['x' float32[N, 2]], outputs=['y' float32[N, 3]])"


@pytest.mark.parametrize(
    ("batch", "error", "words"),
    [
        ({}, DataError, r"input 'x' float32\[N, 2\] is missing; given: nothing"),
        ({"z": X}, DataError, r"input 'x' float32\[N, 2\] is missing; given: 'z'"),
        ({"x": X, "z": X}, DataError, r"no input 'z'; its inputs are 'x' float32\[N, 2\]"),
        ({"x": X.astype(float)}, DataError, r"given float64; convert it with \.astype\('float32'\)"),
        ({"x": X[0]}, ShapeError, r"input 'x' float32\[N, 2\] was given the shape \[2\]"),
        ({"x": np.ones((1, 3), np.float32)}, ShapeError, r"was given the shape \[1, 3\]"),
        (X, DataError, "a batch is a dict of arrays by input name"),
    ],
    ids=["nothing", "other", "too many", "dtype", "rank", "size", "no dict"],
)
def test_what_does_not_fit_an_input_is_named(batch, error, words):
    with pytest.raises(error, match=words):
        load(linear()).run(batch)


def test_a_saved_model_is_the_same_and_tells_its_size(tmp_path):
    model = load(linear())
    model.metadata["lowbit.note"] = "kept"
    size = model.save(tmp_path / "net.onnx")
    again = load(tmp_path / "net.onnx")
    assert size == os.path.getsize(tmp_path / "net.onnx")
    assert again.metadata == {"lowbit.note": "kept"}
    assert np.array_equal(again.run({"x": X})["y"], model.run({"x": X})["y"])


def test_a_model_may_be_saved_over_its_own_file_since_it_is_in_memory(tmp_path):
    onnx.save(linear(), tmp_path / "net.onnx")
    load(tmp_path / "net.onnx").save(tmp_path / "net.onnx")
    assert load(tmp_path / "net.onnx").run({"x": X})["y"].tolist() == [[3, 5, 7]]


def test_a_failed_save_leaves_the_old_file(tmp_path):
    path = tmp_path / "net.onnx"
    load(linear()).save(path)
    before, limits = path.read_bytes(), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limits[1]))
    try:
        with pytest.raises(InputError, match="disk is full or a size limit reached; nothing was changed"):
            load(linear(5000)).save(path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["net.onnx"]


def test_ctrl_c_while_saving_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "net.onnx"
    load(linear()).save(path)
    before = path.read_bytes()

    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        load(linear(7)).save(path)
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["net.onnx"]


def large(monkeypatch) -> None:
    for module in (engines, model_module):
        monkeypatch.setattr(module, "LARGEST_MESSAGE_BYTES", 100)


def test_large_weights_go_beside_the_file_and_come_back(tmp_path, monkeypatch):
    large(monkeypatch)
    size = load(linear(1000)).save(tmp_path / "net.onnx")
    assert sorted(os.listdir(tmp_path)) == ["net.onnx", "net.onnx.data"]
    assert size == sum(os.path.getsize(tmp_path / name) for name in os.listdir(tmp_path))
    assert os.path.getsize(tmp_path / "net.onnx") < 1000
    again = load(tmp_path / "net.onnx")
    assert again.run({"x": X})["y"][0, -1] == 999 + 1999
    assert again.copy().run({"x": X})["y"][0, -1] == 999 + 1999


def test_a_model_is_not_saved_over_the_weights_that_it_still_reads(tmp_path, monkeypatch):
    large(monkeypatch)
    load(linear(1000)).save(tmp_path / "net.onnx")
    model = load(tmp_path / "net.onnx")
    with pytest.raises(InputError, match=r"net\.onnx\.data.*the original would be lost"):
        model.save(tmp_path / "net.onnx")
    model.save(tmp_path / "other.onnx")
    assert load(tmp_path / "other.onnx").run({"x": X})["y"][0, -1] == 999 + 1999


def test_a_copy_is_independent():
    model = load(linear())
    copy = model.copy()
    copy.metadata["only"] = "here"
    copy.program.graph.initializers["w"].const_value = model.program.graph.initializers["w"].const_value
    assert not model.metadata
    assert isinstance(copy, Model)


def test_what_is_no_model_is_refused_by_its_type():
    with pytest.raises(InputError, match=r"cannot load a list: give an ONNX file, its bytes, or a torch\.nn\.Module"):
        load([1, 2])


def test_inputs_of_strings_and_of_unknown_rank_are_let_through():
    graph = helper.make_graph(
        [helper.make_node("Identity", ["s"], ["t"]), helper.make_node("Relu", ["x"], ["y"])],
        "g",
        [helper.make_tensor_value_info("s", TensorProto.STRING, [2]), helper.make_tensor_value_info("x", 1, None)],
        [helper.make_tensor_value_info("t", TensorProto.STRING, [2]), helper.make_tensor_value_info("y", 1, None)],
    )
    model = load(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10))
    out = model.run({"s": np.array(["a", "b"]), "x": -np.ones((1, 2, 1), np.float32)})
    assert out["t"].tolist() == ["a", "b"]
    assert out["y"].sum() == 0
