"""The operator table against the ONNX project's own node tests (onnx.backend.test), and what every row must have."""

import inspect
import warnings
from functools import cache
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from onnx.backend.test.loader import load_model_tests

from lowbit.errors import UnsupportedError
from lowbit.network.build import build
from lowbit.network.operators import OPERATORS, shares_scale
from lowbit.network.operators_types import to_tensor

RANDOM = "draws at random; neither torch's generator nor onnxruntime's is numpy's"
CHANCE = "draws ten numbers at random, which may agree by chance"
WHOLE_LENGTH = "wants align_corners over a fractional output length; onnxruntime and torch use the whole one"
SKIPPED = {
    "test_training_dropout": RANDOM,
    "test_training_dropout_mask": RANDOM,
    "test_training_dropout_default": RANDOM,
    "test_training_dropout_default_mask": RANDOM,
    **{f"test_bernoulli{kind}": CHANCE for kind in ("", "_expanded", "_double", "_double_expanded")},
    **dict.fromkeys(("test_bernoulli_seed", "test_bernoulli_seed_expanded"), CHANCE),
    "test_resize_downsample_scales_linear_align_corners": WHOLE_LENGTH,
    "test_resize_downsample_scales_cubic_align_corners": WHOLE_LENGTH,
}

# Operators that run in onnxruntime, and how many of their node tests it cannot run: types that it has no kernel for
# (BitShift of signed integers, an integer convolution with padded zero points), or that it does not exchange as arrays
# (bfloat16, float8, and everything narrower than 8 bits).
WHOLE = (
    "BitwiseAnd BitwiseNot BitwiseOr BitwiseXor BlackmanWindow CenterCropPad Col2Im CumProd DFT DeformConv Det "
    "DynamicQuantizeLinear EyeLike HammingWindow HannWindow Hardmax IsInf LpPool MatMulInteger MelWeightMatrix "
    "NegativeLogLikelihoodLoss QLinearConv QLinearMatMul RoiAlign STFT SequenceInsert SoftmaxCrossEntropyLoss "
    "SplitToSequence TensorScatter"
)
IN_PART = {"BitCast": 1, "BitShift": 24, "Compress": 1, "ConvInteger": 1, "Unique": 1}
ENGINE = dict.fromkeys(WHOLE.split(), 0) | IN_PART | {"QuantizeLinear": 7, "DequantizeLinear": 9}

# Two or three units in the last place: the order of rounding inside an operator is the engine's own affair.
ROUNDING = {"float16": 2.0**-9, "bfloat16": 2.0**-6}
# Zeros of a Fourier transform are sums that cancel: onnxruntime's differ by up to 3e-7 of the largest value.
CANCELLING = 1e-6


@cache
def node_tests() -> dict[str, Any]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return {case.name: case for case in load_model_tests(kind="node")}


def operators_of(case: Any) -> set[str]:
    """Operator types of the default domain; "" where something in the test is not in the table."""
    nodes = [node for node in case.model.graph.node if node.op_type != "Constant" or node.domain]
    strings = any(value.type.tensor_type.elem_type == onnx.TensorProto.STRING for value in case.model.graph.input)
    types = {node.op_type for node in nodes if not node.domain}
    return types | ({""} if strings or types - set(OPERATORS) or any(node.domain for node in nodes) else set())


def as_input(value: Any) -> Any:
    if isinstance(value, list):
        return [as_input(v) for v in value]
    array = ir.from_proto(value).numpy() if isinstance(value, onnx.TensorProto) else np.asarray(value)
    return array if array.dtype.kind in "OUS" else to_tensor(array)


def as_output(value: Any) -> np.ndarray:
    """As numpy, with the types that numpy does not know widened."""
    if isinstance(value, torch.Tensor):
        narrow = value.is_floating_point() and value.element_size() == 1
        return (value.float() if narrow or value.dtype == torch.bfloat16 else value).numpy()
    array = ir.from_proto(value).numpy() if isinstance(value, onnx.TensorProto) else np.asarray(value)
    if array.dtype.name.startswith(("float8", "float4", "bfloat")):
        return array.astype(np.float32)
    widened = {"int4": np.int8, "int2": np.int8, "uint4": np.uint8, "uint2": np.uint8}
    return array.astype(widened.get(array.dtype.name, array.dtype))


