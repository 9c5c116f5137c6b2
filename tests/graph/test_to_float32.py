"""Networks in float16, bfloat16 and float64 are converted on load, and then are what any float32 network is."""

import warnings

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from toy_networks import convolutions, images, sqnr_db

import lowbit as lb
from lowbit.engines.compile import serialize

TYPES = {"float16": TensorProto.FLOAT16, "bfloat16": TensorProto.BFLOAT16, "float64": TensorProto.DOUBLE}


def converted(proto: onnx.ModelProto, to: str) -> onnx.ModelProto:
    """A float32 network wholly in another type, as converters make it: initialisers, inputs, outputs."""
    proto = onnx.ModelProto.FromString(proto.SerializeToString())
    dtype = helper.tensor_dtype_to_np_dtype(TYPES[to])
    for tensor in proto.graph.initializer:
        if tensor.data_type == TensorProto.FLOAT:
            tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor).astype(dtype), tensor.name))
    for port in (*proto.graph.input, *proto.graph.output):
        if port.type.tensor_type.elem_type == TensorProto.FLOAT:
            port.type.tensor_type.elem_type = TYPES[to]
    del proto.graph.value_info[:]
    return proto


def toy(to: str) -> onnx.ModelProto:
    return converted(onnx.ModelProto.FromString(serialize(convolutions().program)), to)


@pytest.mark.parametrize("to", TYPES)
def test_another_float_type_is_converted_and_said_so(to):
    with pytest.warns(UserWarning, match=rf"computes in {to}: it was converted to float32"):
        model = lb.load(toy(to))
    assert {v.dtype.name for v in model.program.graph.initializers.values()} <= {"FLOAT", "INT64"}
    # Drop-in where NumPy and the engine have the type; bfloat16 is neither's.
    assert model.inputs[0].dtype == model.outputs[0].dtype == ("float32" if to == "bfloat16" else to)
    x = images()
    exact = convolutions().run({"x": x})["logits"]
    found = model.run({"x": x.astype(model.inputs[0].dtype)})["logits"]
    # bfloat16 keeps 8 bits of each weight: 55.1 dB; float16 11 bits of weights, inputs, outputs: 70.6; float64 exact.
    assert sqnr_db(exact, found) > {"float16": 65, "bfloat16": 45, "float64": 120}[to]


def test_a_converted_file_is_float32_when_it_is_loaded_again(tmp_path):
    with pytest.warns(UserWarning, match="float16"):
        lb.load(toy("float16")).save(tmp_path / "net.onnx")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = lb.load(tmp_path / "net.onnx")
    assert [node.op_type for node in model.program.graph].count("Cast") == 2  # one at each edge


@pytest.mark.parametrize("to", TYPES)
def test_another_float_type_quantizes(to):
    with pytest.warns(UserWarning, match="converted to float32"):
        quantized = lb.quantize(toy(to), images())
    exact = convolutions().run({"x": images(seed=3)})["logits"]
    found = quantized.run({"x": images(seed=3).astype(quantized.inputs[0].dtype)})["logits"]
    assert sqnr_db(exact, found) > 25  # 44.3 to 45.6 dB


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*converted to float32")
def test_resnet20_in_float16_quantizes_to_what_it_does_in_float32(data):
    proto = onnx.load(data / "cifar10-resnet20.onnx")
    with np.load(data / "cifar10-test.npz") as found:
        pixels, labels = found["images"][:400], found["labels"][:400]
    mean, std = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
    x = (((pixels / 255 - mean) / std).transpose(0, 3, 1, 2)).astype(np.float32)
    single, half = (lb.quantize(net, x[:64]) for net in (proto, converted(proto, "float16")))
    operators = [[n.op_type for n in m.program.graph if n.op_type != "Cast"] for m in (single, half)]
    assert operators[0] == operators[1]
    answers = [m.run({"input": x[64:].astype(m.inputs[0].dtype)})["logits"].argmax(1) for m in (single, half)]
    assert (answers[0] == answers[1]).mean() > 0.98  # measured 0.994
    assert (answers[1] == labels[64:]).mean() > 0.89


