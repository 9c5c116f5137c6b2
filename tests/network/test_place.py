"""Where quantizers go: which values get one, which share a scale, and the reason for each that does not."""

import re

import numpy as np
import pytest
from toy_networks import convolutions, network

from lowbit.errors import UnusedRuleError
from lowbit.model import Model
from lowbit.network.place import place
from lowbit.network.sites import Placement
from lowbit.numerics import INT8, UINT8, channel, parse_format
from lowbit.presets import RECIPES
from lowbit.recipe import FLOAT, Recipe, Rule, TensorSpec

W = np.random.default_rng(0).normal(size=(4, 4, 3, 3))
INDICES = {
    "one": np.array([1]),
    "three": np.array([3]),
    "picked": np.array([0, 2, 3]),
    "one_row": np.zeros((1, 4, 8, 2), np.int64),
}
LARGE = np.random.default_rng(0).normal(size=(64, 64))


def placed(model: Model, recipe: Recipe | None = None, target: str = "onnxruntime") -> Placement:
    return place(model.program, recipe or RECIPES["int8"](target))


def activations(placement: Placement) -> set[str]:
    return {site.value for site in placement.sites.values() if site.role == "activation"}


def test_a_convolution_is_quantized_on_both_sides_and_its_bias_has_the_product_of_the_scales():
    model = network("c (float[N,4,6,6] x) => (float[N,4,4,4] y) { y = Conv (x, w, b) }", w=W, b=np.ones(4))
    sites = placed(model).sites
    assert {name: site.role for name, site in sites.items()} == {
        "x": "activation",
        "y": "activation",
        "w": "weight",
        "b": "bias",
    }
    assert sites["b"].product == ("x", "w")
    assert sites["w"].spec.format == INT8.with_block(channel(0))
    assert sites["x"].spec.format == UINT8


def test_a_relu_is_absorbed_into_the_range_behind_it():
    assert activations(placed(convolutions())) >= {"x", "b", "e"}
    assert not activations(placed(convolutions())) & {"a", "d"}  # the values in front of the relus


@pytest.mark.parametrize(
    "node",
    [
        "m = MaxPool <kernel_shape = [2,2]> (x)",
        "m = Transpose <perm = [0,1,3,2]> (x)",
        "m = Concat <axis = 3> (x, x)",
        "m = Slice (x, one, three, three)",
        "m = Gather <axis = 3> (x, picked)",
        "m = ReduceMax <keepdims = 1> (x, three)",
        "m = GatherElements <axis = 3> (x, one_row)",
    ],
)
def test_what_only_moves_values_has_one_scale_on_both_sides(node):
    model = network(
        "c (float[N,4,8,8] x) => (float y) { a = Conv <pads = [1,1,1,1]> (x, w) b = Relu (a) "
        + node.replace("(x", "(b").replace(", x)", ", b)")
        + " y = Conv (m, v) }",
        **{k: a for k, a in INDICES.items() if k in re.findall(r"\w+", node)},
        w=W,
        v=W[:, :, :1, :1],
    )
    sites = placed(model).sites
    assert sites["b"].group == sites["m"].group
    assert sites["x"].group != sites["b"].group


def test_all_inputs_of_a_concat_share_its_scale():
    model = network(
        """c (float[N,4,8,8] x) => (float y) {
            a = Conv (x, w) b = Conv (x, v) m = Concat <axis = 1> (a, b) y = Conv (m, u) }""",
        w=W,
        v=2 * W,
        u=np.ones((4, 8, 3, 3)),
    )
    sites = placed(model).sites
    assert sites["a"].group == sites["b"].group == sites["m"].group


def test_a_matmul_may_end_in_float():
    model = network("m (float[N,64] x) => (float[N,64] y) { y = MatMul (x, w) }", w=LARGE)
    assert activations(placed(model)) == {"x"}
    assert placed(model).sites["w"].spec.format == INT8.with_block(channel(1))  # the output channels of x · w


def test_a_product_of_two_activations_stays_in_float_and_says_so():
    model = network("m (float[N,8,8] x) => (float[N,8,8] y) { a = MatMul (x, w) y = MatMul (a, a) }", w=LARGE[:8, :8])
    assert any("two activations" in reason for reason in placed(model).float_reasons.values())


def test_a_constant_of_a_mask_stays_out():
    model = network(
        "m (float[N,4,8,8] x) => (float[N,4,6,6] z) { a = Conv (x, w) y = Add (a, mask) z = Conv (y, v) }",
        w=W,
        v=W[:, :, :1, :1],
        mask=np.full((1, 4, 6, 6), -1e9),
    )
    placement = placed(model)
    assert "mask" not in placement.sites
    assert any("mask" in reason for reason in placement.float_reasons.values())


def test_the_target_chooses_formats():
    assert placed(convolutions(), target="tensorrt").sites["x"].spec.format == INT8
    seven = placed(convolutions(), target="onnxruntime-avx2").sites["conv1.weight"].spec.format
    assert seven == parse_format("int7 channel:0")


def test_groups_run_along_the_axis_that_is_summed_over():
    spec = TensorSpec(parse_format("int4 group:32"))
    model = network("m (float[N,64] x) => (float[N,64] y) { y = MatMul (x, w) }", w=LARGE)
    sites = placed(model, Recipe((Rule("*", spec, FLOAT),))).sites
    assert sites["w"].spec.format == parse_format("int4 group:32:0")


def test_weights_too_small_to_be_worth_it_stay_in_float_and_say_so():
    model = network("m (float[N,4] x) => (float[N,4] y) { y = MatMul (x, w) }", w=LARGE[:4, :4])
    placement = place(model.program, RECIPES["int8-weights"]())
    assert placement.float_reasons["w"] == "16 values are too few to store in low bits"


def test_a_rule_that_matches_nothing_is_an_error():
    with pytest.raises(UnusedRuleError, match="'decoder'"):
        placed(convolutions(), RECIPES["int8"]().keep_float("decoder"))


def test_a_bias_that_two_layers_share_stays_in_float_and_says_so():
    model = network(
        "c (float[N,4,8,8] x) => (float y) { a = Conv (x, w, b) y = Conv (a, v, b) }", w=W, v=W, b=np.ones(4)
    )
    placement = placed(model)
    assert "b" not in placement.sites
    assert "share" in placement.float_reasons["b"]


def test_a_rule_that_names_only_a_relu_says_which_layer_was_meant():
    recipe = RECIPES["int8"]().keep_float("relu_1", "op:Relu", "conv_3")
    (told,) = placed(convolutions(), recipe).idle_rules
    assert told.startswith("rule 'relu_1' names no layer, only 'relu_1' (Relu)")
    assert told.endswith("Did you mean 'conv_0' (Conv), which is in front of it?")


def test_a_value_whose_clip_and_readers_are_float_by_rule_has_its_kernels_format():
    """leave_in_float named the Relu and the readers of a costly value, not its Conv."""
    sites = placed(convolutions(), RECIPES["int8"]().keep_float("relu_1", "maxpool_2", "conv_3")).sites
    assert sites["b"].spec.format == UINT8
    assert sites["b"].layer == "conv_0"


def test_a_value_behind_a_move_that_is_float_by_rule_has_its_readers_format():
    model = network(
        "c (float[N,4,64] x) => (float y) { a = Reshape (x, s) y = Conv (a, w) }", w=W, s=np.array([0, 4, 8, 8])
    )
    assert {site.value for site in placed(model, RECIPES["int8"]().keep_float("reshape_0")).sites.values()} >= {
        "x",
        "w",
    }
