"""Codes of few bits in the engine: which kernels run, which numbers come out, how many bytes they take."""

from collections import Counter

import numpy as np
import onnx
import pytest
import torch
from toy_networks import convolutions, images, network

import lowbit as lb
from lowbit.deploy.export import export
from lowbit.engines.compile import ENGINES, serialize
from lowbit.errors import UnsupportedError
from lowbit.metadata import from_text
from lowbit.network.quantizers import FakeQuant
from lowbit.recipe import FLOAT, PREPARE, Recipe, Rule, TensorSpec


def recipe(weights: str, activations: str = "float") -> Recipe:
    spec = FLOAT if activations == "float" else TensorSpec(activations, "minmax")
    return Recipe((Rule("*", TensorSpec(weights), spec),), PREPARE)


def run_by_the_engine(model: lb.Model, tmp_path) -> Counter[str]:
    """Operators of onnxruntime's optimized graph, in a default session."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    onnxruntime.InferenceSession(serialize(model.program), options, providers=["CPUExecutionProvider"])
    return Counter(node.op_type for node in onnx.load(options.optimized_model_filepath).graph.node)


def arithmetic(model: lb.Model) -> dict[str, str]:
    return {
        row["tensor"]: row["arithmetic"] for row in from_text(model.metadata["lowbit.ledger"]) if "arithmetic" in row
    }


# ---- weights under integer kernels -----------------------------------------------------------------------------------


@pytest.mark.parametrize("words", [f"{kind}{bits} channel:0" for kind in ("int", "uint") for bits in range(2, 9)])
def test_weights_of_any_width_up_to_8_run_in_integer_kernels(words, tmp_path):
    quantized = lb.quantize(convolutions(), images(), recipe(words, "uint8"))
    found = run_by_the_engine(quantized, tmp_path)
    assert (found["QLinearConv"], found["QGemm"], found["DequantizeLinear"]) == (2, 1, 0)
    assert set(arithmetic(quantized).values()) == {"integers"}


@pytest.mark.parametrize("words", ["int8", "int4", "int3"])
def test_weights_with_one_scale_a_tensor_run_in_integer_kernels(words, tmp_path):
    quantized = lb.quantize(convolutions(), images(), recipe(words, "uint8"))
    assert run_by_the_engine(quantized, tmp_path)["QLinearConv"] == 2


@pytest.mark.parametrize("bits", range(2, 9))
def test_openvino_computes_the_same_with_weights_of_any_width(bits):
    pytest.importorskip("openvino")
    quantized = lb.quantize(convolutions(), images(), recipe(f"int{bits} channel:0", "uint8"))
    x = {"x": images(8, seed=5)}
    ours, theirs = quantized.run(x)["logits"], ENGINES["openvino"].compile(quantized.program)(x)["logits"]
    assert np.abs(ours - theirs).max() < 1e-2 * np.abs(ours).max()  # one step of an activation is 4e-3


@pytest.mark.parametrize("bits", range(2, 9))
def test_a_matrix_product_of_any_width_runs_in_integers(bits, tmp_path):
    rng = np.random.default_rng(0)
    model = network(
        "m (float[N,64] x) => (float[N,8] y) { h = MatMul (x, a) r = Relu (h) y = MatMul (r, b) }",
        a=rng.normal(size=(64, 32)),
        b=rng.normal(size=(32, 8)),
    )
    quantized = lb.quantize(
        model, rng.normal(size=(64, 64)).astype(np.float32), recipe(f"int{bits} channel:0", "uint8")
    )
    found = run_by_the_engine(quantized, tmp_path)
    assert found["MatMulIntegerToFloat"] + found["DynamicQuantizeMatMul"] + found["QLinearMatMul"] == 2


@pytest.mark.parametrize("bits", range(2, 9))
def test_weights_of_b_bits_take_b_bits_under_an_integer_kernel(bits, tmp_path):
    weight = np.random.default_rng(0).normal(size=(256, 64, 3, 3))
    model = network("m (float[N,64,8,8] x) => (float[N,256,6,6] y) { y = Conv (x, w) }", w=weight)
    x = np.random.default_rng(1).normal(size=(2, 64, 8, 8)).astype(np.float32)
    size = lb.quantize(model, x, recipe(f"int{bits} channel:0", "uint8")).save(tmp_path / "net.onnx")
    assert size == pytest.approx(weight.size * bits / 8 + 8 * 256, rel=0.02, abs=6000)  # scales, zeros; graph, ledger


@pytest.mark.slow
@pytest.mark.parametrize("recipe_name", ["w4a8", "w4a4"])
@pytest.mark.parametrize(
    ("name", "shape", "layers"),
    [("cifar10-resnet20", (3, 32, 32), 20), ("imagenet-mobilenet_v1_0.25_128", (3, 128, 128), 28)],
)
def test_a_trained_network_with_4_bit_weights_runs_in_integers(
    data, recipe_name, name, shape, layers, tmp_path, monkeypatch
):
    """lb.quantize itself holds every code of the file against the simulation, to one step."""
    monkeypatch.setattr("lowbit.repair.reconstruct.STEPS", 2)
    x = np.random.default_rng(0).normal(size=(4, *shape)).astype(np.float32)
    quantized = lb.quantize(lb.load(data / f"{name}.onnx"), x, recipe_name)
    found = run_by_the_engine(quantized, tmp_path)
    assert found["QLinearConv"] + found["QGemm"] == layers
    assert found["Conv"] + found["FusedConv"] == 0
    rows = from_text(quantized.metadata["lowbit.ledger"])
    weights = [row["format"].split()[0] for row in rows if row["role"] == "weight"]
    assert weights == ["int8", *["int4"] * (layers - 2), "int8"]


# ---- activations of any width ----------------------------------------------------------------------------------------

WIDTHS = [f"{kind}{bits}" for kind in ("uint", "int") for bits in range(2, 17)]


@pytest.mark.parametrize("words", WIDTHS)
def test_activations_of_any_width_saturate_where_the_simulation_does(words):
    """Data five times beyond what was calibrated: codes past the grid's ends would be further off than one step."""
    model, seen, beyond = convolutions(), images(32), 5 * images(8, seed=2)
    chosen = recipe("int8 channel:0", words)
    quantized, simulated = lb.quantize(model, seen, chosen), lb.simulation(model, seen, chosen)
    x = simulated.placement.sites["x"]
    written = export(simulated)  # before names are shortened
    codes = ENGINES["onnxruntime"].compile(written, outputs=["x_quantized"])({"x": beyond})["x_quantized"]
    quantizer = simulated.quantizers[x.value]
    assert isinstance(quantizer, FakeQuant)
    ends = quantizer.grid.values()
    half = 2 ** (quantizer.grid.bits - 1) if codes.dtype == np.uint8 and quantizer.grid.signed else 0
    assert (codes.min(), codes.max()) == (ends[0] + half, ends[-1] + half)
    with simulated.mode("quantize"):
        expected = simulated.module(torch.from_numpy(beyond))["logits"].detach().numpy()
    found = quantized.run({"x": beyond})["logits"]
    step = float(max(q.scale.max() for q in simulated.activations().values()))
    assert np.abs(found - expected).max() <= 2 * step + 1e-3 * np.abs(expected).max()


