"""The reference against the formulas, against onnxruntime on the same file, and what it refuses."""

from dataclasses import replace

import numpy as np
import pytest
from compiled import codes_of, program_of, quantized
from small_networks import mobile, residual
from toy_networks import convolutions, images, network

import lowbit as lb
from lowbit.engines.compile import ENGINES
from lowbit.errors import ShapeError, UnsupportedError
from lowbit.integer import kernels
from lowbit.integer.bounds import layer_bounds
from lowbit.integer.engine import IntegerReference, decode, encode
from lowbit.integer.float32 import in_float32
from lowbit.integer.program import Conv, Rescale, Table
from lowbit.integer.reference import run
from lowbit.presets import RECIPES

NETWORKS = {"convolutions": lambda: (convolutions(), {"x": images()}), "mobile": mobile, "residual": residual}


@pytest.mark.parametrize("name", NETWORKS)
def test_every_value_is_within_a_step_of_onnxruntime(name: str):
    model, batch = NETWORKS[name]()
    file = quantized(model, batch)
    tensors = [t for t in program_of(file).tensors() if t.name not in batch]
    names = [t.name for t in tensors]
    ours = IntegerReference().compile(file.program, outputs=names)(batch)
    theirs = ENGINES["onnxruntime"].compile(file.program, outputs=names)(batch)
    steps = np.concatenate([np.abs(ours[t.name] - theirs[t.name]).reshape(-1) / t.scale for t in tensors])
    assert steps.max() < 1.5
    assert (steps > 0.5).mean() < 0.01


@pytest.mark.parametrize("name", NETWORKS)
def test_every_layer_with_weights_has_onnxruntimes_codes(name: str):
    """From the same codes; 1 of a million differs if products are rounded once, half up."""
    model, batch = NETWORKS[name]()
    file = quantized(model, batch)
    program = program_of(file)
    names = [t.name for t in program.tensors() if t.name not in batch]
    values = ENGINES["onnxruntime"].compile(file.program, outputs=names)(batch) | batch
    codes = {t.name: encode(values[t.name], t) for t in program.tensors()}
    for layer in program.layers:
        if in_float32(layer):
            alone = replace(program, inputs=layer.inputs, outputs=(layer.output,), layers=(layer,))
            np.testing.assert_array_equal(run(alone, codes)[layer.output.name], codes[layer.output.name], layer.name)


@pytest.mark.parametrize("factor", [0.5, 0.25, 0.01, 3.1e-5, 0.75])
def test_as_float32_multiplies_and_rounds(factor: float):
    single = np.float32(factor)
    rescale = Rescale.of(float(single))
    r = np.random.default_rng(0)
    reach = int(200 / factor)
    accumulators = np.concatenate([r.integers(-reach, reach, 2000), np.arange(-9, 10)])
    near = np.rint((np.arange(-100, 100) + 0.5) / factor).astype(np.int64)  # where ties are
    for accumulator in np.concatenate([accumulators, near - 1, near, near + 1]).tolist():
        m, shift = int(rescale.multiplier[0]), int(rescale.shift[0])
        expected = int(np.rint(np.float32(accumulator) * single))
        assert kernels.as_float32(accumulator, m, shift, rescale.left) == expected, accumulator


def test_a_product_is_rounded_once_half_up():
    rescale = Rescale.of(0.25)  # 2^30 · 2^-32
    found = [kernels.once(a, int(rescale.multiplier[0]), int(rescale.shift[0]), rescale.left) for a in (-6, -2, 2, 6)]
    assert found == [-1, 0, 1, 2]  # −1.5, −0.5, 0.5, 1.5


def test_rounding_twice_takes_ties_away_from_zero():
    rescale = Rescale.of(0.25)
    found = [kernels.twice(a, int(rescale.multiplier[0]), int(rescale.shift[0]), rescale.left) for a in (-6, -2, 2, 6)]
    assert found == [-2, -1, 1, 2]


@pytest.mark.parametrize("factor", [0.9, 0.5, 1.0, 3.7, 1e-3, 2.0**-30, 1e-12])
def test_a_rescaling_is_exact_to_31_bits(factor: float):
    rescale = Rescale.of(factor)
    m, shift, left = int(rescale.multiplier[0]), int(rescale.shift[0]), rescale.left
    assert shift >= 1
    for accumulator in (-123457, -1, 1, 98765):
        assert abs(kernels.once(accumulator, m, shift, left) - accumulator * factor) <= 0.5 + 1e-4


def test_one_number_by_hand():
    """The worked number of docs/integers.md."""
    rescale = Rescale.of(0.02 * 0.05 / 0.1)
    weight = np.array([3, -2], np.int8)
    x, zero_x, zero_y, bias = np.array([10, -4]), -5, 7, 1000
    accumulator = int(bias - zero_x * weight.sum() + (weight * x).sum())
    assert accumulator == 1043
    code = zero_y + kernels.once(accumulator, int(rescale.multiplier[0]), int(rescale.shift[0]), rescale.left)
    assert code == 17  # 7 + 10.43


