"""A diagnosis names the cause that was built in, with its number, and the lines that it gives mend it."""

import json
import re
from typing import Any

import numpy as np
import pytest
from toy_networks import convolutions, images, network, sqnr_db

import lowbit as lb
from lowbit.errors import DataError, InputError
from lowbit.flows.causes import Remedy
from lowbit.flows.diagnose import diagnose
from lowbit.flows.diagnosis import Diagnosis
from lowbit.flows.inputs import InputFacts
from lowbit.flows.operations import multiply_adds, operations
from lowbit.flows.shifts import Shift
from lowbit.recipe import PREPARE

_rng = np.random.default_rng


def quick(model: lb.Model, data: Any, recipe: Any = "int8-fast", **more: Any) -> Diagnosis:
    return diagnose(model, data, recipe, latency=False, **{"shifts": (), **more})


def mended(found: Diagnosis, cause: str) -> lb.Recipe:
    """The recipe that was used with the lines of this cause behind it, as a user pastes them."""
    return lb.Recipe.from_toml(found.recipe + "\n" + remedy(found, cause).recipe)


def remedy(found: Diagnosis, cause: str) -> Remedy:
    """The mildest remedy of a cause that has lines for the recipe."""
    return next(r for f in found.findings if f.cause == cause for r in f.remedies if r.recipe)


def outputs_db(model: lb.Model, recipe: Any, x: np.ndarray) -> float:
    """SQNR of the deployed file's outputs."""
    batch = {model.inputs[0].name: x}
    name = model.outputs[0].name
    return sqnr_db(model.run(batch)[name], lb.quantize(model, x, recipe).run(batch)[name])


def two_products(first: np.ndarray, second: np.ndarray, between: str = "h = Relu (p)", **constants: Any) -> lb.Model:
    """x (N, inputs) → product → something → product → y."""
    text = (
        f"two (float[N,{len(first)}] x) => (float[N,{second.shape[1]}] y) {{ p = MatMul (x, first__weight) {between} "
    )
    return network(text + "y = MatMul (h, second__weight) }", first__weight=first, second__weight=second, **constants)


def test_one_scale_for_unequal_channels_is_told_with_its_ratio_and_mended():
    first = _rng(0).normal(size=(16, 32)) * np.where(np.arange(32) == 3, 60.0, 1.0)
    model = two_products(first, _rng(1).normal(size=(32, 8)) * np.where(np.arange(32) == 3, 1 / 60, 1.0)[:, None])
    x = _rng(2).normal(size=(64, 16)).astype(np.float32)
    recipe = lb.Recipe((lb.Rule("*", lb.TensorSpec("int8", "minmax"), lb.TensorSpec("uint8", "minmax")),))
    found = quick(model, x, recipe)
    told = next(f for f in found.findings if f.cause == "channel spread" and "first.weight" in f.tensors)
    ratio = float(re.search(r"([\d.]+) times", told.told)[1])  # type: ignore[index]
    assert told.tensors[0] == "first.weight"
    largest = np.abs(first).max(0)
    assert ratio == pytest.approx(largest.max() / np.sort(largest)[15], rel=0.01)  # torch's median of 32 is the 16th
    assert outputs_db(model, mended(found, "channel spread"), x) > outputs_db(model, recipe, x) + 1


def test_a_range_that_one_value_stretches_is_told_and_mended():
    """One of 512,000 values is 100 times the 99.9th percentile; it is in none of the samples that judge."""
    model = two_products(np.eye(512), _rng(1).normal(size=(512, 8)), "h = Identity (p)")
    x = _rng(2).normal(size=(700, 512)).astype(np.float32)
    x[600, 3] = 330
    found = quick(model, x)
    told = next(f for f in found.findings if f.cause == "range outlier")
    p999 = np.quantile(np.abs(x), 0.999)
    assert told.told.startswith(f"its largest value, 330, is {330 / p999:.1f} times the 99.9th percentile, {p999:.3g}")
    assert remedy(found, "range outlier").outputs_db > found.measured_db + 10  # calibrated anew with the lines
    recipes = "int8-fast", mended(found, "range outlier")
    exact = model.run({"x": x[:100]})["y"]
    before, after = (lb.quantize(model, x, r).run({"x": x[:100]})["y"] for r in recipes)
    assert sqnr_db(exact, after) > sqnr_db(exact, before) + 10


