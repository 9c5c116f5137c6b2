"""Formats of layers under a budget: what is predicted, what is chosen, and what the files then weigh and compute."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from benchmarks.networks import CASES, FOLDER
from small_networks import recurrent, transformer
from toy_networks import convolutions, images, network, sqnr_db

import lowbit as lb
from lowbit.engines.compile import serialize
from lowbit.engines.profile import layer_seconds
from lowbit.errors import DataError, InputError, TooSmallError, UnsupportedError
from lowbit.metadata import from_text
from lowbit.model import Model
from lowbit.network.calibrate import forward, solve_alone
from lowbit.network.network import Network
from lowbit.numerics import parse_format
from lowbit.repair.prove import float_outputs

GPTQ = lb.Recipe(
    (lb.Rule("*", lb.TensorSpec("int4 channel:0", solve="gptq"), lb.TensorSpec("uint8", "minmax")),), ("fuse_gemm",)
)


def unequal() -> Model:
    """Two products of matrices: 4,096 weights that reach the outputs by a hundredth, then 256 that make them."""
    rng = np.random.default_rng(0)
    return network(
        """
        two (float[N,64] x) => (float[N,4] y) {
            a = Gemm (x, w1, b1)
            c = Add (a, x)
            y = Gemm (c, w2, b2)
        }""",
        w1=rng.normal(size=(64, 64)) / 800,
        b1=np.zeros(64),
        w2=rng.normal(size=(64, 4)) / 8,
        b2=np.zeros(4),
    )


def widths(model: Model) -> dict[str, str]:
    rows = from_text(model.metadata["lowbit.ledger"])
    return {row["tensor"]: row["format"] for row in rows if row["role"] == "weight"}


def rows_of(count: int = 96) -> np.ndarray:
    return np.random.default_rng(1).normal(size=(count, 64)).astype(np.float32)


def test_bits_go_where_the_outputs_need_them():
    model, x = unequal(), rows_of()
    exact = model.run({"x": x})["y"]
    mixed = lb.quantize(model, x, lb.mixed_precision(model, x, GPTQ, bits=4))
    plain = lb.quantize(model, x, GPTQ)
    found = widths(mixed)
    assert parse_format(found["w1"]).grid.bits < 4 < parse_format(found["w2"]).grid.bits
    assert len(serialize(mixed.program)) <= len(serialize(plain.program)) + 200
    assert sqnr_db(exact, mixed.run({"x": x})["y"]) > sqnr_db(exact, plain.run({"x": x})["y"]) + 3


def test_one_format_for_all_is_chosen_where_mixtures_are_judged_worse(monkeypatch):
    """As of kws-dscnn with a mean of 4 bits: 23.9 dB mixed, 26.4 dB in int4."""

    def by_formats(network: Network, *_: object) -> float:
        return float(len({site.spec.format for site, _ in network.constants().values() if site.role == "weight"}))

    monkeypatch.setattr("lowbit.flows.real_networks.judging_error", by_formats)
    recipe = lb.mixed_precision(unequal(), rows_of(), GPTQ, bits=4)
    assert [rule.weights.format for rule in recipe.rules] == [parse_format("int4 channel:0")]


@pytest.mark.slow
def test_a_larger_budget_is_a_larger_and_better_file():
    model, x = unequal(), rows_of()
    exact = model.run({"x": x})["y"]
    # With 2.2 bits w2, which makes the outputs, gets 8 of them already: 41.8 dB.
    files = [lb.quantize(model, x, lb.mixed_precision(model, x, bits=bits)) for bits in (2.1, 6)]
    few, many = (sqnr_db(exact, file.run({"x": x})["y"]) for file in files)
    assert many > few + 3
    assert len(serialize(files[0].program)) < len(serialize(files[1].program))


@pytest.mark.slow
def test_a_share_of_the_float_file_is_kept():
    model, x = unequal(), rows_of()
    mixed = lb.quantize(model, x, lb.mixed_precision(model, x, size=0.35))
    assert len(serialize(mixed.program)) <= 0.35 * len(serialize(model.program))


def test_a_budget_that_cannot_be_met_names_the_nearest():
    model, x = unequal(), rows_of()
    with pytest.raises(TooSmallError, match=r"mean of 1 bits .* Ask for 2 or more"):
        lb.mixed_precision(model, x, bits=1)


@pytest.mark.slow
def test_a_size_that_cannot_be_met_names_one_that_can():
    model, x = unequal(), rows_of()
    with pytest.raises(TooSmallError, match=r"Ask for 0\.\d+ or more") as told:
        lb.mixed_precision(model, x, size=0.05)
    nearest = float(str(told.value).split("Ask for ")[1].split(" ")[0])
    smallest = lb.quantize(model, x, lb.mixed_precision(model, x, size=nearest))
    assert len(serialize(smallest.program)) <= nearest * len(serialize(model.program))


@pytest.mark.parametrize("bits", [2, 4])
def test_a_network_whose_bytes_are_mostly_notes_gets_one_format_for_all(bits):
    """The file of 4 bits a weight is smaller than the one of 2, whose codes take more nodes."""
    base = lb.Recipe((lb.Rule("*", "int4 channel:0", "uint8"), lb.Rule("at:input", "int8 channel:0", "uint8")))
    model, x = convolutions(), images(16)
    file = lb.quantize(model, x, lb.mixed_precision(model, x, base, bits=bits))
    assert {parse_format(word).grid.bits for word in widths(file).values()} == {bits}


@pytest.mark.parametrize(
    "budget", [{}, {"bits": 4, "size": 0.5}, {"bits": -1}, {"size": float("nan")}, {"bits": 0}, {"latency": 1}]
)
def test_a_budget_is_one_positive_number(budget):
    with pytest.raises(InputError, match="budget"):
        lb.mixed_precision(unequal(), rows_of(), **budget)


@pytest.mark.slow
@pytest.mark.parametrize("make", [recurrent, transformer], ids=["lstm", "transformer"])
def test_networks_of_another_kind_get_a_recipe_that_deploys(make):
    model, inputs = make()
    quantized = lb.quantize(model, inputs, lb.mixed_precision(model, inputs, bits=5))
    assert len(widths(quantized)) >= 1
    assert all(np.isfinite(y).all() for y in quantized.run(inputs).values())


def test_a_recipe_of_weights_alone_keeps_its_blocks():
    model, x = unequal(), rows_of()
    recipe = lb.mixed_precision(model, x, "int4 group:32", bits=4)
    assert {rule.weights.format.block for rule in recipe.rules} == {lb.group(32)}
    assert all(rule.activations in (None, lb.FLOAT) for rule in recipe.rules)


def test_older_processors_get_weights_of_seven_bits_at_most():
    model, x = convolutions(), images()
    rows = lb.sensitivity(model, x, target="onnxruntime-avx2")
    assert {row.format for row in rows if row.role == "weight"} == {f"int{bits} channel:0" for bits in range(2, 8)}


def test_more_bits_cost_less_at_the_outputs_and_more_bytes():
    rows = [row for row in lb.sensitivity(convolutions(), images()) if row.tensor == "conv2.weight"]
    found = {row.format: row for row in rows}
    for few, many in (("int2", "int4"), ("int4", "int6"), ("int6", "int8"), ("lloyd2", "lloyd4")):
        assert found[f"{few} channel:0"].error > 3 * found[f"{many} channel:0"].error
        assert found[f"{few} channel:0"].bytes < found[f"{many} channel:0"].bytes
    assert found["int4 channel:0"].bytes == 16 * 8 * 9 // 2 + 4 * 16  # codes and 16 scales


def test_a_loss_of_labels_needs_them_and_they_are_classes():
    x, labels = images(16), np.arange(16) % 4
    with pytest.raises(DataError, match="loss='labels' needs the classes of the samples"):
        lb.sensitivity(convolutions(), x, loss="labels")
    with pytest.raises(DataError, match="are not classes of an output; outputs are "):
        lb.sensitivity(convolutions(), (x, labels / 2), loss="labels")
    with pytest.raises(InputError, match=r"loss 'mse' does not exist. There are squares, cross_entropy, labels"):
        lb.mixed_precision(convolutions(), (x, labels), bits=4, loss="mse")


def rank(values: list[float]) -> np.ndarray:
    return np.argsort(np.argsort(values))


def correlation(model: Model, data: object, formats: tuple[str, ...]) -> float:
    """Spearman's, of the predicted errors and those of one weight in one format at a time."""
    from lowbit.flows.prices import _tried
    from lowbit.flows.ptq import given, observed

    seen = observed(*given(model, data, "w4a8", None))
    predicted = {(r.tensor, r.format): r.error for r in lb.sensitivity(model, data, formats=formats) if r.bytes}
    simulation, batches = seen.network, seen.calibration.fitting[:2]
    exact, found = float_outputs(simulation, batches), {}
    for name, (site, quantizer) in simulation.constants().items():
        tried = _tried(simulation, site, formats)
        solved = solve_alone(simulation, seen.calibration.together[:2], {name: list(tried.values())})
        for word, codes in zip(tried, solved[name], strict=True):
            quantizer.store(codes)
            with simulation.mode("quantize", [quantizer]):
                rough = [forward(simulation, batch) for batch in batches]
            pairs = [(a[key], b[key]) for a, b in zip(exact, rough, strict=True) for key in a]
            found[name, word] = sum(float((a - b).square().sum()) for a, b in pairs)
    pairs = [(predicted[key], error) for key, error in found.items() if key in predicted]
    return float(np.corrcoef(rank([a for a, _ in pairs]), rank([b for _, b in pairs]))[0, 1])


