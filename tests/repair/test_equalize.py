"""Channels before depthwise layers are made alike from a few samples."""

import numpy as np
from onnx import TensorProto, helper, numpy_helper

from lowbit.model import load
from lowbit.repair.channels import scale_channels


def test_channels_of_very_different_range_become_alike_and_the_network_stays_the_same():
    random = np.random.default_rng(0)
    spread = np.array([0.01, 0.1, 1, 10], np.float32).reshape(4, 1, 1, 1)
    weights = {
        "w1": random.standard_normal((4, 3, 1, 1)).astype(np.float32) * spread,
        "w2": random.standard_normal((4, 1, 3, 3)).astype(np.float32),
    }
    nodes = [
        helper.make_node("Conv", ["x", "w1"], ["h"], name="pointwise"),
        helper.make_node("Relu", ["h"], ["r"], name="relu"),
        helper.make_node("Conv", ["r", "w2"], ["y"], name="depthwise", group=4),
    ]
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", 3, 8, 8])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(array, name) for name, array in weights.items()],
    )
    model = load(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10))
    x = random.standard_normal((5, 3, 8, 8)).astype(np.float32)
    before = model.run({"x": x})["y"]
    assert scale_channels(model.program, "equalize_channels", [{"x": x[:3]}, {"x": x[3:]}]) == [
        "channels of 'r' equalized between 'pointwise' → 'depthwise'"
    ]
    model.changed()
    rows = np.abs(model.program.graph.initializers["w1"].const_value.numpy()).reshape(4, -1).max(1)
    assert rows.max() / rows.min() < 5  # 1,000 before
    np.testing.assert_allclose(model.run({"x": x})["y"], before, atol=1e-5 * np.abs(before).max())