@pytest.mark.parametrize("op", ["Sigmoid", "Tanh", "HardSwish", "Elu", "Gelu"])
def test_a_function_of_one_value_is_a_table_of_the_nearest_codes(op: str):
    model = network(f"f (float[N,16] x) => (float[N,16] y) {{ y = {op} (x) }}")
    x = np.linspace(-6, 6, 64 * 16, dtype=np.float32).reshape(64, 16)
    file = quantized(model, {"x": x})
    program = program_of(file)
    assert [type(layer) for layer in program.layers] == [Table]
    (y,) = IntegerReference().compile(file.program)({"x": x}).values()
    (port,), (output,) = program.inputs, program.outputs
    exact = model.run({"x": decode(encode(x, port), port)})["y"]
    lowest, highest = ((end - output.zero) * output.scale for end in output.ends)
    assert np.abs(y - np.clip(exact, lowest, highest)).max() <= output.scale * 0.5001


def test_operators_without_integer_form_are_named_all_at_once_before_any_work():
    model = network("f (float[N,4] x) => (float[N,4] y) { a = Sin (x)  b = Add (a, x)  y = Softplus (b) }")
    with pytest.raises(UnsupportedError, match=r"'sin_0' \(Sin\), 'softplus_2' \(Softplus\)"):
        lb.quantize(model, np.zeros((4, 4), np.float32), target="integer")


@pytest.mark.parametrize("layers", ["conv_0", "*"])
def test_a_rule_that_leaves_a_layer_in_float_ends_in_words(layers: str):
    recipe = RECIPES["int8-fast"]("integer").keep_float(layers)
    with pytest.raises(UnsupportedError, match=r"stay in float by a rule: .*'conv_0' \(Conv: by rule\)"):
        lb.quantize(convolutions(), {"x": images()}, recipe)


def test_leaving_layers_in_float_is_passed_over_for_integers_alone(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("lowbit.repair.leave_in_float.TOLERANCE", 1e-9)
    plain = RECIPES["int8-fast"]("integer")
    file = lb.quantize(convolutions(), {"x": images()}, replace(plain, passes=(*plain.passes, "leave_in_float")))
    assert len(program_of(file).layers) == len(program_of(quantized(convolutions(), {"x": images()})).layers)


def test_a_search_that_cannot_reach_the_drop_leaves_nothing_in_float():
    model = convolutions()
    exact = model.run({"x": images()[32:]})["logits"]

    def closeness(outputs: dict[str, np.ndarray], labels: np.ndarray) -> float:
        return 1 - float(np.abs(outputs["logits"] - exact[labels]).mean())

    test = {"x": images()[32:], "labels": np.arange(32)}
    found = lb.search(model, images()[:32], test, metric=closeness, max_drop=0.0, target="integer")
    assert not found.reached
    assert not [row.what for row in found.tries if "in float" in row.what]
    assert all(row.measured is not None for row in found.tries)


def test_an_input_without_a_size_asks_for_it():
    model = network("f (float[N,T,4] x) => (float[N,T,4] y) { y = Sigmoid (x) }")
    file = quantized(model, {"x": np.random.default_rng(0).normal(size=(8, 5, 4)).astype(np.float32)})
    with pytest.raises(ShapeError, match="Fix it: --shape T=…"):
        program_of(file)


def test_the_bound_of_an_accumulator_is_reached_by_some_input_and_never_passed():
    model = network(
        "f (float[N,8] x) => (float[N,3] y) { y = Gemm <transB = 1> (x, w) }",
        w=np.random.default_rng(0).normal(size=(3, 8)),
    )
    program = program_of(quantized(model, {"x": np.random.default_rng(1).normal(size=(64, 8)).astype(np.float32)}))
    (layer,) = program.layers
    (bound,) = [bound for layer in program.layers for bound, _ in layer_bounds(layer)]
    assert isinstance(layer, Conv)
    rows = layer.weight.reshape(3, 8).astype(np.int64)
    worst = max(int(b + np.where(r > 0, 127, -128) @ r) for r, b in zip(rows, layer.bias, strict=True))
    assert worst <= bound.highest < 2**16
    assert bound.bits == 17
    assert bound.saturates == (bound.pairs > 32767)


def test_a_network_whose_accumulator_overflows_is_refused():
    model = network("f (float[N,150000] x) => (float[N,1] y) { y = Gemm <transB = 1> (x, w) }", w=np.ones((1, 150000)))
    file = quantized(model, {"x": np.random.default_rng(0).uniform(-1, 1, (4, 150000)).astype(np.float32)})
    with pytest.raises(UnsupportedError, match="its accumulator can reach"):
        program_of(file)


def test_all_codes_stay_within_their_bounds_for_any_input():
    program = program_of(quantized(*mobile()))
    codes = {"x": np.random.default_rng(0).integers(-128, 128, (20, program.inputs[0].size)).astype(np.int8)}
    held = run(program, codes)
    for layer in program.layers:
        if isinstance(layer, Conv):
            assert held[layer.output.name].min() >= layer.low
            assert held[layer.output.name].max() <= layer.high
    assert codes_of(program, mobile()[1])["x"].shape == (48, 432)