@pytest.mark.parametrize("words", ["int9", "uint12", "uint15", "int15"])
def test_openvino_computes_the_same_with_wide_activations_beyond_the_range(words):
    pytest.importorskip("openvino")
    chosen = Recipe(recipe("int8 channel:0", words).rules, PREPARE, "openvino")
    quantized, beyond = lb.quantize(convolutions(), images(32), chosen), {"x": 5 * images(8, seed=2)}
    ours, theirs = quantized.run(beyond)["logits"], ENGINES["openvino"].compile(quantized.program)(beyond)["logits"]
    assert np.abs(ours - theirs).max() < 1e-2 * np.abs(ours).max()


@pytest.mark.parametrize("words", ["uint16", "int16"])
def test_openvino_is_not_given_16_bit_activations(words):
    """Its logits were off by 1.7 times their largest with uint16, by 2.3 with int16 on data five times beyond."""
    chosen = Recipe(recipe("int8 channel:0", words).rules, PREPARE, "openvino")
    with pytest.raises(UnsupportedError, match="OpenVINO computes other numbers with 16-bit activations"):
        lb.quantize(convolutions(), images(32), chosen)


@pytest.mark.parametrize("words", ["uint4 channel:0", "uint8"])
def test_weights_with_a_zero_point_are_computed_with_in_float_by_openvino(words):
    pytest.importorskip("openvino")
    chosen = Recipe(recipe(words, "uint8").rules, PREPARE, "openvino")
    assert set(arithmetic(lb.quantize(convolutions(), images(), chosen)).values()) == {"float"}