def test_a_mask_that_is_computed_is_told_and_its_layers_left_in_float():
    text = """
        masked (float[N,2,8] x, float[N,2,8] mask) => (float[N,2,4] y) {
            h = MatMul (x, first__weight)
            never = Mul (mask, lowest)
            s = Add (h, never)
            y = MatMul (s, second__weight)
        }"""
    second = _rng(1).normal(size=(8, 4))
    model = network(text, first__weight=_rng(0).normal(size=(8, 8)), second__weight=second, lowest=np.float32(-1e5))
    x = _rng(2).normal(size=(64, 2, 8)).astype(np.float32)
    mask = np.zeros((64, 2, 8), np.float32)
    mask[::4, :, -1] = 1
    found = quick(model, {"x": x, "mask": mask})
    told = next(f for f in found.findings if f.cause == "mask constant")
    assert "-1e+05" in told.told
    lb.quantize(model, {"x": x, "mask": mask}, mended(found, "mask constant"))


def test_the_tail_of_a_silu_is_told_with_the_codes_that_it_has():
    between = "s = Sigmoid (p) h = Mul (p, s)"
    model = two_products(_rng(0).normal(size=(16, 32)), _rng(1).normal(size=(32, 8)), between)
    x = 4 * _rng(2).normal(size=(64, 16)).astype(np.float32)
    found = quick(model, x)
    silu = next(t for t in found.tensors if t.name == "h")
    told = next(f for f in found.findings if f.cause == "asymmetric tail")
    assert silu.minimum == pytest.approx(-0.2785, abs=1e-3)
    assert silu.codes_below_zero == round(-silu.low / silu.step) <= 4
    assert f"{silu.codes_below_zero} codes" in told.told
    assert mended(found, "asymmetric tail")


def test_four_bits_are_told_with_their_ratio_and_eight_mend_it():
    model = two_products(_rng(0).normal(size=(16, 32)), _rng(1).normal(size=(32, 8)))
    x = _rng(2).normal(size=(64, 16)).astype(np.float32)
    recipe = lb.Recipe(
        (lb.Rule("*", lb.TensorSpec("int4 channel:0", "minmax", "gptq"), lb.TensorSpec("uint8", "minmax")),)
    )
    found = quick(model, x, recipe)
    told = next(f for f in found.findings if f.cause == "few bits")
    assert told.told.startswith("4 bits, rounded by 'gptq'")
    rounded, wider = told.remedies
    assert (rounded.told[:20], wider.told) == ("Round by 'adaround'.", "Give them 8 bits.")
    assert rounded.outputs_db is None  # it takes minutes
    better = lb.Recipe.from_toml(found.recipe + "\n" + wider.recipe)
    assert outputs_db(model, better, x) > outputs_db(model, recipe, x) + 15  # 4 bits are 24 dB


def test_ranges_that_still_grow_are_told_as_too_few_samples():
    model, growing = convolutions(), images(16) * np.geomspace(1, 6, 16, dtype=np.float32).reshape(16, 1, 1, 1)
    few, many = (quick(model, data) for data in (growing, images(200)))
    told = next(f.told for f in few.findings if f.cause == "too few samples")
    assert re.match(r"\d of \d ranges moved by more than 10 % of their width from half of the 16 samples to all", told)
    assert "too few samples" not in {f.cause for f in many.findings}


def test_three_samples_are_too_few_in_any_case():
    assert "there are 3" in {f.told for f in quick(convolutions(), images(3)).findings}


@pytest.mark.parametrize("recipe", ["nf4-weights", "mxfp4-weights", "w4a8-blocks"])
def test_recipes_of_other_formats_are_diagnosed_and_their_remedies_are_recipes(recipe):
    model = two_products(_rng(0).normal(size=(64, 128)), _rng(1).normal(size=(128, 32)))
    found = quick(model, _rng(2).normal(size=(32, 64)).astype(np.float32), recipe)
    assert "few bits" in {f.cause for f in found.findings}
    for r in (r for f in found.findings for r in f.remedies if r.recipe):
        assert len(lb.Recipe.from_toml(found.recipe + "\n" + r.recipe).rules) > 1
    assert "<h2>" in found.to_html()


def test_test_data_in_other_units_are_told_first():
    model, x = convolutions(), images(64)
    found = quick(model, x, test=x * 64 + 128)
    assert found.findings[0].cause == "preprocessing"
    assert "127 ± 63.7" in found.findings[0].told
    assert "preprocessing" not in {f.cause for f in quick(model, x, test=images(64, 5)).findings}


