"""Attention in one operator, run in the file: the same outputs with any mask, batch and length."""

import json
from dataclasses import replace

import numpy as np
import pytest
from toy_networks import attention, sqnr_db

import lowbit as lb
from lowbit.deploy.attention import fuse_attention
from lowbit.engines.compile import ENGINES

RECIPE = replace(lb.RECIPES["int8"](), passes=("fold_scales",))
_rng = np.random.default_rng(0)


def sample(batch: int, length: int, *mask: int) -> dict[str, np.ndarray]:
    hidden = np.where(_rng.random(mask) < 0.3, -1e9, 0) * (np.arange(mask[-1]) > 0)
    return {"x": _rng.normal(size=(batch, length, 16)).astype(np.float32), "mask": hidden.astype(np.float32)}


@pytest.mark.parametrize(
    ("mask", "shapes"),
    [
        ("B,1,T,T", [(2, 5, 2, 1, 5, 5), (1, 1, 1, 1, 1, 1), (1, 9, 1, 1, 9, 9)]),
        ("B,1,1,T", [(2, 5, 2, 1, 1, 5), (3, 1, 3, 1, 1, 1)]),
        ("B,2,T,T", [(2, 5, 2, 2, 5, 5)]),
        ("T,T", [(2, 5, 5, 5)]),
        ("1,1,1,1", [(2, 5, 1, 1, 1, 1), (1, 7, 1, 1, 1, 1)]),
    ],
)
def test_attention_is_one_operator_for_masks_of_any_shape_and_inputs_of_any_length(mask, shapes):
    model = attention(mask)
    fused = model.copy()
    fuse_attention(fused.program)
    assert sum(node.op_type == "Attention" for node in fused.program.graph) == 1
    assert not any(node.op_type in ("Softmax", "Transpose") for node in fused.program.graph)
    float_run, run = (ENGINES["onnxruntime"].compile(m.program) for m in (model, fused))
    for shape in shapes:
        given = sample(*shape)
        np.testing.assert_allclose(run(given)["y"], float_run(given)["y"], atol=1e-5)


def test_a_quantized_file_has_attention_in_one_operator_between_products_in_integers():
    model, given = attention("B,1,T,T"), [sample(8, 9, 8, 1, 9, 9) for _ in range(4)]
    quantized = lb.quantize(model, given, RECIPE)
    operators = [node.op_type for node in quantized.program.graph]
    assert operators[:4] == ["QuantizeLinear", *["MatMulIntegerToFloat"] * 3]
    assert (operators.count("Attention"), operators.count("Softmax")) == (1, 0)
    other = sample(3, 9, 3, 1, 9, 9)
    exact, found = (ENGINES["onnxruntime"].compile(m.program)(other)["y"] for m in (model, quantized))
    assert sqnr_db(exact, found) > 15  # measured 20 to 34, by the samples


@pytest.mark.parametrize(
    "scores", ["d = MatMul (q, k) s = Mul (d, half)", "d = MatMul (q, k) s = Div (d, half)"], ids=["mul", "div"]
)
def test_a_scale_behind_the_scores_goes_into_the_operator(scores):
    model = attention("B,1,T,T", scores)
    fused = model.copy()
    fuse_attention(fused.program)
    assert sum(node.op_type == "Attention" for node in fused.program.graph) == 1
    given = sample(2, 5, 2, 1, 5, 5)
    before, after = (ENGINES["onnxruntime"].compile(m.program)(given)["y"] for m in (model, fused))
    np.testing.assert_allclose(after, before, atol=1e-5)


def test_heads_turned_another_way_are_left_as_they_are():
    model = attention("B,1,T,T")
    turn = next(node for node in model.program.graph if node.outputs[0].name == "v")
    assert turn.op_type == "Transpose"
    turn.attributes["perm"] = type(turn.attributes["perm"])("perm", turn.attributes["perm"].type, [0, 2, 3, 1])
    fuse_attention(model.program)
    assert not any(node.op_type == "Attention" for node in model.program.graph)


def test_other_targets_keep_the_operators_of_attention():
    model, given = attention("B,1,T,T"), [sample(2, 5, 2, 1, 5, 5)] * 2
    standard = lb.quantize(model, given, replace(RECIPE, target="generic"))
    assert standard.program.graph.opset_imports[""] == 21
    assert sum(node.op_type == "Softmax" for node in standard.program.graph) == 1
    assert json.loads(standard.metadata["lowbit.parity"])["worst"][1] <= 1