@pytest.mark.parametrize("bits", range(2, 9))
def test_activations_of_few_bits_run_in_integer_kernels(bits, tmp_path):
    quantized = lb.quantize(convolutions(), images(), recipe("int4 channel:0", f"uint{bits}"))
    found = run_by_the_engine(quantized, tmp_path)
    assert (found["QLinearConv"], found["QGemm"], found["FusedConv"]) == (2, 1, 0)


CLIPPED = """m (float[N,4,8,8] x) => (float[N,8,8,8] y) {
    a = Conv <pads = [1,1,1,1]> (x, w) b = Clip (a, low, high)
    c = Conv <pads = [1,1,1,1], group = 8> (b, v) d = Relu (c)
    e = Conv (d, u) s = Add (e, b) k = Mul (s, factor) y = Conv (k, t) }"""


def clipped() -> lb.Model:
    """A clip that two nodes read, a residual sum, a constant factor a channel."""
    rng = np.random.default_rng(3)
    return network(
        CLIPPED,
        w=rng.normal(size=(8, 4, 3, 3)) / 3,
        low=np.float32(0),
        high=np.float32(6),
        v=rng.normal(size=(8, 1, 3, 3)),
        u=rng.normal(size=(8, 8, 1, 1)),
        factor=rng.uniform(0.5, 1.5, size=(1, 8, 1, 1)),
        t=rng.normal(size=(8, 8, 1, 1)),
    )


def four_channels() -> np.ndarray:
    return np.random.default_rng(4).normal(size=(16, 4, 8, 8)).astype(np.float32)


@pytest.mark.parametrize("bits", range(2, 9))
def test_signed_activations_run_in_integers_where_two_nodes_read_them_or_a_clip_is_behind(bits, tmp_path):
    quantized = lb.quantize(clipped(), four_channels(), recipe("int8 channel:0", f"int{bits}"))
    found = run_by_the_engine(quantized, tmp_path)
    assert (found["QLinearConv"], found["QLinearAdd"], found["QLinearMul"]) == (4, 1, 1)


@pytest.mark.parametrize(
    ("words", "said"), [("uint8", "integers"), ("int8", "integers"), ("uint12", "float"), ("int16", "float")]
)
def test_the_ledger_says_in_what_the_factor_of_a_mul_is_multiplied(words, said, tmp_path):
    quantized = lb.quantize(clipped(), four_channels(), recipe("int8 channel:0", words))
    assert arithmetic(quantized)["factor"] == said
    assert run_by_the_engine(quantized, tmp_path)["QLinearMul"] == (said == "integers")


@pytest.mark.parametrize("activations", ["uint8", "int8"])
@pytest.mark.parametrize("words", ["int4 group:4", "int4 group:16", "int4 group:32", "int12 channel:0"])
def test_weights_that_no_integer_kernel_reads_are_computed_with_in_float(words, activations, tmp_path):
    """Blocks as long as the sum are one scale an output: these layers run in integers, their biases too."""
    quantized = lb.quantize(convolutions(), images(), recipe(words, activations))
    found, said = run_by_the_engine(quantized, tmp_path), list(arithmetic(quantized).values())
    weights = [row for row in from_text(quantized.metadata["lowbit.ledger"]) if row["role"] == "weight"]
    assert found["QLinearConv"] + found["QGemm"] == sum(row["arithmetic"] == "integers" for row in weights)
    assert "float" in said
    assert (found["QGemm"] == 1) == (words in ("int4 group:16", "int4 group:32"))  # 16 products an output


