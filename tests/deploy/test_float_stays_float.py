"""A layer that a rule leaves in float runs in float, on the engine, whatever integers lie around it.

onnxruntime's default session makes integer kernels of float layers between QuantizeLinear and DequantizeLinear. What
runs is read off the engine's own optimized graph.
"""

import numpy as np
import pytest
from toy_networks import network

import lowbit as lb
from lowbit.engines.compile import ENGINES
from lowbit.engines.read_back import FLOAT, INTEGERS, read_back
from lowbit.ranges import MinMax

RNG = np.random.default_rng(0)
INT8 = lb.Recipe((lb.Rule("*", lb.TensorSpec("int8 channel:0", MinMax()), lb.TensorSpec("uint8", MinMax())),))
LINEAR = ("Conv", "ConvTranspose", "Gemm", "MatMul", "MatMulIntegerToFloat")
BETWEEN = {  # what follows the middle convolution c = Conv (b, v, vb)
    "nothing": "d = Identity (c)",
    "Relu": "d = Relu (c)",
    "Clip": "d = Clip (c, zero, six)",
    "SiLU": "s = Sigmoid (c) d = Mul (c, s)",
    "MaxPool": "d = MaxPool <kernel_shape = [3,3], pads = [1,1,1,1]> (c)",
    "Relu MaxPool": "r = Relu (c) d = MaxPool <kernel_shape = [3,3], pads = [1,1,1,1]> (r)",
    "Concat": "k = Concat <axis = 1> (c, b) d = Conv (k, joins)",
    "residual": "d = Add (b, c)",
    "Transpose": "d = Transpose <perm = [0, 1, 3, 2]> (c)",
}


def weights(*shape: int) -> np.ndarray:
    return RNG.normal(size=shape) / np.sqrt(np.prod(shape[1:]))


def three_convolutions(between: str) -> lb.Model:
    """x → conv_0 → relu → conv_2 → what is between → conv → y."""
    used = {"zero": np.float32(0), "six": np.float32(6)} if between == "Clip" else {}
    used |= {"joins": weights(8, 16, 1, 1)} if between == "Concat" else {}
    return network(
        "t (float[N,4,8,8] x) => (float[N,8,8,8] y) { a = Conv <pads = [1,1,1,1]> (x, w, wb) b = Relu (a)"
        f" c = Conv <pads = [1,1,1,1]> (b, v, vb) {BETWEEN[between]} y = Conv <pads = [1,1,1,1]> (d, u, ub) }}",
        **{"w": weights(8, 4, 3, 3), "wb": weights(8), "v": weights(8, 8, 3, 3), "vb": weights(8)},
        **{"u": weights(8, 8, 3, 3), "ub": weights(8)},
        **used,
    )


def what_runs(model: lb.Model, engine: str, *kept: str, target: str | None = None) -> dict[str, str]:
    """Linear layer → its arithmetic in the engine, of the int8 file with these layers in float."""
    port = model.inputs[0]
    x = RNG.normal(size=(16, *port.shape[1:])).astype(np.float32)
    quantized = lb.quantize(model, x, INT8.keep_float(*kept), target=target or engine)
    runs = read_back(quantized.program, engine)
    assert not runs.unread
    return {str(n.name): runs.of(str(n.name)) for n in quantized.program.graph if n.op_type in LINEAR}


@pytest.mark.parametrize("engine", ["onnxruntime", "openvino"])
@pytest.mark.parametrize("between", BETWEEN)
def test_a_convolution_between_integers_stays_in_float(between, engine):
    pytest.importorskip(engine)
    found = what_runs(three_convolutions(between), engine, "conv_2")
    assert found.pop("conv_2") == FLOAT
    assert set(found.values()) == {INTEGERS}


@pytest.mark.parametrize("engine", ["onnxruntime", "openvino"])
@pytest.mark.parametrize("kept", ["conv_0", "conv_4"])
def test_the_first_and_the_last_convolution_stay_in_float(kept, engine):
    pytest.importorskip(engine)
    found = what_runs(three_convolutions("Relu"), engine, kept)
    assert found.pop(kept) == FLOAT
    assert set(found.values()) == {INTEGERS}


def test_a_file_for_openvino_keeps_its_float_layers_in_onnxruntime_too():
    assert what_runs(three_convolutions("Relu"), "onnxruntime", "conv_2", target="openvino")["conv_2"] == FLOAT


