"""Simulated, onnxruntime and OpenVINO: the same codes, or at most one step apart.

One step is allowed, and only one, since engines multiply sums of integers by S_x · S_w / S_y in float32 in another
order or with a fixed-point multiplier: a value that lies within that rounding of a tie falls on either side of it.
Every layer is given the codes that the engine computed before it, so that single steps cannot add up. Convolutions of
u8 · s8 need a CPU that adds their products in 32 bits (VNNI); without it the target 'onnxruntime-avx2' is the one that
agrees.
"""

import json

import numpy as np
import pytest
from toy_networks import convolutions, images, network, stored_scales

import lowbit as lb
from lowbit.deploy.export import export
from lowbit.deploy.proof import verify
from lowbit.engines.compile import ENGINES
from lowbit.errors import MismatchError
from lowbit.network.calibrate import observe, solve_weights
from lowbit.network.network import Network
from lowbit.network.place import place
from lowbit.repair.ranges import choose_ranges

IMAGENET = "scale=255 mean=.485,.456,.406 std=.229,.224,.225 layout=NCHW"


def simulated(model: lb.Model, batches: list[dict[str, np.ndarray]], target: str = "onnxruntime") -> Network:
    """The network with codes and ranges, and nothing else done to it."""
    recipe = lb.Recipe(lb.RECIPES["int8"](target).rules, (), target)
    simulation = Network(model.program, place(model.program, recipe))
    observe(simulation, batches)
    solve_weights(simulation)
    choose_ranges(simulation, batches)
    return simulation


@pytest.mark.parametrize("target", ["onnxruntime", "onnxruntime-avx2", "openvino", "tensorrt"])
@pytest.mark.parametrize("engine", ENGINES)
def test_no_code_of_a_toy_is_more_than_one_step_off(target, engine):
    pytest.importorskip(engine)
    batches = [{"x": images(32)}]
    simulation = simulated(convolutions(), batches, target)
    parity = verify(simulation, export(simulation), batches, engine)
    assert parity.worst[1] <= 1
    assert parity.one_step < 0.01  # measured below 0.002
    assert parity.codes > 10_000


def test_a_real_network_has_the_same_codes_in_onnxruntime_but_for_ties(data):
    model = lb.load(data / "cifar10-resnet20.onnx")
    samples = lb.Data.of(data / "cifar10-train-0.npz", model.inputs, preprocess=IMAGENET, limit=48)
    parity = json.loads(lb.quantize(model, samples).metadata["lowbit.parity"])
    assert parity["worst"][1] <= 1
    assert parity["one_step"] < 1e-3
    assert parity["codes"] > 1_000_000


def test_a_file_that_computes_something_else_is_refused():
    """One weight code changed by 40 steps in the file: a MismatchError that names the layer."""
    batches = [{"x": images(32)}]
    simulation = simulated(convolutions(), batches)
    program = export(simulation)
    codes = program.graph.initializers["conv2.weight_codes"]
    array = codes.const_value.numpy().copy()
    array[0, 0, 1, 1] -= np.int8(40 if array[0, 0, 1, 1] > 0 else -40)
    codes.const_value = type(codes.const_value)(array, name=codes.name)
    with pytest.raises(MismatchError, match=r"layer .conv_3.: .* steps in .e."):
        verify(simulation, program, batches)


def test_the_integers_of_a_matmul_are_those_of_integer_arithmetic():
    """y = (Σ (x_q − z_x) · w_q) · S_x · S_w, in numpy with integers, equals the engine to float32 rounding."""
    rng = np.random.default_rng(0)
    model = network("m (float[N,64] x) => (float[N,48] y) { y = MatMul (x, w) }", w=rng.normal(size=(64, 48)) / 8)
    x = rng.normal(size=(16, 64)).astype(np.float32)
    quantized = lb.quantize(model, x, lb.Recipe(lb.RECIPES["int8"]().rules))
    stored = {name: value.const_value.numpy() for name, value in quantized.program.graph.initializers.items()}
    scales, step = stored_scales(quantized), next(n for n in quantized.program.graph if n.op_type == "QuantizeLinear")
    zero = stored[step.inputs[2].name]
    codes = np.clip(np.rint(x / scales["x"]) + zero, 0, 255).astype(np.int64) - zero
    sums = codes @ stored["w"].astype(np.int64)
    exact = sums * (scales["x"].astype(np.float64) * scales["w"])
    assert np.abs(quantized.run({"x": x})["y"] - exact).max() < 1e-5 * np.abs(exact).max()
