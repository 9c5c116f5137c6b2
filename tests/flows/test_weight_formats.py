"""Weights in any format, from the words of a recipe to the file that onnxruntime runs."""

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

import lowbit as lb
from lowbit.engines.compile import ENGINES
from lowbit.errors import InputError
from lowbit.metadata import from_text
from lowbit.network.weights import orient
from lowbit.numerics import FORMATS, parse_format, spell_format
from lowbit.numerics.grids import Int
from lowbit.numerics.qtensor import as_torch
from lowbit.presets import RECIPES, find_recipe
from lowbit.ranges import MinMax, error
from lowbit.recipe import FLOAT, Recipe, Rule, TensorSpec

WORDS = [
    *(name for name, kind in FORMATS.items() if not isinstance(kind.grid, Int) or kind.scale is not None),
    *(
        "int4 group:32",
        "int3 channel:0",
        "int5 group:8",
        "uint2 group:16",
        "int8 channel:0",
        "int16",
        "codebook3 channel:0",
    ),
]


@pytest.fixture(scope="module")
def model() -> lb.Model:
    """A convolution, a fully connected layer and an embedding-like product; about 20,000 weights."""
    rng = np.random.default_rng(0)
    weights = {
        "conv.weight": rng.normal(size=(32, 16, 3, 3)) * 0.1,
        "fc.weight": rng.normal(size=(64, 128)) * 0.1,
        "out.weight": rng.normal(size=(64, 130)) * rng.normal(size=(64, 1)),
    }
    nodes = [
        helper.make_node("Conv", ["x", "conv.weight"], ["c"], name="conv", pads=[1, 1, 1, 1], strides=[4, 4]),
        helper.make_node("Relu", ["c"], ["r"], name="relu"),
        helper.make_node("Flatten", ["r"], ["f"], name="flatten"),
        helper.make_node("Gemm", ["f", "fc.weight"], ["g"], name="fc", transB=1),
        helper.make_node("MatMul", ["g", "out.weight"], ["y"], name="out"),
    ]
    graph = helper.make_graph(
        nodes,
        "net",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 16, 8, 8])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 130])],
        [numpy_helper.from_array(w.astype(np.float32), name) for name, w in weights.items()],
    )
    return lb.load(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10))


def ledger(model: lb.Model) -> list[dict]:
    return from_text(model.metadata["lowbit.ledger"])


@pytest.fixture(scope="module")
def x() -> dict[str, np.ndarray]:
    return {"x": np.random.default_rng(1).normal(size=(4, 16, 8, 8)).astype(np.float32)}


@pytest.mark.parametrize("words", WORDS)
def test_the_file_computes_with_the_formats_values_and_the_ledger_names_its_bits(model, x, words):
    """Replacing each weight by its dequantized self in float gives the same outputs as the low-bit file."""
    quantized = lb.quantize(model, [x], words)
    kind, row = orient(parse_format(words), 0, 1), next(r for r in ledger(quantized) if r["tensor"] == "fc.weight")
    assert row["format"] == spell_format(kind)
    assert row["bits"] == pytest.approx(kind.bits_per_element((64, 128)), rel=1e-3)  # four digits
    expected = model.copy()
    for name, axes in {"conv.weight": (0, 1), "fc.weight": (0, 1), "out.weight": (1, 0)}.items():
        value = expected.program.graph.initializers[name]
        stored = _solve(model, name, orient(parse_format(words), *axes, tuple(value.shape.numpy())))
        value.const_value = onnx_tensor(stored, name)
    # As written: onnxruntime's fused kernel for grouped integers rounds the activations as well, for speed.
    y, reference = ENGINES["onnxruntime"].compile(quantized.program, optimize=False)(x)["y"], expected.run(x)["y"]
    assert np.abs(y - reference).max() <= 1e-5 * np.abs(reference).max()


def _solve(model: lb.Model, name: str, kind: lb.Format) -> np.ndarray:
    from lowbit.solve import SOLVERS

    weight = as_torch(model.program.graph.initializers[name].const_value.numpy())
    return np.asarray(SOLVERS["nearest"](weight, TensorSpec(kind), None).dequantize())


def onnx_tensor(array: np.ndarray, name: str):
    import onnx_ir as ir

    return ir.tensor(array, name=name)


def test_a_rule_gives_each_layer_its_own_format(model, x):
    def spec(words: str) -> TensorSpec:
        return TensorSpec(parse_format(words))

    recipe = Recipe(
        (Rule("*", spec("mxfp4"), FLOAT), Rule("fc", spec("codebook:4"), FLOAT), Rule("conv", FLOAT, FLOAT))
    )
    assert Recipe.from_toml(recipe.to_toml()) == recipe
    formats = {row["tensor"]: row["format"] for row in ledger(lb.quantize(model, [x], recipe))}
    assert formats["fc.weight"] == "codebook4"
    assert formats["out.weight"] == "mxfp4 axis:0"
    assert formats["conv.weight"] == "float"