@pytest.mark.slow
@pytest.mark.skipif(not FOLDER.exists(), reason="LOWBIT_DATA has no networks")
@pytest.mark.parametrize("name", ["resnet20", "kws", "mobilenet"])
def test_what_is_predicted_ranks_as_switching_one_tensor_at_a_time_does(name):
    torch.set_num_threads(1)
    case = CASES[name]
    model = lb.load(case.file())
    found = correlation(model, case.calibration(model).take(48), ("int3", "int4", "int6"))
    assert found >= 0.9  # measured: see docs/mixed-precision.md


LINEAR = ("Conv", "Gemm")


@pytest.fixture
def clock(monkeypatch):
    """A made-up engine: a convolution or product takes 3 ms in float and 1 ms in integers, all else nothing."""
    name = "lowbit.flows.latency_budget."

    def seconds(program, layers, sample):
        linear = 0.001 if any(node.op_type == "QuantizeLinear" for node in program.graph) else 0.003
        kinds = {node.name: node.op_type for node in program.graph}
        return {layer: linear * (kinds[layer] in LINEAR) for layer in layers} | {"": 0.0}

    def compiled(program, threads):
        quantized = [node.inputs[1].producer() is not None for node in program.graph if node.op_type in LINEAR]
        assert len(quantized) == 3
        return lambda sample: sum(1.0 if codes else 3.0 for codes in quantized)

    def timed(runs, seconds):
        return {key: SimpleNamespace(median_ms=run()) for key, run in runs.items()}

    monkeypatch.setattr(name + "layer_seconds", seconds)
    monkeypatch.setattr(name + "side_by_side", timed)
    monkeypatch.setattr(name + "ENGINES", {"onnxruntime": SimpleNamespace(compile=compiled)})