def check(got: Any, wanted: Any, rtol: float, atol: float) -> None:
    if isinstance(wanted, list):
        assert len(got) == len(wanted)
        for g, w in zip(got, wanted, strict=True):
            check(g, w, rtol, atol)
        return
    name = "bfloat16" if getattr(got, "dtype", None) == torch.bfloat16 else str(as_output(got).dtype)
    g, w = as_output(got), as_output(wanted)
    assert g.shape == w.shape
    if w.dtype.kind in "OUS":
        assert g.tolist() == w.tolist()
        return
    assert g.dtype == w.dtype
    np.testing.assert_allclose(g, w, rtol=max(rtol, ROUNDING.get(name, 0)), atol=atol)


@cache
def outcome(name: str) -> Exception | None:
    """None where build() computes what the node test wants, else what went wrong."""
    case = node_tests()[name]
    try:
        module = build(ir.from_proto(case.model)).eval()
        for inputs, outputs in case.data_sets:
            with torch.no_grad():
                results = module(*map(as_input, inputs))
            for got, wanted in zip(results.values(), outputs, strict=True):
                transforms = operators_of(case) & {"DFT", "STFT"}
                check(got, wanted, case.rtol, CANCELLING * np.abs(as_output(wanted)).max() if transforms else 1e-7)
    except Exception as error:
        return error
    return None


@pytest.mark.parametrize("operator", sorted(OPERATORS))
def test_the_onnx_projects_own_tests_pass(operator: str) -> None:
    """Every node test that consists of table rows alone, at any opset, functions expanded or not."""
    names = [name for name, case in node_tests().items() if operator in (ops := operators_of(case)) and "" not in ops]
    ran = [name for name in names if name not in SKIPPED]
    failed = {name: error for name in ran if (error := outcome(name)) is not None}
    assert not failed
    assert ran


def test_every_skip_and_every_exception_is_still_needed() -> None:
    assert set(SKIPPED) <= set(node_tests())
    assert all(outcome(name) is not None for name, reason in SKIPPED.items() if reason is not CHANCE)


@pytest.mark.parametrize("operator", ENGINE)
def test_the_onnx_projects_own_tests_pass_in_the_engine_node(operator: str) -> None:
    names = [name for name, case in node_tests().items() if operator in operators_of(case)]
    failed = {name: error for name in names if (error := outcome(name)) is not None}
    assert len(failed) <= ENGINE[operator] < len(names), failed
    assert all(isinstance(error, UnsupportedError) for error in failed.values()), failed


@pytest.mark.slow
def test_what_the_table_does_not_know_runs_in_onnxruntime_or_is_named() -> None:
    """Of 424 tests with other operators (62 of them expansions), 299 pass; the rest say which operator cannot run."""
    outside = [name for name, case in node_tests().items() if "" in operators_of(case) and name not in SKIPPED]
    errors = {name: error for name in outside if (error := outcome(name)) is not None}
    assert len(outside) - len(errors) >= 290
    for error in errors.values():
        assert isinstance(error, UnsupportedError)
        assert "operator " in str(error)
        assert "onnxruntime" in str(error)


@pytest.mark.parametrize("operator", sorted(OPERATORS))
def test_a_row_takes_the_inputs_and_attributes_of_its_newest_definition(operator: str) -> None:
    schema = onnx.defs.get_schema(operator)
    try:
        signature = inspect.signature(OPERATORS[operator].function)
    except ValueError:  # a torch builtin, which only operators without attributes may use
        assert not schema.attributes
        return
    accepts_more = any(p.kind is inspect.Parameter.VAR_POSITIONAL for p in signature.parameters.values())
    positional = [p for p in signature.parameters.values() if p.kind is not inspect.Parameter.KEYWORD_ONLY]
    assert accepts_more or len(positional) >= len(schema.inputs)
    if not any(p.kind is inspect.Parameter.VAR_KEYWORD for p in signature.parameters.values()):
        assert set(schema.attributes) <= set(signature.parameters)
    else:  # nodes with the attributes that the function does not read are left to the engine
        left = set(schema.attributes) - set(signature.parameters)
        assert left
        assert OPERATORS[operator].forms is not None
        assert "clip" not in left or not OPERATORS[operator].forms(ir.node(operator, [], {"clip": 1.0}))


