"""Static or dynamic, layer by layer: a layer measures its range at each input where that saves enough error."""

import json
from collections.abc import Collection, Iterator
from importlib import import_module
from itertools import islice
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from toy_networks import convolutions, images, network, sqnr_db

import lowbit as lb
from lowbit.engines.compile import Batch
from lowbit.engines.read_back import read_back
from lowbit.errors import UnsupportedError
from lowbit.graph.weights import constant
from lowbit.repair.choose_dynamic import _worth
from lowbit.report.ledger import Ledger

SAMPLES = 24
RULE = lb.Rule("*", lb.TensorSpec("int8 channel:0", "minmax"), lb.TensorSpec("uint8", "auto"))


def two_products() -> tuple[lb.Model, dict[str, np.ndarray]]:
    """x, whose samples differ in size by up to 1000, and z, always from −1 to 1, each with a product of its own.

    What the first makes is normalized, so that small samples count as much as large ones.
    """
    rng = np.random.default_rng(0)
    model = network(
        """
        toy (float[B,T,32] x, float[B,T,32] z) => (float[B,T,24] y, float[B,T,24] u) {
            p = MatMul (x, w)
            y = LayerNormalization (p, one)
            u = MatMul (z, v)
        }""",
        w=rng.normal(size=(32, 24)),
        v=rng.normal(size=(32, 24)),
        one=np.ones(24),
    )
    sizes = np.geomspace(1, 1000, SAMPLES)[rng.permutation(SAMPLES), None, None]
    x = rng.normal(size=(SAMPLES, 8, 32)) * sizes
    z = np.clip(rng.normal(size=(SAMPLES, 8, 32)), -1, 1)
    return model, {"x": x.astype(np.float32), "z": z.astype(np.float32)}


@pytest.fixture(scope="module")
def unhurried() -> Iterator[None]:
    """A file takes 0.7 % more time for each range that it measures, as MiniLM's does: no clock has a say in a test."""

    def seconds(program: ir.Model, layers: Collection[str], batch: Batch) -> dict[str, float]:
        return {"": 1 + 0.007 * sum(node.op_type == "DynamicQuantizeLinear" for node in program.graph)}

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lowbit.flows.ptq.layer_seconds", seconds)
        yield


@pytest.fixture(scope="module")
def mixed(unhurried) -> lb.Model:
    model, samples = two_products()
    return lb.quantize(model, samples, "int8-mixed")


def passes(model: lb.Model) -> list[str]:
    return json.loads(model.metadata["lowbit.passes"])


def test_what_varies_between_samples_becomes_dynamic_and_the_rest_stays_static(mixed):
    operators = [node.op_type for node in mixed.program.graph]
    assert read_back(mixed.program, "onnxruntime").operators == {
        "matmul_0": "DynamicQuantizeMatMul",
        "matmul_2": "MatMulIntegerToFloat",
    }
    assert operators.count("DynamicQuantizeLinear") == operators.count("QuantizeLinear") == 1
    assert "1 layer measured at each input: matmul_0" in passes(mixed)


def test_it_is_closer_to_float_than_static_ranges(mixed):
    model, samples = two_products()
    passes = tuple(name for name in lb.RECIPES["int8-normalized"]().passes if name != "leave_in_float")
    exact, static = model.run(samples), lb.quantize(model, samples, lb.Recipe((RULE,), passes))
    one = [{name: array[i : i + 1] for name, array in samples.items()} for i in range(SAMPLES)]
    found = [sqnr_db(exact["y"], np.concatenate([file.run(sample)["y"] for sample in one])) for file in (mixed, static)]
    assert found[0] > 30 > 10 > found[1]


def test_the_ledger_tells_the_dynamic_layer_from_the_static_one(mixed):
    rows = {row["tensor"]: row for row in Ledger.of(mixed).rows}
    assert [rows[name].get("dynamic", False) for name in ("w", "v")] == [True, False]
    assert rows["x_rows"]["range"] == "dynamic minmax"
    assert "dynamic" not in rows["z"]["range"]
    assert "measured at each input: 1 layer: matmul_0" in Ledger.of(mixed).summary(Path("net.onnx"), (9, 0), 3, 1.0)


def test_the_recipe_in_the_file_makes_the_same_file(mixed):
    model, samples = two_products()
    recipe = lb.Recipe.from_toml(mixed.metadata["lowbit.recipe"])
    assert "choose_dynamic" not in recipe.passes
    again = lb.quantize(model, samples, recipe)
    assert again.metadata["lowbit.recipe"] == mixed.metadata["lowbit.recipe"]
    first, second = (file.program.graph.initializers for file in (mixed, again))
    assert list(first) == list(second)
    assert all(np.array_equal(constant(first[name]), constant(second[name])) for name in first)


def test_a_network_without_such_a_layer_gets_the_same_file_as_without_the_step_and_is_told():
    found = [lb.quantize(convolutions(), images(16), recipe) for recipe in ("int8-mixed", "int8-normalized")]
    (why,) = Ledger.of(found[0]).left_out
    assert why.startswith("left out: no layer can measure its range at each input")
    assert found[0].metadata["lowbit.recipe"] == found[1].metadata["lowbit.recipe"]
    first, second = (file.program.graph.initializers for file in found)
    assert all(np.array_equal(constant(first[name]), constant(second[name])) for name in second)


def test_a_target_without_such_kernels_is_refused():
    model, samples = two_products()
    with pytest.raises(UnsupportedError, match="'choose_dynamic': target 'openvino' has no kernels that measure"):
        lb.quantize(model, samples, "int8-mixed", target="openvino")


def test_the_program_is_made_anew_so_equalization_has_to_come_later():
    model, samples = two_products()
    (why,) = Ledger.of(lb.quantize(model, samples, lb.Recipe((RULE,), ("equalize", "choose_dynamic")))).left_out
    assert "must stand before 'equalize'" in why


@pytest.mark.parametrize(
    ("share", "chosen"),
    [
        (0.02, 1),  # 36 % of the error for 2 % of the time: ln 0.64 + 11.1 · 0.02 = −0.22
        (0.05, 0),  # for 5 %: +0.11
    ],
)
def test_a_second_is_worth_the_error_that_another_bit_saves(share, chosen):
    value = frozenset({"layer"})
    assert len(_worth({value: 0.36}, {value: share}, 1.0)) == chosen


@pytest.mark.slow
def test_sentences_gain_from_a_few_dynamic_layers(unhurried, data, tmp_path, monkeypatch):
    monkeypatch.setenv("LOWBIT_DATA", str(data))
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "examples")
    sentences = import_module("sentences")
    sentences.export(str(tmp_path / "net.onnx"))
    model, few = lb.load(tmp_path / "net.onnx"), list(islice(sentences.calibration(), 12))
    files = [lb.quantize(model, few, recipe) for recipe in ("int8-normalized", "int8-mixed")]
    tests = [batch for batch, _ in islice(sentences.pairs(), 4)]
    exact, *found = (np.concatenate([next(iter(net.run(x).values())) for x in tests]) for net in (model, *files))
    static, mixed = (sqnr_db(exact, rough) for rough in found)
    products = [row for row in Ledger.of(files[1]).rows if row["role"] == "weight" and row["arithmetic"] == "integers"]
    assert 1 <= sum(row.get("dynamic", False) for row in products) < len(products)
    assert mixed > static  # 27.3 and 22.7 dB