def test_channels_that_are_always_zero_are_counted():
    first = _rng(0).normal(size=(16, 32))
    first[:, :3] = 0
    model = two_products(first, _rng(1).normal(size=(32, 8)))
    found = quick(model, _rng(2).normal(size=(64, 16)).astype(np.float32))
    weight = next(t for t in found.tensors if t.name == "first.weight")
    assert (weight.dead_channels, weight.channels) == (3, 32)
    assert "dead channels" in {f.cause for f in found.findings}


def test_an_activation_that_never_moves_is_told():
    model = two_products(
        np.zeros((16, 32)), _rng(1).normal(size=(32, 8)), "b = Add (p, one) h = Relu (b)", one=np.ones(32)
    )
    found = quick(model, _rng(2).normal(size=(64, 16)).astype(np.float32))
    assert {"constant tensor"} <= {f.cause for f in found.findings}


def test_costs_alone_add_up_to_the_measured_error_of_a_small_network():
    found = quick(convolutions(), images(80))
    assert found.estimated_db == pytest.approx(found.measured_db, abs=3)  # 3 dB is a factor of 2


def test_multiply_adds_and_energy_by_hand():
    """3·3·3 products for 8 channels at 8 × 8 pixels; 8·3·3 for 16 at 4 × 4; 16 for 4 outputs."""
    found = quick(convolutions(), images(32))
    by_layer = {row.name: row.multiply_adds for row in found.layers if row.multiply_adds}
    assert by_layer == {"conv1": 27 * 8 * 64, "conv2": 72 * 16 * 16, "fc": 64}
    exact, quantized = found.operations
    assert exact.bit_operations == 32 * 32 * exact.multiply_adds
    assert quantized.bit_operations == 64 * exact.multiply_adds
    assert exact.compute_pj == pytest.approx(4.6 * exact.multiply_adds)
    assert quantized.compute_pj == pytest.approx(0.3 * exact.multiply_adds)  # Horowitz 2014: 0.2 + 0.1
    assert operations({"a": 10}, {"a": (4, 8)}, 8).compute_pj == pytest.approx(10 * (0.1 + 0.1))
    assert operations({"a": 10}, {}, 8).weights_pj == pytest.approx(1300)  # 64 bits


def test_multiply_adds_of_two_activations_and_of_a_transposed_convolution():
    model = network(
        "net (float[N,4,3,3] x) => (float[N,2,6,6] y) { t = ConvTranspose <strides = [2,2]> (x, w) y = MatMul (t, t) }",
        w=np.ones((4, 2, 2, 2)),
    )
    shapes = {"x": (5, 4, 3, 3), "t": (5, 2, 6, 6), "y": (5, 2, 6, 6)}
    assert list(multiply_adds(model.program, shapes, 5).values()) == [3 * 3 * 4 * 2 * 4, 2 * 6 * 6 * 6]


FACTS = {"x": InputFacts(0.0, 1.0, -2.0, 2.0, (2, 3))}


def test_shifts_do_what_they_say():
    from lowbit.data.samples import SampleBatch

    x = images(4)
    ports = convolutions().inputs

    def of(words: str) -> np.ndarray:
        return Shift.parse(words).of(SampleBatch({"x": x}, None, 4), ports, FACTS).inputs["x"]

    clean = x.clip(-2, 2)
    assert np.array_equal(of("brightness:0.5"), (x + 0.5).clip(-2, 2))
    assert np.std(of("noise:0.5") - clean) == pytest.approx(0.5, rel=0.15)
    assert np.abs(of("blur:1")).mean() < 0.6 * np.abs(clean).mean()
    flat = np.full((1, 3, 8, 8), 1.5, np.float32)
    blurred = Shift.parse("blur:1").of(SampleBatch({"x": flat}, None, 1), ports, FACTS).inputs["x"]
    assert np.allclose(blurred, 1.5)
    assert of("contrast:0.5").std() == pytest.approx(0.5 * x.std(), rel=0.05)


def test_length_shortens_and_repeats_free_axes_alone():
    from lowbit.data.samples import SampleBatch

    model = network("net (float[N,T,4] x) => (float[N,T,4] y) { y = Relu (x) }")
    samples = SampleBatch({"x": _rng(0).normal(size=(2, 6, 4)).astype(np.float32)}, np.zeros((2, 6), int), 2)
    half, double = (Shift.parse(w).of(samples, model.inputs, {}) for w in ("length:0.5", "length:2"))
    assert half.inputs["x"].shape == (2, 3, 4)
    assert double.inputs["x"].shape == (2, 12, 4)
    assert np.array_equal(double.inputs["x"][:, 6:], samples.inputs["x"])
    assert half.labels is None  # one a token