@pytest.mark.parametrize("engine", ["onnxruntime", "openvino"])
@pytest.mark.parametrize("layer", ["Gemm <transB = 1> ({}, {}, {})", "MatMul"])
def test_a_dense_layer_between_integers_stays_in_float(layer, engine):
    """MatMul + Add becomes a Gemm when onnxruntime loads it, which it then gives integers like any other."""
    pytest.importorskip(engine)

    def dense(data: str, index: int) -> str:
        if layer == "MatMul":
            return f"m{index} = MatMul ({data}, w{index}) h{index} = Add (m{index}, b{index}) "
        return f"h{index} = {layer.format(data, f'w{index}', f'b{index}')} "

    text = dense("x", 0) + "r0 = Relu (h0) " + dense("r0", 1) + "r1 = Relu (h1) " + dense("r1", 2) + "y = Relu (h2)"
    constants = {f"w{i}": weights(32, 32) for i in range(3)} | {f"b{i}": weights(32) for i in range(3)}
    model = network(f"t (float[N,32] x) => (float[N,32] y) {{ {text} }}", **constants)
    found = what_runs(model, engine, "w1")
    middle = list(found)[1]
    assert [found[name] for name in found if name != middle] == [INTEGERS, INTEGERS]
    assert found[middle] == FLOAT


def test_a_transposed_convolution_between_integers_stays_in_float():
    model = network(
        "t (float[N,4,8,8] x) => (float y) { a = Conv (x, w) b = ConvTranspose (a, v) c = Conv (b, u) y = Relu (c) }",
        w=weights(4, 4, 1, 1),
        v=weights(4, 4, 2, 2),
        u=weights(4, 4, 1, 1),
    )
    assert list(what_runs(model, "onnxruntime").values()) == [INTEGERS, FLOAT, INTEGERS]


@pytest.mark.parametrize(
    ("kept", "text"),
    [
        ("add_2", "a = Conv (x, w) b = Conv (x, v) c = Add (a, b) y = Conv (c, u)"),
        ("mul_2", "a = Conv (x, w) b = Conv (x, v) c = Mul (a, b) y = Conv (c, u)"),
        ("sigmoid_1", "a = Conv (x, w) c = Sigmoid (a) b = Conv (c, v) y = Conv (b, u)"),
        ("averagepool_1", "a = Conv (x, w) c = AveragePool <kernel_shape = [2,2]> (a) b = Conv (c, v) y = Conv (b, u)"),
    ],
)
def test_an_operator_without_weights_stays_in_float_too(kept, text):
    model = network(f"t (float[N,4,8,8] x) => (float y) {{ {text} }}", **{name: weights(4, 4, 1, 1) for name in "wvu"})
    x = RNG.normal(size=(16, 4, 8, 8)).astype(np.float32)
    runs = {
        rule: read_back(lb.quantize(model, x, recipe).program, "onnxruntime")
        for rule, recipe in (("", INT8), (kept, INT8.keep_float(kept)))
    }
    assert runs[""].of(kept) == INTEGERS
    assert runs[kept].of(kept) == FLOAT


def test_a_float_layer_computes_what_it_computes_in_float():
    """Only the input of the middle layer is rounded: its result equals numpy's on the integers before it."""
    model = three_convolutions("nothing")
    x = RNG.normal(size=(16, 4, 8, 8)).astype(np.float32)
    program = lb.quantize(model, x, INT8.keep_float("conv_2")).program
    layer = next(node for node in program.graph if node.name == "conv_2")
    read, made = str(layer.inputs[0].name), str(layer.outputs[0].name)
    run = ENGINES["onnxruntime"].compile(program, outputs=[read, made])({"x": x})
    padded = np.pad(run[read].astype(np.float64), ((0, 0), (0, 0), (1, 1), (1, 1)))
    patches = np.lib.stride_tricks.sliding_window_view(padded, (3, 3), (2, 3))
    weight, bias = (value.const_value.numpy() for value in layer.inputs[1:])
    exact = np.einsum("nihwkl,oikl->nohw", patches, weight) + bias.reshape(-1, 1, 1)
    assert np.abs(run[made] - exact).max() < 1e-5


@pytest.mark.parametrize("words", ["int8", "int4"])
def test_signed_activations_behind_a_relu_run_in_integers(words):
    """No signed range absorbs a Relu, and onnxruntime leaves a convolution in front of one in float."""
    recipe = lb.Recipe((lb.Rule("*", lb.TensorSpec("int8 channel:0", MinMax()), lb.TensorSpec(words, MinMax())),))
    x = RNG.normal(size=(16, 4, 8, 8)).astype(np.float32)
    runs = read_back(lb.quantize(three_convolutions("Relu"), x, recipe).program, "onnxruntime")
    assert [runs.of(name) for name in ("conv_0", "conv_2", "conv_4")] == [INTEGERS] * 3