def test_a_clip_at_computed_bounds_stays_in_float_behind_an_integer_convolution(tmp_path):
    rng = np.random.default_rng(5)
    model = network(
        """m (float[N,4,8,8] x) => (float[N,8,8,8] y) { a = Conv <pads = [1,1,1,1]> (x, w)
            high = ReduceMax <keepdims = 0> (x) low = Neg (high) b = Clip (a, low, high)
            y = Conv <pads = [1,1,1,1]> (b, v) }""",
        w=rng.normal(size=(8, 4, 3, 3)),
        v=rng.normal(size=(8, 8, 3, 3)),
    )
    quantized = lb.quantize(model, four_channels(), recipe("int8 channel:0", "uint8"))
    found = run_by_the_engine(quantized, tmp_path)
    assert (found["QLinearConv"], found["Clip"]) == (2, 1)
    rows = from_text(quantized.metadata["lowbit.ledger"])
    assert any("computed bounds" in row.get("reason", "") for row in rows if row["layer"] == "clip_3")


# ---- float arithmetic ------------------------------------------------------------------------------------------------


def matrices(seed: int = 0) -> lb.Model:
    """ids → embedding (300, 64) → two matrix products and a Gemm."""
    rng = np.random.default_rng(seed)
    return network(
        """m (int64[N,T] ids) => (float[N,T,32] y) {
            e = Gather (table, ids)
            a = MatMul (e, first)
            r = Relu (a)
            y = MatMul (r, second)
        }""",
        table=rng.normal(size=(300, 64)),
        first=rng.normal(size=(64, 96)) / 8,
        second=rng.normal(size=(96, 32)) / 10,
    )


def ids(count: int = 4) -> dict[str, np.ndarray]:
    return {"ids": np.random.default_rng(1).integers(0, 300, size=(count, 7))}


GATHERED = [
    *("int8 channel:0", "int4 group:32", "uint4 group:16", "int3 group:32", "int5", "int12 channel:0", "int4 group:24"),
    *("uint8 channel:0", "nf4", "mxfp4", "fp16", "vsq4", "nvfp4", "codebook4", "codebook3 channel:0", "mx6"),
]


@pytest.mark.parametrize("words", GATHERED)
def test_no_whole_weight_is_decoded_at_a_call_and_arithmetic_in_float_is_exact(words, tmp_path):
    model = matrices()
    quantized = lb.quantize(model, [ids()], recipe(words))
    found = run_by_the_engine(quantized, tmp_path)
    assert found["DequantizeLinear"] == found["MatMulNBits"] == 0
    assert found["MatMul"] + found["FusedMatMul"] == 2
    simulated = lb.simulation(model, [ids()], recipe(words))
    with simulated.mode("quantize"):
        expected = simulated.module(torch.from_numpy(ids()["ids"]))["y"].detach().numpy()
    assert np.abs(quantized.run(ids())["y"] - expected).max() <= 1e-5 * np.abs(expected).max()
    assert set(arithmetic(quantized).values()) == {"float"}


@pytest.mark.parametrize("words", ["int8 channel:0", "int4 group:32", "nf4", "int3 group:16", "uint8 channel:0"])
def test_an_embedding_is_looked_up_in_codes(words, tmp_path):
    """The engine holds the table in bytes: no float tensor of its size is left after loading."""
    quantized = lb.quantize(matrices(), [ids()], recipe(words))
    run_by_the_engine(quantized, tmp_path)
    optimized = onnx.load(tmp_path / "optimized.onnx")
    large = [t for t in optimized.graph.initializer if np.prod(t.dims) == 300 * 64]
    assert [t.data_type for t in large] in ([onnx.TensorProto.INT8], [onnx.TensorProto.UINT8])


def test_negative_ids_find_rows_from_the_end():
    quantized = lb.quantize(matrices(), [ids()], recipe("int4 group:32"))
    run = ENGINES["onnxruntime"].compile(quantized.program)
    back, front = run({"ids": np.array([[-1, -300]])})["y"], run({"ids": np.array([[299, 0]])})["y"]
    assert np.array_equal(back, front)