def linear_in_float(model: Model, recipe: lb.Recipe) -> int:
    nodes = [str(node.name) for node in model.program.graph if node.op_type in LINEAR]
    return sum(recipe.specs([name])[1] == lb.FLOAT for name in nodes)


def test_a_budget_of_time_leaves_as_many_layers_in_float_as_it_pays_for(clock):
    """Three layers: 9 ms in float, 5 with two of them in integers, 3 with all."""
    model, x = convolutions(), images(16)
    recipes = [lb.mixed_precision(model, x, latency=share) for share in (0.34, 0.6)]
    assert [linear_in_float(model, recipe) for recipe in recipes] == [0, 1]
    with pytest.raises(TooSmallError, match=r"0\.2 of the float network's time.* took 0\.333: ask for 0\.34 or more"):
        lb.mixed_precision(model, x, latency=0.2)


def test_a_budget_of_time_needs_an_engine_with_a_profile():
    with pytest.raises(UnsupportedError, match="target 'openvino'"):
        lb.mixed_precision(convolutions(), images(16), latency=0.5, target="openvino")


def test_each_layer_has_its_time_with_what_follows_it():
    model, x = convolutions(), images(1)
    layers = [str(node.name) for node in model.program.graph if node.op_type == "Conv"]
    found = layer_seconds(model.program, layers, {"x": x})
    assert set(found) == {*layers, ""}
    assert min(found[layer] for layer in layers) > 0
