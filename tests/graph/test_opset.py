"""Every row of the opset table, against what onnxruntime computes for the old operator."""

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from lowbit.engines.compile import ENGINES
from lowbit.errors import InputError, UnsupportedError
from lowbit.graph.load import read_proto
from lowbit.graph.opset import ROWS

X = np.random.default_rng(0).standard_normal((2, 4, 6, 6)).astype(np.float32)
AXES = {"axes": [2, 3], "keepdims": 1}
BATCHNORM = {name: np.abs(X[0, :, 0, i]).astype(np.float32) for i, name in enumerate(("scale", "b", "mean", "var"))}
ROIS = {"rois": np.array([[0, 0, 4, 4]], np.float32), "index": np.zeros(1, np.int64)}
GRID = {"grid": np.random.default_rng(1).uniform(-1, 1, (2, 3, 3, 2)).astype(np.float32)}
SCATTER = {"at": np.array([[[[1]]]], np.int64), "update": np.array([[[[5]]]], np.float32)}
SCALES = np.array([1, 1, 2, 2], np.float32)

# operator, opset of the file, attributes, constant inputs, number of outputs
OLD = [
    ("Upsample", 7, {"mode": "nearest", "scales": [1.0, 1.0, 2.0, 2.0]}, {}, 1),
    ("Upsample", 9, {"mode": "linear"}, {"s": SCALES}, 1),
    ("Resize", 10, {"mode": "nearest"}, {"s": SCALES}, 1),
    ("Resize", 10, {"mode": "nearest"}, {"s": np.array([1, 1, 0.5, 0.5], np.float32)}, 1),
    ("Resize", 11, {"mode": "linear"}, {"r": np.zeros(0, np.float32), "s": SCALES}, 1),
    ("Slice", 7, {"starts": [1, 2], "ends": [3, 5], "axes": [1, 3]}, {}, 1),
    ("Slice", 7, {"starts": [1, 2], "ends": [2, 3]}, {}, 1),
    ("TopK", 7, {"k": 2, "axis": 3}, {}, 2),
    ("Clip", 7, {"min": -0.5, "max": 0.5}, {}, 1),
    ("Clip", 7, {"min": 0.0}, {}, 1),
    ("Pad", 7, {"pads": [0, 0, 1, 1, 0, 0, 2, 0], "value": 3.0}, {}, 1),
    ("Pad", 7, {"mode": "reflect", "pads": [0, 0, 1, 1, 0, 0, 1, 1]}, {}, 1),
    ("Scatter", 9, {"axis": 2}, SCATTER, 1),
    ("Dropout", 7, {"ratio": 0.3}, {}, 1),
    ("BatchNormalization", 7, {"epsilon": 1e-3}, BATCHNORM, 1),
    ("BatchNormalization", 7, {"spatial": 1}, BATCHNORM, 1),
    ("BatchNormalization", 9, {}, BATCHNORM, 1),
    ("Softmax", 7, {}, {}, 1),
    ("Softmax", 11, {"axis": 2}, {}, 1),
    ("Softmax", 11, {"axis": -1}, {}, 1),
    ("LogSoftmax", 9, {"axis": 3}, {}, 1),
    ("Hardmax", 11, {"axis": 1}, {}, 1),
    ("Squeeze", 11, {"axes": [0]}, {}, 1),
    ("Unsqueeze", 9, {"axes": [0, 3]}, {}, 1),
    ("Split", 9, {"axis": 1, "split": [1, 3]}, {}, 2),
    ("Split", 9, {"axis": 1}, {}, 2),
    ("Split", 13, {"axis": 2}, {"sizes": np.array([4, 2], np.int64)}, 2),
    ("ReduceSum", 11, AXES, {}, 1),
    ("ReduceSum", 9, {"keepdims": 0}, {}, 1),
    *[
        (op, 13, AXES, {}, 1)
        for op in ("ReduceL1", "ReduceL2", "ReduceMax", "ReduceMean", "ReduceMin", "ReduceProd", "ReduceSumSquare")
    ],
    ("ReduceLogSumExp", 11, {"axes": [1], "keepdims": 0}, {}, 1),
    ("ReduceLogSum", 17, {"axes": [-1]}, {}, 1),
    ("RoiAlign", 10, {"output_height": 2, "output_width": 2, "sampling_ratio": 2}, ROIS, 1),
    ("GridSample", 16, {"mode": "bilinear"}, GRID, 1),
    ("GridSample", 16, {"mode": "bicubic", "align_corners": 1}, GRID, 1),
    ("GroupNormalization", 18, {"num_groups": 2}, {"s": np.array([2, 3], np.float32), "b": np.ones(2, np.float32)}, 1),
]