@pytest.mark.parametrize("words", ["int8 channel:0", "int4 group:16", "int4 channel:0", "int16"])
def test_recurrent_layers_and_transposed_convolutions_decode_nothing_at_a_call(words, tmp_path):
    rng = np.random.default_rng(0)
    model = network(
        """m (float[1,16,8,8] x) => (float[1,128] y) {
            a = ConvTranspose (x, up)
            b = Reshape (a, shape)
            h, last, c = LSTM <hidden_size = 32> (b, w, r)
            f = Squeeze (last)
            y = MatMul (f, out)
        }""",
        up=rng.normal(size=(16, 12, 3, 3)) / 10,
        shape=np.array([20, 1, 60]),
        w=rng.normal(size=(1, 128, 60)) / 10,
        r=rng.normal(size=(1, 128, 32)) / 10,
        out=rng.normal(size=(32, 128)) / 10,
    )
    x = rng.normal(size=(1, 16, 8, 8)).astype(np.float32)
    found = run_by_the_engine(lb.quantize(model, x, recipe(words)), tmp_path)
    assert found["DequantizeLinear"] == 0


# ---- the kernel of blocks, asked for by name -------------------------------------------------------------------------


def test_the_kernel_of_blocks_is_asked_for_by_name_and_the_ledger_says_so(tmp_path):
    model = matrices()
    quantized = lb.quantize(model, [ids()], "w4a8-blocks")
    found = run_by_the_engine(quantized, tmp_path)
    assert (found["MatMulNBits"], found["MatMul"], found["DequantizeLinear"]) == (2, 0, 0)
    assert arithmetic(quantized) == {
        "table": "float",
        "first": "activations int8 per block",
        "second": "activations int8 per block",
    }


@pytest.mark.parametrize(
    "text",
    [
        "g = Gemm <transB = 1> (x, w, b) y = Relu (g)",
        "g = Gemm <transB = 1> (x, w, b) r = Clip (g, low, high) y = Neg (r)",
        "g = Gemm <transB = 1> (x, w, b) r = Clip (g, low) y = Neg (r)",
        "g = Gemm <transB = 1> (x, w) r = Relu (g) y = Neg (r)",
    ],
)
def test_the_kernel_of_blocks_serves_a_layer_of_torch_with_a_relu_behind(text, tmp_path):
    rng = np.random.default_rng(0)
    constants = {
        "w": rng.normal(size=(48, 64)) / 8,
        "b": rng.normal(size=48),
        "low": np.float64(-0.5),
        "high": np.float64(1),
    }
    used = {name: value for name, value in constants.items() if f" {name}" in text}
    model = network("m (float[N,64] x) => (float[N,48] y) { " + text + " }", **used)
    x = {"x": rng.normal(size=(20, 64)).astype(np.float32)}
    quantized, simulated = lb.quantize(model, [x], "w4a8-blocks"), lb.simulation(model, [x], "w4a8-blocks")
    found = run_by_the_engine(quantized, tmp_path)
    assert (found["MatMulNBits"], found["DequantizeLinear"]) == (1, 0)
    with simulated.mode("quantize"):
        expected = simulated.module(torch.from_numpy(x["x"]))["y"].detach().numpy()
    assert np.abs(quantized.run(x)["y"] - expected).max() < 1e-5 * np.abs(expected).max()


def test_activations_in_blocks_that_no_kernel_computes_are_refused():
    with pytest.raises(UnsupportedError, match="no engine computes it"):
        lb.quantize(convolutions(), images(), "w4a8-blocks")
    with pytest.raises(UnsupportedError, match="'int8 group:32' for a MatMul"):
        lb.quantize(matrices(), [ids()], recipe("int4 group:16", "int8 group:32"))


@pytest.mark.parametrize("words", ["int4 group:32", "int8 channel:0", "nf4", "mxfp4", "int3 group:16"])
def test_a_file_that_is_loaded_and_saved_again_stays_as_small(words, tmp_path):
    once = lb.quantize(matrices(), recipe=words).save(tmp_path / "once.onnx")
    again = lb.load(tmp_path / "once.onnx").save(tmp_path / "again.onnx")
    assert again < 1.15 * once  # names of nodes, shapes; decoded weights would be 4 to 8 times larger
