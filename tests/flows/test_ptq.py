"""Quantization from end to end on networks that a reader can check: what the ledger and the deployed file then say."""

import numpy as np
import pytest
from toy_networks import convolutions, images, network, sqnr_db, stored_scales

import lowbit as lb
from lowbit.errors import DataError, UnsupportedError, UnusedRuleError
from lowbit.numerics import INT8, UINT8, channel
from lowbit.ranges import MinMax, Percentile
from lowbit.report.ledger import Ledger

MINMAX = lb.Recipe(
    (lb.Rule("*", lb.TensorSpec(INT8.with_block(channel(0)), MinMax()), lb.TensorSpec(UINT8, MinMax())),)
)


def rows(model: lb.Model) -> dict[str, dict]:
    """The ledger, by tensor."""
    return {row["tensor"]: row for row in Ledger.of(model).rows}


# ---- data ----------------------------------------------------------------------------------------------------------


def test_one_sample_is_enough_to_calibrate():
    model = convolutions()
    quantized = lb.quantize(model, images(1))
    assert sqnr_db(model.run({"x": images(8)})["logits"], quantized.run({"x": images(8)})["logits"]) > 15


@pytest.mark.parametrize("value", [0.0, -2.5, 1e-30])
def test_constant_inputs_give_a_file_that_runs(value):
    model, x = convolutions(), np.full((20, 3, 8, 8), value, np.float32)
    quantized = lb.quantize(model, x)
    exact, rough = model.run({"x": x})["logits"], quantized.run({"x": x})["logits"]
    assert np.isfinite(rough).all()
    assert sqnr_db(exact, rough) > 25


def test_empty_data_is_an_error():
    with pytest.raises(DataError, match=r"no samples|empty"):
        lb.quantize(convolutions(), images(0))
    with pytest.raises(DataError, match=r"no samples|empty"):
        lb.quantize(convolutions(), iter([]))


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_data_that_are_not_finite_are_an_error_that_names_the_sample(bad):
    x = images(40)
    x[37, 1, 2, 3] = bad
    with pytest.raises(DataError, match="37"):
        lb.quantize(convolutions(), x)


def test_the_model_that_was_given_stays_as_it_was():
    model = convolutions()
    before = model.run({"x": images(4)})["logits"]
    names = list(model.program.graph.initializers)
    lb.quantize(model, images())
    model.changed()
    assert np.array_equal(model.run({"x": images(4)})["logits"], before)
    assert list(model.program.graph.initializers) == names


def test_how_the_data_are_split_into_batches_changes_no_bit(tmp_path):
    x = images(60)
    sources = (x, [x[:7], x[7:50], x[50:]], list(x), lambda: iter(x[:, None]))
    saved = []
    for index, source in enumerate(sources):
        lb.quantize(convolutions(), source).save(tmp_path / f"{index}.onnx")
        saved.append((tmp_path / f"{index}.onnx").read_bytes())
    assert saved == saved[:1] * len(saved)


@pytest.mark.parametrize("range", [MinMax(), Percentile(99.9)])
def test_shuffled_data_change_no_scale_and_no_code(range):
    """With stated ranges. Choosing ranges and correcting biases look at the first samples, and so at their order."""
    recipe = lb.Recipe((lb.Rule("*", MINMAX.rules[0].weights, lb.TensorSpec(UINT8, range)),))
    x = images(96)
    order = np.random.default_rng(3).permutation(96)
    first, second = (lb.quantize(convolutions(), data, recipe).program.graph.initializers for data in (x, x[order]))
    assert list(first) == list(second)
    assert all(np.array_equal(first[n].const_value.numpy(), second[n].const_value.numpy()) for n in first)


# ---- recipes -------------------------------------------------------------------------------------------------------


def test_a_rule_that_matches_no_layer_is_an_error_that_lists_the_layers():
    with pytest.raises(UnusedRuleError, match=r"'encoder\.\*' matched no layer. Layers are: conv_0"):
        lb.quantize(convolutions(), images(), lb.RECIPES["int8"]().keep_float("encoder.*"))