def old_model(op: str, opset: int, attributes: dict, constants: dict, outputs: int, x: np.ndarray) -> onnx.ModelProto:
    names = [f"y{i}" for i in range(outputs)]
    graph = helper.make_graph(
        [helper.make_node(op, ["x", *constants], names, name="node", **attributes)],
        "old",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, x.shape)],
        [helper.make_empty_tensor_value_info(name) for name in names],
        [numpy_helper.from_array(array, name) for name, array in constants.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8)
    inferred = {v.name: v for v in onnx.shape_inference.infer_shapes(model).graph.output}
    for port in graph.output:
        port.CopyFrom(inferred[port.name])
        if not port.type.HasField("tensor_type"):
            port.type.tensor_type.elem_type = TensorProto.FLOAT
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8)


def run_source(proto: onnx.ModelProto, batch: dict) -> list[np.ndarray]:
    import onnxruntime

    session = onnxruntime.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(None, batch)


@pytest.mark.parametrize("case", OLD, ids=[f"{op}-{opset}-{i}" for i, (op, opset, *_) in enumerate(OLD)])
def test_a_raised_operator_computes_what_the_old_one_did(case):
    x = X[:1] if case[0] == "Squeeze" else np.abs(X) + 0.1 if "Log" in case[0] else X
    proto = old_model(*case, x)
    program = read_proto(proto)
    assert program.opset_imports[""] == 21
    assert [value.name for value in program.graph.outputs] == [f"y{i}" for i in range(case[4])]
    raised = ENGINES["onnxruntime"].compile(program)({"x": x})
    for expected, got in zip(run_source(proto, {"x": x}), raised.values(), strict=True):
        np.testing.assert_allclose(got, expected, rtol=1e-6, atol=1e-7)


def test_every_row_of_the_table_is_tried():
    tried = {op for op, *_ in OLD}
    assert {op for op, _ in ROWS} - tried == {"Scan", "DFT"}  # refused; onnxruntime has no DFT of opset 17 for floats


def test_softmax_over_the_last_axis_needs_no_reshape():
    program = read_proto(old_model("Softmax", 11, {"axis": 3}, {}, 1, X))
    assert [node.op_type for node in program.graph] == ["Softmax"]


def test_operators_inside_a_branch_are_raised_as_well():
    def branch(name: str, low: float) -> onnx.GraphProto:
        out = helper.make_tensor_value_info(name, TensorProto.FLOAT, X.shape)
        return helper.make_graph([helper.make_node("Clip", ["x"], [name], min=low, max=1.0)], name, [], [out])

    graph = helper.make_graph(
        [helper.make_node("If", ["c"], ["y"], then_branch=branch("t", -1.0), else_branch=branch("e", 0.0))],
        "g",
        [
            helper.make_tensor_value_info("c", TensorProto.BOOL, []),
            helper.make_tensor_value_info("x", TensorProto.FLOAT, X.shape),
        ],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, X.shape)],
    )
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 9)], ir_version=8)
    run = ENGINES["onnxruntime"].compile(read_proto(proto))
    for c, low in ((True, -1.0), (False, 0.0)):
        assert np.array_equal(run({"c": np.array(c), "x": X})["y"], X.clip(low, 1.0))


def test_opset_6_is_refused_with_its_number():
    with pytest.raises(InputError, match="opset 6; lowbit reads opset 7 and newer"):
        read_proto(old_model("Relu", 6, {}, {}, 1, X))


def test_batchnorm_per_activation_is_refused():
    with pytest.raises(UnsupportedError, match="spatial=0"):
        read_proto(old_model("BatchNormalization", 7, {"spatial": 0}, BATCHNORM, 1, X))
