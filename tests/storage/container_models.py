"""Small ONNX files that keep their tensors in every way that ONNX allows."""

from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper


def weights(seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    scales = rng.uniform(0.001, 0.02, 60).astype(np.float32)
    return {
        "weight_scales": scales,
        "bias_scales": scales * np.float32(0.0374),
        "float": rng.normal(0, 0.05, (40, 30)).astype(np.float32),
        "int8": np.clip(np.round(rng.laplace(0, 12, (60, 50))), -127, 127).astype(np.int8),
        "pruned": np.where(rng.random((50, 60)) < 0.95, 0, rng.normal(0, 1, (50, 60))).astype(np.float32),
        "bias": rng.integers(-9000, 9000, 64).astype(np.int32),
        "half": rng.normal(0, 1, 300).astype(np.float16),
        "long": rng.integers(-5, 5, 200),
        "empty": np.zeros((0, 3), np.float32),
        "scalar": np.float32(0.5),
        "flags": rng.random(500) < 0.3,
        "double": rng.normal(0, 1, 40),
    }


def model(tensors: dict[str, np.ndarray] | None = None, raw: bool = True) -> onnx.ModelProto:
    """A graph that holds the tensors as initialisers, one in a Constant, one in a subgraph, and packed int4 codes."""
    rng = np.random.default_rng(1)
    inits = []
    for name, array in (weights() if tensors is None else tensors).items():
        if raw:
            inits.append(numpy_helper.from_array(np.asarray(array), name))
        else:
            kind = helper.np_dtype_to_tensor_dtype(np.asarray(array).dtype)
            inits.append(helper.make_tensor(name, kind, np.asarray(array).shape, np.asarray(array).reshape(-1)))
    codes = np.clip(np.round(rng.laplace(0, 1.4, 1001)), -8, 7).astype(np.int64)
    inits.append(helper.make_tensor("int4", TensorProto.INT4, [7, 11, 13], codes))
    packed = ((codes[:1000:2] & 15) | (codes[1:1001:2] & 15) << 4).astype(np.uint8).tobytes()
    inits.append(helper.make_tensor("int4 raw", TensorProto.INT4, [1000], packed, raw=True))
    inits.append(helper.make_tensor("words", TensorProto.STRING, [2], [b"a", b"bc"]))
    constant = numpy_helper.from_array(rng.normal(0, 1, 100).astype(np.float32))
    inner = helper.make_graph(
        [helper.make_node("Identity", ["inner_weight"], ["inner_out"])],
        "then",
        [],
        [helper.make_tensor_value_info("inner_out", TensorProto.FLOAT, [90])],
        [numpy_helper.from_array(rng.normal(0, 1, 90).astype(np.float32), "inner_weight")],
    )
    nodes = [
        helper.make_node("Constant", [], ["constant_out"], value=constant),
        helper.make_node("If", ["condition"], ["if_out"], then_branch=inner, else_branch=inner),
        helper.make_node("Identity", ["if_out"], ["y"]),
    ]
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("condition", TensorProto.BOOL, [])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [90])],
        inits,
    )
    made = helper.make_model(graph, producer_name="lowbit tests", opset_imports=[helper.make_opsetid("", 21)])
    helper.set_model_props(made, {"lowbit.recipe": "int8", "lowbit.ledger": "[]"})
    return made


def save_external(folder: Path, name: str = "net.onnx") -> Path:
    """The same model with all weights over 100 bytes in `weights.bin` beside it."""
    path = folder / name
    onnx.save(model(), path, save_as_external_data=True, location="weights.bin", size_threshold=100)
    return path