@pytest.mark.parametrize("name", ["conv2", "conv2.weight", "conv_3"])
def test_a_rule_leaves_a_layer_in_float_and_the_ledger_says_so(name):
    quantized = lb.quantize(convolutions(), images(), lb.RECIPES["int8"]().keep_float(name))
    assert rows(quantized)["conv2.weight"]["status"] == "float"
    assert rows(quantized)["conv2.weight"]["reason"] == "by rule"
    assert rows(quantized)["conv1.weight"]["status"] == "quantized"
    assert "conv2.weight" in quantized.program.graph.initializers


def test_weights_alone_are_stored_in_integers_and_everything_computes_in_float():
    model = convolutions()
    quantized = lb.quantize(model, images(), "int8-weights")
    assert {n.op_type for n in quantized.program.graph} & {"QuantizeLinear"} == set()
    assert rows(quantized)["conv2.weight"]["status"] == "quantized"
    assert sqnr_db(model.run({"x": images()})["logits"], quantized.run({"x": images()})["logits"]) > 40


def test_the_recipe_in_the_file_makes_the_same_file_again():
    first = lb.quantize(convolutions(), images())
    again = lb.quantize(convolutions(), images(), lb.Recipe.from_toml(first.metadata["lowbit.recipe"]))
    assert first.metadata == again.metadata
    assert np.array_equal(first.run({"x": images(8)})["logits"], again.run({"x": images(8)})["logits"])


# ---- graphs that are hard on ranges ----------------------------------------------------------------------------------


def test_an_attention_mask_never_enters_a_range():
    """scores + mask, where the mask holds −3.4e38: with it in a range, every score would round to the same code."""
    rng = np.random.default_rng(0)
    model = network(
        """
        attention (float[N,4,32] x, float[N,1,4] keep) => (float[N,4,32] y) {
            q = MatMul (x, wq)
            t = Transpose <perm = [0,2,1]> (x)
            scores = MatMul (q, t)
            none = Sub (one, keep)
            mask = Mul (none, lowest)
            masked = Add (scores, mask)
            shares = Softmax <axis = -1> (masked)
            mixed = MatMul (shares, x)
            y = MatMul (mixed, wo)
        }""",
        wq=rng.normal(size=(32, 32)) / 12,
        wo=rng.normal(size=(32, 32)) / 6,
        one=np.float32(1),
        lowest=np.float32(np.finfo(np.float32).min),
    )
    x = rng.normal(size=(64, 4, 32)).astype(np.float32)
    keep = np.ones((64, 1, 4), np.float32)
    keep[::2, :, 3] = 0
    data = {"x": x, "keep": keep}
    quantized = lb.quantize(model, data)
    assert max(float(scale.max()) for scale in stored_scales(quantized).values()) < 1
    assert sqnr_db(model.run(data)["y"], quantized.run(data)["y"]) > 30


def test_a_dead_channel_keeps_its_bias():
    """Weights of 1e-13 and a bias of 3: at scale S_x · S_w the bias would need 45 bits and saturate to almost 0."""
    rng = np.random.default_rng(0)
    weight = rng.normal(size=(4, 2, 3, 3))
    weight[2] *= 1e-13
    bias = np.array([0.5, -0.5, 3.0, 0.0])
    model = network("dead (float[N,2,6,6] x) => (float[N,4,4,4] y) { y = Conv (x, w, b) }", w=weight, b=bias)
    x = rng.normal(size=(32, 2, 6, 6)).astype(np.float32)
    quantized = lb.quantize(model, x)
    step = float(stored_scales(quantized)["y"])
    assert np.abs(quantized.run({"x": x})["y"][:, 2] - 3.0).max() <= step / 2 + 1e-6