def test_a_mixed_network_loses_the_casts_between_its_types():
    weight = np.random.default_rng(0).normal(size=(8, 8))
    nodes = [
        helper.make_node("Cast", ["x"], ["a"], to=TensorProto.FLOAT16),
        helper.make_node("MatMul", ["a", "w"], ["b"]),
        helper.make_node("Cast", ["b"], ["c"], to=TensorProto.FLOAT),
        helper.make_node("Softmax", ["c"], ["d"]),
        helper.make_node("Cast", ["d"], ["e"], to=TensorProto.FLOAT16),
        helper.make_node("MatMul", ["e", "w"], ["f"]),
        helper.make_node("Cast", ["f"], ["y"], to=TensorProto.FLOAT),
    ]
    ports = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n", 8]) for name in "xy"]
    graph = helper.make_graph(
        nodes, "mixed", ports[:1], ports[1:], [numpy_helper.from_array(weight.astype(np.float16), "w")]
    )
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    with pytest.warns(UserWarning, match="float16"):
        model = lb.load(proto)
    assert [n.op_type for n in model.program.graph if n.op_type != "Cast"] == ["MatMul", "Softmax", "MatMul"]
    assert sum(n.op_type == "Cast" for n in model.program.graph) <= 1  # the one that writes y keeps its name
    x = np.random.default_rng(1).normal(size=(3, 8)).astype(np.float32)
    np.testing.assert_allclose(model.run({"x": x})["y"], lb.load(proto).run({"x": x})["y"])


def test_the_inside_of_an_if_is_converted_with_the_rest():
    branches = [
        helper.make_graph(
            [helper.make_node(op, ["x", "w"], [name])],
            name,
            [],
            [helper.make_tensor_value_info(name, TensorProto.FLOAT16, None)],
        )
        for op, name in (("MatMul", "then"), ("Add", "else"))
    ]
    nodes = [
        helper.make_node("If", ["which"], ["y"], then_branch=branches[0], else_branch=branches[1]),
    ]
    graph = helper.make_graph(
        nodes,
        "g",
        [
            helper.make_tensor_value_info("which", TensorProto.BOOL, []),
            helper.make_tensor_value_info("x", TensorProto.FLOAT16, [2, 2]),
        ],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT16, [2, 2])],
        [numpy_helper.from_array(np.array([[1, 2], [3, 4]], np.float16), "w")],
    )
    with pytest.warns(UserWarning, match="float16"):
        model = lb.load(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10))
    x = np.ones((2, 2), np.float16)
    assert model.run({"which": np.array(True), "x": x})["y"].tolist() == [[4, 6], [4, 6]]
    assert model.run({"which": np.array(False), "x": x})["y"].tolist() == [[2, 3], [4, 5]]


def test_a_few_float64_numbers_in_a_float32_network_stay():
    nodes = [
        helper.make_node("Shape", ["x"], ["s"]),
        helper.make_node("Cast", ["s"], ["d"], to=TensorProto.DOUBLE),
        helper.make_node("Mul", ["d", "third"], ["t"]),
        helper.make_node("Floor", ["t"], ["f"]),
        helper.make_node("Cast", ["f"], ["size"], to=TensorProto.INT64),
        helper.make_node("MatMul", ["x", "w"], ["y"]),
    ]
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 2])],
        [
            helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 2]),
            helper.make_tensor_value_info("size", TensorProto.INT64, [2]),
        ],
        [numpy_helper.from_array(np.array(1 / 3), "third"), numpy_helper.from_array(np.eye(2, dtype=np.float32), "w")],
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = lb.load(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10))
    assert model.program.graph.initializers["third"].dtype.name == "DOUBLE"


def test_a_float64_mask_stays_finite():
    nodes = [helper.make_node("Add", ["x", "mask"], ["a"]), helper.make_node("MatMul", ["a", "w"], ["y"])]
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.DOUBLE, [2, 2])],
        [helper.make_tensor_value_info("y", TensorProto.DOUBLE, [2, 2])],
        [numpy_helper.from_array(np.full(2, -1.7e308), "mask"), numpy_helper.from_array(np.eye(2), "w")],
    )
    with pytest.warns(UserWarning, match="float64"):
        model = lb.load(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10))
    assert model.program.graph.initializers["mask"].const_value.numpy().tolist() == [np.finfo(np.float32).min] * 2


OTHERS = [pytest.param(dtype, marks=pytest.mark.slow) for dtype in (torch.float16, torch.float64)]


@pytest.mark.parametrize("dtype", [torch.bfloat16, *OTHERS])
def test_a_torch_module_of_another_type_is_converted(dtype):
    module = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.ReLU(), torch.nn.Linear(16, 4)).to(dtype)
    with pytest.warns(UserWarning, match="Sequential computes in"):
        model = lb.load(module, torch.zeros(2, 8, dtype=dtype))
    x = torch.randn(5, 8, dtype=dtype)
    given = (x.float() if dtype == torch.bfloat16 else x).numpy()
    with torch.no_grad():
        exact = module(x).float().numpy()
    assert sqnr_db(exact, np.asarray(model.run({"input": given})["output"], np.float32)) > 40  # bfloat16: 55.1 dB