def test_what_resize_does_not_take_is_left_to_the_engine() -> None:
    computes = OPERATORS["Resize"].forms
    assert computes(ir.node("Resize", [], {"mode": "linear"}))
    for attributes in ({"antialias": 1}, {"keep_aspect_ratio_policy": "not_larger"}, {"mode": "cubic"},
                       {"coordinate_transformation_mode": "tf_crop_and_resize"}):  # fmt: skip
        assert not computes(ir.node("Resize", [], attributes))


def test_defaults_are_those_of_onnx() -> None:
    """Compared as float32: onnx keeps defaults in that precision."""
    for operator, row in OPERATORS.items():
        try:
            parameters = inspect.signature(row.function).parameters
        except ValueError:
            continue
        for name, attribute in onnx.defs.get_schema(operator).attributes.items():
            if not attribute.default_value.type or (row.forms is not None and name not in parameters):
                continue
            wanted = onnx.helper.get_attribute_value(attribute.default_value)
            wanted = wanted.decode() if isinstance(wanted, bytes) else wanted
            ours = parameters[name].default
            if ours in (None, (), inspect.Parameter.empty):
                continue  # the function finds the default itself, or the graph must say it
            if isinstance(wanted, float):
                assert np.float32(ours) == np.float32(wanted), (operator, name)
            else:
                assert (list(ours) if isinstance(ours, tuple) else ours) == wanted, (operator, name)


def one_node(operator: str, inputs: list[ir.Value], count: int = 1, **attributes: Any) -> ir.Model:
    node = ir.node(operator, inputs, attributes, num_outputs=count, name="only")
    for i, value in enumerate(node.outputs):
        value.name = f"y{i}"
    graph = ir.Graph([v for v in inputs if v.const_value is None], node.outputs, nodes=[node], opset_imports={"": 21})
    for value in inputs:
        if value.const_value is not None:
            graph.initializers.add(value)
    return ir.Model(graph, ir_version=10)


def value(name: str, constant: Any = None) -> ir.Value:
    tensor = None if constant is None else ir.tensor(np.asarray(constant), name=name)
    return ir.Value(name=name, const_value=tensor, type=ir.TensorType(tensor.dtype if tensor else ir.DataType.FLOAT))


def test_global_lp_pool_is_the_norm_of_each_plane() -> None:
    module = build(one_node("GlobalLpPool", [value("x")], p=2))
    assert module(torch.tensor([[[3.0, 4.0], [5.0, 12.0]]]))["y0"].flatten().tolist() == [5, 13]


def test_what_only_moves_values_shares_its_scale() -> None:
    moving = (
        "MaxPool Reshape Flatten Transpose Squeeze Unsqueeze Slice Split Concat Gather Expand Identity DepthToSpace"
    )
    assert all(OPERATORS[op].shares for op in moving.split())
    assert not any(OPERATORS[op].shares for op in ("Conv", "Add", "Where", "Softmax", "AveragePool", "Shape", "Cast"))


def test_cubic_resizing_overshoots_and_has_a_scale_of_its_own() -> None:
    def shares(operator: str, **attributes: Any) -> bool:
        return shares_scale(ir.node(operator, [value("x")], attributes))

    ramp = torch.tensor([[[[0.0, 0, 1, 1]]]])
    scales = value("scales", np.array([1, 1, 1, 2], np.float32))
    inputs = [value("x"), value("roi", np.zeros(0, np.float32)), scales]
    assert build(one_node("Resize", inputs, mode="cubic"))(ramp)["y0"].max() > 1.05
    assert not shares("Resize", mode="cubic")
    assert shares("Resize", mode="linear")
    assert not shares("NonMaxSuppression")