@pytest.mark.parametrize("words", ["fog:1", "noise", "noise:much", "blur:-1", "length:0"])
def test_a_shift_that_is_none_is_refused(words):
    with pytest.raises(InputError, match="shift"):
        Shift.parse(words)


def test_shifts_run_both_networks_on_the_same_samples():
    found = quick(convolutions(), images(32), shifts=["noise:0.5", "contrast:0.5"])
    assert [s.shift for s in found.shifts] == ["none", "noise:0.5", "contrast:0.5"]
    assert all(s.told is not None and s.told.samples == 32 and s.told.agreement is not None for s in found.shifts)


def test_a_shift_that_a_network_cannot_take_is_told():
    model = network("net (float[N,T] x) => (float[N,4] y) { y = MatMul (x, w) }", w=_rng(0).normal(size=(8, 4)))
    found = quick(model, _rng(1).normal(size=(16, 8)).astype(np.float32), shifts=["length:2"])
    assert found.shifts[1].told is None
    assert found.shifts[1].problem


def test_json_holds_what_the_page_shows():
    found = quick(convolutions(), images(32), tries=[{"what": "int8", "metric": 0.9, "bytes": 1234, "seconds": 1.5}])
    told = json.loads(found.to_json())
    assert told["verdict"] == found.verdict
    assert {t["name"] for t in told["tensors"]} >= {"conv1.weight", "x"}
    assert told["tries"][0]["bytes"] == 1234
    assert lb.Recipe.from_toml(told["recipe"]).target == "onnxruntime"


def test_no_data_is_refused_in_words():
    with pytest.raises(DataError, match="give some hundred typical inputs"):
        diagnose(convolutions(), None)


def test_data_that_can_be_read_once_only_are_refused_before_the_work():
    with pytest.raises(DataError, match="read only once"):
        quick(convolutions(), ({"x": images(4)} for _ in range(4)))


def test_a_network_of_a_fixed_batch_is_diagnosed():
    text = "net (float[3,8] x) => (float[3,4] y) { y = MatMul (x, w) }"
    found = quick(network(text, w=_rng(0).normal(size=(8, 4))), _rng(1).normal(size=(12, 8)).astype(np.float32))
    assert found.comparison.samples == 12


def test_data_with_nan_is_refused_in_words():
    x = images(8)
    x[3, 0, 0, 0] = np.nan
    with pytest.raises(DataError, match="sample 3"):
        quick(convolutions(), x)


def test_a_quantized_network_is_refused_in_words():
    with pytest.raises(InputError, match="quantized already"):
        quick(lb.quantize(convolutions(), images(16)), images(16))


PIXELS = "size=128 scale=127.5 mean=1"


@pytest.mark.slow
def test_mobilenet_in_four_bits_has_too_few_bits_everywhere(data):
    """8 bits for one layer gain at most 0.6 dB, for all of them 11: the finding names them all."""
    model = lb.load(data / "imagenet-mobilenet_v1_0.25_128.onnx")
    photos = lb.Data.of(data / "imagenet-sample-a.zip", model.inputs, preprocess=PIXELS, limit=96)
    found = quick(model, photos, "w4a8-fast")
    first = found.findings[0]
    assert (first.cause, len(first.tensors)) == ("few bits", 28)
    assert first.remedies[-1].outputs_db > found.measured_db + 8  # 11.5 with 200 samples


@pytest.mark.slow
def test_mobilenet_under_one_scale_a_tensor_has_its_channels_to_blame(data):
    """Nagel et al. 2019, figure 2: the published collapse from 70.9 to 0.1 % is that of channels."""
    model = lb.load(data / "imagenet-mobilenet_v1_0.25_128.onnx")
    photos, test = (
        lb.Data.of(data / "imagenet-sample-a.zip", model.inputs, preprocess=p, skip=s, limit=64)
        for p, s in ((PIXELS, 0), ("size=128 scale=255", 200))
    )
    recipe = lb.Recipe((lb.Rule("*", lb.TensorSpec("int8", "minmax"), lb.TensorSpec("uint8", "minmax")),), PREPARE)
    found = quick(model, photos, recipe, test=test)
    assert found.findings[0].cause == "preprocessing"  # 0 … 1, where the network wants −1 … 1
    spread = found.findings[1]
    assert (spread.cause, spread.tensors[0]) == ("channel spread", "features.1.conv.weight")
    assert spread.told.startswith("its largest channel is 43.9 times the median one")
    assert spread.share > 0.9
    assert spread.remedies[0].outputs_db > found.measured_db + 10