def test_weights_that_are_all_zero_stay_zero():
    model = network("zero (float[N,4] x) => (float[N,3] y) { y = MatMul (x, w) }", w=np.zeros((4, 3)))
    x = np.random.default_rng(0).normal(size=(16, 4)).astype(np.float32)
    assert not lb.quantize(model, x).run({"x": x})["y"].any()


def test_an_output_that_is_quantized_keeps_its_name():
    quantized = lb.quantize(convolutions(), images())
    assert [port.name for port in quantized.outputs] == ["logits"]
    model = network("c (float[N,2,6,6] x) => (float[N,4,4,4] y) { y = Conv (x, w) }", w=np.ones((4, 2, 3, 3)))
    assert [port.name for port in lb.quantize(model, np.ones((4, 2, 6, 6), np.float32)).outputs] == ["y"]


def test_a_network_without_anything_to_quantize_is_an_error_that_says_why():
    model = network("sum (float[N,4] x) => (float[N,4] y) { y = Add (x, x) }")
    with pytest.raises(UnsupportedError, match=r"no tensor .* can be quantized"):
        lb.quantize(model, np.ones((4, 4), np.float32))


def test_a_recipe_that_leaves_everything_in_float_is_an_error():
    with pytest.raises(UnsupportedError, match="by rule"):
        lb.quantize(convolutions(), images(), lb.RECIPES["int8"]().keep_float("*"))


# ---- what stayed float ---------------------------------------------------------------------------------------------


def branching(rows: int) -> lb.Model:
    """x → conv → y, and in one branch of an If a constant of (rows, 64) that is read."""
    from onnx import TensorProto, helper, numpy_helper

    table = numpy_helper.from_array(np.ones((rows, 64), np.float32), "table")
    real = [helper.make_tensor_value_info(f"{name}_out", TensorProto.FLOAT, [1]) for name in ("then", "else")]
    body = [
        helper.make_node("Mul", ["table", "top"], ["scaled"]),
        helper.make_node("ReduceMax", ["scaled"], ["total"], keepdims=0),
        helper.make_node("Reshape", ["total", "one"], ["then_out"]),
    ]
    one = numpy_helper.from_array(np.array([1]), "one")
    then = helper.make_graph(body, "then", [], real[:1], [table, one])
    other = helper.make_graph([helper.make_node("Identity", ["nothing"], ["else_out"])], "else", [], real[1:])
    nodes = [
        helper.make_node("Conv", ["x", "w"], ["a"], name="conv"),
        helper.make_node("ReduceMax", ["a"], ["top"], keepdims=0),
        helper.make_node("Greater", ["top", "zero"], ["positive"]),
        helper.make_node("If", ["positive"], ["chosen"], then_branch=then, else_branch=other),
        helper.make_node("Add", ["a", "chosen"], ["y"]),
    ]
    weights = {"w": np.ones((8, 4, 3, 3)) / 36, "zero": np.float32(0), "nothing": np.zeros(1)}
    graph = helper.make_graph(
        nodes, "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", 4, 8, 8])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["N", 8, 6, 6])],
        [numpy_helper.from_array(np.asarray(array, np.float32), name) for name, array in weights.items()],
    )  # fmt: skip
    return lb.load(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10))


def test_weights_in_the_body_of_an_if_are_in_the_ledger_and_in_the_verdict():
    """16 kB in the branch against 1.2 kB in the convolution: 93 % of the weight bytes."""
    x = np.random.default_rng(0).normal(size=(32, 4, 8, 8)).astype(np.float32)
    quantized = lb.quantize(branching(64), x)
    row = rows(quantized)["table"]
    assert (row["status"], row["bytes"]) == ("float", 64 * 64 * 4)
    assert "body of an If" in row["reason"]
    told = Ledger.of(quantized).float_text()
    assert told.startswith("93 % of the weight bytes stayed float: inside the body of an If")
    assert told in lb.compare(branching(64), quantized, x, latency=False, layers=False).verdict


def test_a_verdict_is_silent_where_most_weights_are_quantized():
    assert Ledger.of(lb.quantize(convolutions(), images())).float_text() == ""