@pytest.mark.parametrize("name", [name for name in RECIPES if name.endswith("-weights")])
def test_presets_store_weights_and_round_trip(model, x, name):
    recipe = find_recipe(name)
    assert Recipe.from_toml(recipe.to_toml()) == recipe
    bits = [row["bits"] for row in ledger(lb.quantize(model, [x], name)) if row["role"] == "weight"]
    assert max(bits) < 10


def test_words_and_formats_of_ones_own_are_recipes(model, x):
    assert Rule("fc", "codebook:4") == Rule("fc", TensorSpec(parse_format("codebook:4")))
    assert TensorSpec("int4 group:64", "minmax").range == MinMax()
    assert Rule("*", "float", "float") == Rule("*", FLOAT, FLOAT)
    assert find_recipe(lb.Format(lb.E2M1, lb.group(16))) == find_recipe("e2m1 group:16")
    FORMATS["mine"] = lb.Format(lb.Codebook((-1.0, 0.0, 0.5, 2.0)), lb.group(24))
    try:
        rows = {row["tensor"]: row for row in ledger(lb.quantize(model, [x], "mine"))}
    finally:
        del FORMATS["mine"]
    assert rows["fc.weight"]["format"] == "mine axis:1"
    assert rows["fc.weight"]["bits"] == pytest.approx(2 + 6 * 32 / 128)  # six groups in a row of 128


def test_a_spec_needs_a_format():
    with pytest.raises(InputError, match="says no format"):
        Recipe.from_toml('[[rules]]\nweights = { range = "mse" }')


@pytest.mark.parametrize(
    ("shape", "words"),
    [
        ((64, 1, 3, 3), "mxfp4 tile:3x0x0"),  # depthwise: three kernels of one channel would be 27, there is one
        ((64, 16, 3, 3), "mxfp4 tile:3x0x0"),  # 3 kernels of 9 weights
        ((64, 32, 3, 3), "mxfp4 axis:1"),
        ((64, 16), "mxfp4 axis:1"),
    ],
)
def test_groups_of_a_convolution_run_along_its_sum(shape, words):
    kind = orient(FORMATS["mxfp4"], 0, 1, shape)
    assert spell_format(kind) == words
    assert kind.bits_per_element(shape) < 4 + 8 / 9 + 0.01


def test_words_that_are_no_format_are_answered_with_what_is(model, x):
    with pytest.raises(InputError, match=r"Presets are: int8.*Did you mean mxfp4"):
        lb.quantize(model, [x], "mxfp5")


@pytest.fixture(scope="module")
def million() -> lb.Model:
    weight = np.random.default_rng(0).normal(size=(1024, 1024)).astype(np.float32)
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["y"], name="fc")],
        "net",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 1024])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 1024])],
        [numpy_helper.from_array(weight, "w")],
    )
    return lb.load(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10))


# Integers of these widths are written as those beside them are: the slow tests have them.
BETWEEN = [f"{kind}{bits}" for kind in ("int", "uint") for bits in (5, 6, 7, 10, 11, 12, 14, 15)]


@pytest.mark.parametrize(
    "words",
    [
        *(pytest.param(words, marks=pytest.mark.slow) if words in BETWEEN else words for words in FORMATS),
        *("int3 channel:0", "int4 group:32", "uint5 group:32", "bases3 group:256", "apot7", "e4m1"),
    ],
)
def test_a_million_weights_take_the_bits_of_their_format_on_disk(million, words, tmp_path):
    quantized = lb.quantize(million, [{"x": np.ones((1, 1024), np.float32)}], words)
    size = quantized.save(tmp_path / "net.onnx")
    bits = next(row["bits"] for row in ledger(quantized) if row["tensor"] == "w")
    assert size == pytest.approx(bits * 2**20 / 8, rel=0.02)
    onnx.checker.check_model(onnx.load(tmp_path / "net.onnx"))


def test_the_error_of_the_ledger_is_that_of_the_tensor(model, x):
    row = next(r for r in ledger(lb.quantize(model, [x], "nf4")) if r["tensor"] == "fc.weight")
    weight = model.program.graph.initializers["fc.weight"].const_value.numpy()
    assert row["sqnr_db"] >= error(weight, FORMATS["nf4"].along(1)).sqnr_db - 0.01
