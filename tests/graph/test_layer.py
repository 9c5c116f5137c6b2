"""One description of a layer: axes, groups and bias of every linear operator, against what the engine computes."""

import numpy as np
import pytest
from toy_networks import network

from lowbit.graph.layer import (
    LAYERS,
    MULTIPLYING,
    by_group,
    layer_names,
    layers_of,
    linear_before,
    linear_layer,
    of_groups,
)

RNG = np.random.default_rng(0)
# operator and its attributes, shape of x, shape of w, (outputs, inputs)
CASES = {
    "conv": ("Conv (x, w, b)", (2, 4, 5, 5), (6, 4, 3, 3), (6, 4)),
    "grouped": ("Conv <group = 2> (x, w, b)", (2, 4, 5, 5), (6, 2, 3, 3), (6, 4)),
    "depthwise": ("Conv <group = 4> (x, w, b)", (2, 4, 5, 5), (8, 1, 3, 3), (8, 4)),
    "one axis": ("Conv (x, w, b)", (2, 4, 7), (6, 4, 3), (6, 4)),
    "transposed": ("ConvTranspose (x, w, b)", (2, 4, 5, 5), (4, 6, 3, 3), (6, 4)),
    "transposed, grouped": ("ConvTranspose <group = 2> (x, w, b)", (2, 4, 5, 5), (4, 3, 2, 2), (6, 4)),
    "gemm": ("Gemm <alpha = 0.5, beta = 2.0> (x, w, b)", (2, 4), (4, 6), (6, 4)),
    "gemm, transB": ("Gemm <transB = 1> (x, w, b)", (2, 4), (6, 4), (6, 4)),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_outputs_and_inputs_are_scaled_as_the_engine_sees_them(case):
    text, shape, weight, counts = case
    marks = ",".join(map(str, shape[1:]))
    model = network(
        f"t (float[N,{marks}] x) => (float y) {{ y = {text} }}",
        w=RNG.normal(size=weight),
        b=RNG.normal(size=counts[0]),
    )
    (node,) = model.program.graph
    layer = linear_layer(node)
    assert layer is not None
    assert (layer.outputs, layer.inputs) == counts
    x = RNG.normal(size=shape).astype(np.float32)
    factor, shift, scale = (RNG.uniform(0.5, 2, size=n) for n in (layer.outputs, layer.outputs, layer.inputs))
    along = (1, -1, *(1,) * (len(shape) - 2))
    expected = model.run({"x": x})["y"] * factor.reshape(along) + shift.reshape(along)
    layer.scale_outputs(factor, shift)
    layer.scale_inputs(1 / scale)
    model.changed()
    np.testing.assert_allclose(
        model.run({"x": (x * scale.reshape(along)).astype(np.float32)})["y"], expected, rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_constant_channels_answer_as_the_layer_says(case):
    text, shape, weight, counts = case
    model = network(
        f"t (float[N,{','.join(map(str, shape[1:]))}] x) => (float y) {{ y = {text} }}",
        w=RNG.normal(size=weight),
        b=RNG.normal(size=counts[0]),
    )
    layer = linear_layer(next(iter(model.program.graph)))
    assert layer is not None
    values = RNG.normal(size=layer.inputs)
    x = np.broadcast_to(values.reshape(1, -1, *(1,) * (len(shape) - 2)), shape).astype(np.float32)
    y = model.run({"x": x})["y"]
    inner = y[(0, slice(None), *(n // 2 for n in y.shape[2:]))]  # where no border is near
    np.testing.assert_allclose(layer.response(values) + layer.bias, inner, rtol=1e-4, atol=1e-4)


def test_groups_are_put_back_where_they_were():
    weight = RNG.normal(size=(4, 3, 2, 2))
    for axis, shape in ((0, (2, 2, 3, 4)), (1, (2, 3, 2, 4))):
        grouped = by_group(weight, 2, axis)
        assert grouped.shape == shape  # (groups, outputs of a group, inputs of a group, kernel)
        assert np.array_equal(of_groups(grouped, weight.shape, axis), weight)


def test_the_add_behind_a_matmul_is_its_bias():
    text = "t (float[N,4] x) => (float y) { p = MatMul (x, w)  h = Add (b, p)  y = Relu (h) }"
    model = network(text, w=RNG.normal(size=(4, 6)), b=RNG.normal(size=6))
    matmul, add, relu = model.program.graph
    layer = linear_before(relu.inputs[0])
    assert layer is not None
    assert (layer.node, layer.add, layer.bias_input) == (matmul, add, (add, 0))
    assert linear_before(matmul.outputs[0]) is None  # without its bias it is no layer's output


@pytest.mark.parametrize(
    "text", ["Gemm <transA = 1> (x, w)", "Gemm <beta = 0.0> (x, w, b)", "Gemm (x, w, x)", "MatMul (x, x)"]
)
def test_what_has_no_constant_weight_or_bias_of_use_is_no_linear_layer(text):
    model = network(f"t (float[4,4] x) => (float y) {{ y = {text} }}", w=np.eye(4), b=np.ones(4))
    assert linear_layer(next(iter(model.program.graph))) is None


def test_recurrent_layers_have_two_weights_and_an_embedding_multiplies_none():
    text = "t (float[T,N,3] x) => (float[T,D,N,4] y) { y, h = GRU <hidden_size = 4> (x, w, r) }"
    model = network(text, w=RNG.normal(size=(1, 12, 3)), r=RNG.normal(size=(1, 12, 4)))
    found = list(layers_of(next(n for n in model.program.graph if n.op_type == "GRU")))
    assert [(w.index, w.output_axis, w.summed_axis) for w in found] == [(1, 1, 2), (2, 1, 2)]
    assert LAYERS.keys() - {"Gather"} == MULTIPLYING


def test_the_layers_at_both_ends_have_names_and_so_has_what_lies_further_out():
    rng = np.random.default_rng(0)
    model = network(
        """t (float[N,8] x) => (float[N,8] y, float[N,8] z) {
            s = Mul (x, c) a = MatMul (s, a1) b = Relu (a) d = MatMul (b, a2) e = MatMul (d, a3) f = Relu (e)
            y = MatMul (f, a4) z = Relu (f) }""",
        c=np.array(2.0),
        **{f"a{i}": rng.normal(size=(8, 8)) for i in range(1, 5)},
    )
    found = {
        end: [str(n.outputs[0].name) for n in model.program.graph if end in layer_names(n)]
        for end in ("at:input", "at:output")
    }
    assert found == {"at:input": ["s", "a", "b"], "at:output": ["f", "y", "z"]}
