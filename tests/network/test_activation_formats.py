"""Activations in any format can be simulated; those that engines compute can be written."""

import numpy as np
import onnx_ir as ir
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

import lowbit as lb
from lowbit.errors import UnsupportedError
from lowbit.numerics import FORMATS, parse_format, quantize
from lowbit.recipe import Recipe, Rule, TensorSpec

WORDS = [name for name, kind in FORMATS.items() if name not in ("int2", "uint1", "uint2", "binary")]


@pytest.fixture(scope="module")
def model() -> lb.Model:
    """Two fully connected layers with a ReLU between."""
    rng = np.random.default_rng(0)
    weights = {"a.weight": rng.normal(size=(64, 96)) * 0.2, "b.weight": rng.normal(size=(96, 64)) * 0.2}
    nodes = [
        helper.make_node("MatMul", ["x", "a.weight"], ["h"], name="a"),
        helper.make_node("Relu", ["h"], ["r"], name="relu"),
        helper.make_node("MatMul", ["r", "b.weight"], ["y"], name="b"),
    ]
    graph = helper.make_graph(
        nodes,
        "net",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 64])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 64])],
        [numpy_helper.from_array(w.astype(np.float32), name) for name, w in weights.items()],
    )
    return lb.load(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10))


X = np.random.default_rng(1).normal(size=(32, 64)).astype(np.float32)


def both(words: str) -> Recipe:
    spec = TensorSpec(parse_format(words))
    return Recipe((Rule("*", spec, spec),))


def simulated(model: lb.Model, recipe: Recipe) -> np.ndarray:
    simulation = lb.simulation(model, [{"x": X}], recipe)
    with simulation.mode("quantize"), torch.no_grad():
        return simulation.module(torch.from_numpy(X))["y"].numpy()


@pytest.mark.parametrize("words", WORDS)
def test_every_format_is_simulated_on_both_sides_of_a_product(model, words):
    y, exact = simulated(model, both(words)), model.run({"x": X})["y"]
    assert np.isfinite(y).all()
    noise = float(((y - exact) ** 2).sum() / (exact**2).sum())
    assert 0 < noise < 1


def test_a_block_format_rounds_activations_with_ranges_of_their_own(model):
    """mxfp4 on both sides, by hand: blocks along the sum, ranges measured on each input."""
    kind = FORMATS["mxfp4"]
    w = {n: torch.from_numpy(np.array(v.const_value.numpy())) for n, v in _weights(model).items()}

    def rounded(x: torch.Tensor) -> torch.Tensor:
        return quantize(x, kind).dequantize()

    h = (rounded(torch.from_numpy(X)) @ rounded(w["a.weight"].T.contiguous()).T).relu()
    y = rounded(h) @ rounded(w["b.weight"].T.contiguous()).T
    recipe = Recipe((Rule("*", *(TensorSpec(kind, range=lb.RANGES["minmax"]()),) * 2),))
    assert np.allclose(simulated(model, recipe), y.numpy(), rtol=1e-4, atol=1e-4)


def _weights(model: lb.Model) -> dict[str, ir.Value]:
    return {str(name): value for name, value in model.program.graph.initializers.items() if "weight" in str(name)}


def test_blocks_of_what_a_convolution_reads_run_along_its_channels():
    from toy_networks import convolutions, images

    recipe = Recipe((Rule("*", TensorSpec("int8 channel:0"), TensorSpec("mxfp4", "minmax")),), target="generic")
    simulation = lb.simulation(convolutions(), images(), recipe)
    x = torch.from_numpy(images(seed=5))
    quantizer = simulation.activations()["x"]
    with simulation.mode("quantize"):
        found = quantizer(x)
    # 3 channels of one pixel share a scale; along the rows 8 pixels would
    assert torch.equal(found, quantize(x.movedim(1, -1), FORMATS["mxfp4"]).dequantize().movedim(-1, 1))


def test_dynamic_integers_follow_each_input(model):
    spec = TensorSpec(FORMATS["uint8"], dynamic=True)
    recipe = Recipe((Rule("*", TensorSpec(parse_format("int8 channel:0")), spec),))
    simulation = lb.simulation(model, [{"x": X * 100}], recipe)  # calibration of another size does not matter
    with simulation.mode("quantize"), torch.no_grad():
        y = simulation.module(torch.from_numpy(X))["y"].numpy()
    exact = model.run({"x": X})["y"]
    assert ((y - exact) ** 2).sum() < 1e-3 * (exact**2).sum()


@pytest.mark.parametrize("words", ["mxfp4", "e4m3", "uint8 group:16"])
def test_what_no_engine_computes_is_refused_with_its_name(model, words):
    recipe = Recipe((Rule("*", TensorSpec(FORMATS["int8"]), TensorSpec(parse_format(words))),))
    with pytest.raises(UnsupportedError, match=r"can be simulated, but no engine computes it"):
        lb.quantize(model, [{"x": X}], recipe)


def test_gradients_pass_through_every_format(model):
    simulation = lb.simulation(model, [{"x": X}], both("mxfp4"))
    x = torch.from_numpy(X).requires_grad_()
    with simulation.mode("quantize"):
        simulation.module(x)["y"].square().sum().backward()
    assert x.grad is not None
    assert x.grad.abs().sum() > 0
