"""Engines run what they are given, say what they cannot, and leave the program as it was."""

import sys
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper, numpy_helper

import lowbit.engines.compile as engines
from lowbit.engines.compile import ENGINES, unsupported
from lowbit.errors import ModelError, UnsupportedError
from lowbit.model import load


@pytest.fixture(params=ENGINES)
def engine(request):
    if request.param == "openvino":
        pytest.importorskip("openvino")
    return ENGINES[request.param]


def tiny(op: str = "Relu", domain: str = "") -> ir.Model:
    """y = op(x·w)."""
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["h"], name="matmul"),
        helper.make_node(op, ["h"], ["y"], name="last", domain=domain),
    ]
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", 2])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["N", 3])],
        [numpy_helper.from_array(np.array([[1, -1, 2], [0, 1, -3]], np.float32), "w")],
    )
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("mine", 1)]
    return load(helper.make_model(graph, opset_imports=opsets, ir_version=10)).program


X = np.array([[1, 2]], np.float32)


def test_an_engine_runs_a_program_and_a_file(engine, tmp_path):
    program = tiny()
    ir.save(program, tmp_path / "net.onnx")
    for source in (program, tmp_path / "net.onnx"):
        assert engine.compile(source, threads=1)({"x": X})["y"].tolist() == [[1, 1, 0]]


def test_intermediate_values_can_be_asked_for(engine, tmp_path):
    program = tiny()
    ir.save(program, tmp_path / "net.onnx")
    for source in (program, tmp_path / "net.onnx"):
        got = engine.compile(source, threads=1, outputs=["h", "y"])({"x": X})
        assert {name: array.tolist() for name, array in got.items()} == {"h": [[1, 1, -4]], "y": [[1, 1, 0]]}
    assert [value.name for value in program.graph.outputs] == ["y"]
    with pytest.raises(ModelError, match="no value 'z'"):
        engine.compile(program, outputs=["z"])


def test_two_batch_sizes_run_on_one_compiled_model(engine):
    run = engine.compile(tiny(), threads=1)
    assert [run({"x": np.repeat(X, n, 0)})["y"].shape for n in (1, 4, 2)] == [(1, 3), (4, 3), (2, 3)]


def test_results_of_one_call_are_not_overwritten_by_the_next(engine):
    run = engine.compile(tiny(), threads=1)
    first = run({"x": X})["y"]
    run({"x": 5 * X})
    assert first.tolist() == [[1, 1, 0]]


def test_an_operator_that_the_engine_lacks_is_named(engine):
    program = tiny("Frobnicate", "mine")
    words = unsupported(engine, program)
    assert "Frobnicate" in words
    assert "\n" not in words
    with pytest.raises(ModelError, match="Frobnicate"):
        engine.compile(program)
    assert unsupported(engine, tiny()) == ""


def test_a_wrong_shape_is_a_model_error_in_one_line(engine):
    with pytest.raises(ModelError) as caught:
        engine.compile(tiny(), threads=1)({"x": np.ones((1, 5), np.float32)})
    assert "\n" not in str(caught.value)


def test_a_model_too_large_for_one_message_goes_through_a_file(engine, monkeypatch):
    monkeypatch.setattr(engines, "LARGEST_MESSAGE_BYTES", 10)
    assert engine.compile(tiny(), threads=1)({"x": X})["y"].tolist() == [[1, 1, 0]]


def test_engines_agree_on_a_real_network(data):
    pytest.importorskip("openvino")
    program = load(data / "speech/kws-dscnn.onnx").program
    x = np.random.default_rng(0).standard_normal((3, 1, 49, 10)).astype(np.float32)
    a, b = (each.compile(program, threads=1)({"input": x})["logits"] for each in ENGINES.values())
    np.testing.assert_allclose(a, b, atol=1e-4 * np.abs(a).max())


def test_a_missing_openvino_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "openvino", None)
    with pytest.raises(UnsupportedError, match=r"pip install 'lowbit\[openvino\]'"):
        ENGINES["openvino"].compile(tiny())


def test_threads_that_compile_one_program_get_the_outputs_that_each_asked_for(monkeypatch):
    """An engine reads a copy: a program that was edited meanwhile had the outputs of one thread in another's file."""
    program, seen = tiny(), []
    whole = engines.serialize

    def slowly(program: ir.Model) -> bytes:
        time.sleep(0.02)
        seen.append([value.name for value in program.graph.outputs])
        return whole(program)

    monkeypatch.setattr(engines, "serialize", slowly)
    wanted = [["h"], ["y"], ["h", "y"], None] * 4
    with ThreadPoolExecutor(8) as pool:
        runs = list(pool.map(lambda names: ENGINES["onnxruntime"].compile(program, threads=1, outputs=names), wanted))
    assert [list(run({"x": X})) for run in runs] == [names or ["y"] for names in wanted]
    assert sorted(seen) == sorted([["y", "h"], ["y"], ["y", "h"], ["y"]] * 4)
    assert [value.name for value in program.graph.outputs] == ["y"]


def test_a_program_with_external_weights_is_only_read(monkeypatch, tmp_path):
    ir.save(tiny(), tmp_path / "net.onnx", external_data="weights", size_threshold_bytes=1)
    program = ir.load(tmp_path / "net.onnx")
    weight = program.graph.initializers["w"]
    tensor, untouched, whole = weight.const_value, [], ir.to_proto

    def watched(copy: ir.Model) -> onnx.ModelProto:
        untouched.append(weight.const_value is tensor)
        return whole(copy)

    monkeypatch.setattr(ir, "to_proto", watched)
    data = engines.serialize(program)
    assert isinstance(tensor, ir.ExternalTensor)
    assert untouched == [True]
    assert load(data).run({"x": X})["y"].tolist() == [[1, 1, 0]]
