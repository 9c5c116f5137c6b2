"""Activations whose range each input has for itself: what is written, what onnxruntime makes of it, and the proof."""

import json

import numpy as np
import onnx_ir as ir
import pytest
import torch
from toy_networks import convolutions, images, network, sqnr_db

import lowbit as lb
from lowbit.deploy.export import export
from lowbit.deploy.proof import verify
from lowbit.engines.compile import ENGINES
from lowbit.engines.read_back import read_back
from lowbit.errors import MismatchError, UnsupportedError
from lowbit.network.in_step import Walk, in_step
from lowbit.recipe import DYNAMIC
from lowbit.report.ledger import Ledger

RNG = np.random.default_rng(0)
X = RNG.normal(size=(2, 5, 64)).astype(np.float32)


def products() -> lb.Model:
    """x (B, T, 64) → MatMul, bias, Relu → two MatMuls → their product with themselves, two activations → MatMul."""
    rng = np.random.default_rng(1)
    return network(
        """
        toy (float[B,T,64] x) => (float[B,T,T] scores, float[B,T,32] y) {
            a = MatMul (x, a__weight)
            b = Add (a, a__bias)
            c = Relu (b)
            d = MatMul (c, d__weight)
            e = MatMul (c, e__weight)
            f = Transpose <perm = [0,2,1]> (e)
            scores = MatMul (d, f)
            y = MatMul (d, y__weight)
        }""",
        a__weight=rng.normal(size=(64, 48)),
        a__bias=rng.normal(size=48),
        d__weight=rng.normal(size=(48, 40)),
        e__weight=rng.normal(size=(48, 40)),
        y__weight=rng.normal(size=(40, 32)),
    )


def rows(model: lb.Model) -> dict[str, dict]:
    return {row["tensor"]: dict(row) for row in Ledger.of(model).rows}


@pytest.fixture(scope="module")
def quantized() -> lb.Model:
    return lb.quantize(products(), None, "int8-dynamic")


def test_products_with_weights_become_fused_integer_kernels_without_any_data(quantized):
    kernels = dict(read_back(quantized.program, "onnxruntime").operators)
    # the range of c is measured once for both of its readers
    assert kernels == {
        "matmul_0": "DynamicQuantizeMatMul",
        "matmul_3": "MatMulIntegerToFloat",
        "matmul_4": "MatMulIntegerToFloat",
        "matmul_7": "DynamicQuantizeMatMul",
    }
    measured = [node for node in quantized.program.graph if node.op_type == "DynamicQuantizeLinear"]
    assert len(measured) == 3


def test_the_ledger_says_dynamic_and_names_the_product_of_two_activations(quantized):
    found = rows(quantized)
    assert {name: row["range"] for name, row in found.items() if row["role"] == "activation" and "range" in row} == {
        **dict.fromkeys(("x", "c_rows", "d_rows"), "dynamic minmax")  # these two have a scale for each row
    }
    assert found["scores"]["reason"] == "MatMul of two activations, which target 'onnxruntime' computes in float"
    assert found["d.weight"]["arithmetic"] == "integers"


def test_the_file_computes_the_formula():
    """y = (q − z) · w · (s_x · s_w) of one layer, by hand in float64."""
    w = np.random.default_rng(2).normal(size=(64, 32)).astype(np.float32)
    model = network("toy (float[N,64] x) => (float[N,32] y) { y = MatMul (x, w) }", w=w)
    x = X.reshape(-1, 64)
    low, high = min(x.min(), 0), max(x.max(), 0)
    scale = (high - low) / 255
    zero = np.rint(-low / scale)
    codes = np.clip(np.rint(x / scale) + zero, 0, 255)
    steps = np.abs(w).max(0) / 127
    expected = (codes - zero) @ np.rint(w / steps).astype(np.float64) * scale * steps
    recipe = lb.Recipe((lb.Rule("*", lb.TensorSpec("int8 channel:0", "minmax"), DYNAMIC),))
    assert np.allclose(lb.quantize(model, None, recipe).run({"x": x})["y"], expected, rtol=1e-4, atol=1e-3)


def test_each_input_has_its_own_range(quantized):
    """Inputs a thousand times smaller lose nothing; ranges of calibration would leave them no code."""
    for size in (1, 1e-3):
        x = X * np.float32(size)
        off = sqnr_db(products().run({"x": x})["y"], quantized.run({"x": x})["y"])
        assert off > 30  # measured 32.9 and 30.8 (the bias stays)


@pytest.mark.parametrize("shape", [(1, 0, 64), (0, 5, 64), (1, 1, 64), (1, 700, 64)])
def test_the_file_takes_every_length_that_the_float_network_takes(quantized, shape):
    assert quantized.run({"x": np.ones(shape, np.float32)})["y"].shape == (*shape[:2], 32)


def test_the_simulation_takes_an_input_without_elements():
    simulation = lb.simulation(products(), None, "int8-dynamic")
    with simulation.mode("quantize"):
        assert simulation.module(torch.zeros(1, 0, 64))["y"].shape == (1, 0, 32)


def test_the_simulation_computes_the_same_codes():
    simulation = lb.simulation(products(), None, "int8-dynamic")
    program = export(simulation)
    parity = verify(simulation, program, [{"x": RNG.normal(size=(4, 9, 64)).astype(np.float32)} for _ in range(8)])
    assert parity.values == 3
    assert parity.worst[1] <= 1
    assert parity.one_step < 1e-3  # measured 0


def test_the_proof_sees_a_wrong_scale_of_a_dynamic_layer():
    simulation = lb.simulation(products(), None, "int8-dynamic")
    program = export(simulation)
    scale = program.graph.initializers["d.weight_scale"]
    scale.const_value = ir.tensor(scale.const_value.numpy() * np.float32(1.05))
    with pytest.raises(MismatchError):
        verify(simulation, program, [{"x": X}])


@pytest.mark.parametrize("turned", [False, True])
def test_a_gemm_keeps_its_bias(turned):
    rng = np.random.default_rng(3)
    w, b = rng.normal(size=(64, 24)).astype(np.float32), rng.normal(size=24).astype(np.float32)
    text = f"toy (float[N,64] x) => (float[N,24] y) {{ y = Gemm <transB = {int(turned)}> (x, w, b) }}"
    model = network(text, w=w.T.copy() if turned else w, b=b)
    quantized = lb.quantize(model, None, "int8-dynamic")
    x = X.reshape(-1, 64)
    assert sqnr_db(model.run({"x": x})["y"], quantized.run({"x": x})["y"]) > 38  # measured 40
    assert dict(read_back(quantized.program, "onnxruntime").operators) == {"gemm_0": "DynamicQuantizeMatMul"}


def test_convolutions_stay_in_float_with_weights_in_int8_and_are_named():
    quantized = lb.quantize(convolutions(), None, "int8-dynamic")
    found = rows(quantized)
    assert found["conv2.weight"]["format"] == "int8 channel:0"
    assert found["conv2.weight"]["arithmetic"] == "float"
    assert (
        found["d"]["reason"] == "target 'onnxruntime' has no fast kernel of Conv that measures the range of each input"
    )


def test_the_generic_target_convolves_in_integers():
    quantized = lb.quantize(convolutions(), None, "int8-dynamic", target="generic")
    kernels = read_back(quantized.program, "onnxruntime").operators
    assert {name: kernels[name] for name in ("conv_0", "conv_3")} == dict.fromkeys(("conv_0", "conv_3"), "ConvInteger")
    x = images(8, 3)
    assert sqnr_db(convolutions().run({"x": x})["logits"], quantized.run({"x": x})["logits"]) > 38  # measured 41


def test_rules_choose_static_or_dynamic_layer_by_layer():
    """Only the layer that reads a value can measure it: its maker's rule does not count."""
    rules = (lb.Rule("*", "int8 channel:0", DYNAMIC), lb.Rule("matmul_7", activations=lb.TensorSpec("uint8", "minmax")))
    quantized = lb.quantize(products(), [{"x": X}], lb.Recipe(rules))
    found = rows(quantized)
    assert [found[name]["range"] for name in ("x", "c", "d")] == ["dynamic minmax", "dynamic minmax", "minmax"]
    assert len(read_back(quantized.program, "onnxruntime").operators) == 4


@pytest.mark.parametrize("target", ["openvino", "tensorrt", "integer"])
def test_targets_without_such_kernels_refuse_before_any_work(target):
    with pytest.raises(UnsupportedError, match=rf"'{target}' has no kernels .* onnxruntime, onnxruntime-avx2, generic"):
        lb.quantize(products(), None, "int8-dynamic", target=target)


def test_weights_that_no_kernel_multiplies_are_refused_with_what_to_do():
    recipe = lb.Recipe((lb.Rule("*", "int4 group:16", DYNAMIC),))
    with pytest.raises(UnsupportedError, match=r"'a.weight': weights in int4 .* Use 'int8 channel:0', or leave"):
        lb.quantize(products(), None, recipe)


def test_other_formats_and_ranges_at_each_input_are_simulated_only():
    spec = lb.TensorSpec("uint8", "percentile:99.9", dynamic=True)
    recipe = lb.Recipe((lb.Rule("*", "int8 channel:0", spec),))
    with pytest.raises(UnsupportedError, match=r"uint8 from the least to the greatest value, not"):
        lb.quantize(products(), None, recipe)
    simulation = lb.simulation(products(), None, recipe)
    with simulation.mode("quantize"), torch.no_grad():
        y = simulation.module(torch.from_numpy(X))["y"].numpy()
    assert sqnr_db(products().run({"x": X})["y"], y) > 20


def test_the_recipe_asks_for_no_data_and_data_may_still_prove_it(quantized):
    assert lb.RECIPES["int8-dynamic"]().looks_at_data() is None
    proved = lb.quantize(products(), [{"x": X}], "int8-dynamic")
    assert json.loads(proved.metadata["lowbit.parity"])["worst"][1] <= 1
    # factors of channels and rows follow from the data, or from made-up inputs
    assert sqnr_db(quantized.run({"x": X})["y"], proved.run({"x": X})["y"]) > 30


def recurrence(direction: str, directions: int, attributes: str = "") -> lb.Model:
    """An LSTM with sequence lengths and a first state, all batch first; outputs are all states and the last."""
    rng = np.random.default_rng(4)
    return network(
        f"""
        toy (float[B,T,24] x, int32[B] lengths, float[B,{directions},16] first)
        => (float[B,{directions},T,16] y, float[B,{directions},16] last) {{
            steps = Transpose <perm = [1,0,2]> (x)
            h = Transpose <perm = [1,0,2]> (first)
            ys, hs = LSTM <hidden_size = 16, direction = "{direction}"{attributes}> (steps, w, r, b, lengths, h, h)
            y = Transpose <perm = [2,1,0,3]> (ys)
            last = Transpose <perm = [1,0,2]> (hs)
        }}""",
        w=rng.normal(size=(directions, 64, 24)) / 2,
        r=rng.normal(size=(directions, 64, 16)) / 2,
        b=rng.normal(size=(directions, 128)) / 10,
    )


def sequences(lengths: list[int], directions: int) -> dict[str, np.ndarray]:
    rng, count = np.random.default_rng(5), len(lengths)
    return {
        "x": rng.normal(size=(count, 20, 24)).astype(np.float32),
        "lengths": np.array(lengths, np.int32),
        "first": rng.normal(size=(count, directions, 16)).astype(np.float32) / 2,
    }


@pytest.mark.parametrize(("direction", "directions"), [("forward", 1), ("reverse", 1), ("bidirectional", 2)])
def test_an_lstm_runs_in_integers_as_the_simulation_says(direction, directions):
    model = recurrence(direction, directions)
    quantized = lb.quantize(model, None, "int8-dynamic")
    assert dict(read_back(quantized.program, "onnxruntime").operators) == {"lstm_2": "DynamicQuantizeLSTM"}
    assert {rows(quantized)[name]["arithmetic"] for name in ("w", "r")} == {"integers"}
    simulation = lb.simulation(model, None, "int8-dynamic")
    batch = sequences([20, 3, 11, 1, 0], directions)
    with simulation.mode("quantize"), torch.no_grad():
        own = simulation.module(*map(torch.from_numpy, batch.values()))
    found = ENGINES["onnxruntime"].compile(quantized.program, threads=1)(batch)
    for name in ("y", "last"):
        assert np.abs(found[name] - own[name].numpy()).max() < 0.01  # a state on a tie; most runs 2e-7
        assert sqnr_db(model.run(batch)[name], found[name]) > 30  # measured 33 to 37


@pytest.mark.parametrize("length", [0, 1, 300])
def test_an_lstm_takes_any_length_in_time(length):
    w, r = RNG.normal(size=(1, 64, 24)) / 2, RNG.normal(size=(1, 64, 16)) / 2
    model = network(
        "toy (float[T,B,24] x) => (float[T,1,B,16] y) { y = LSTM <hidden_size = 16> (x, w, r) }",
        w=w.astype(np.float32),
        r=r.astype(np.float32),
    )
    quantized = lb.quantize(model, None, "int8-dynamic")
    assert quantized.run({"x": np.ones((length, 1, 24), np.float32)})["y"].shape == (length, 1, 1, 16)
    simulation = lb.simulation(model, None, "int8-dynamic")
    with simulation.mode("quantize"), torch.no_grad():
        assert simulation.module(torch.ones(length, 1, 24))["y"].shape == (length, 1, 1, 16)


def test_an_lstm_of_another_form_stays_in_float_with_its_weights_in_int8():
    quantized = lb.quantize(recurrence("forward", 1, ", clip = 3.0"), None, "int8-dynamic")
    found = rows(quantized)
    assert found["w"]["format"] == "int8 channel:1"
    assert found["w"]["arithmetic"] == "float"
    assert "peepholes or layout 1 has no integer kernel" in found["ys"]["reason"]


def test_the_proof_sees_a_wrong_weight_of_an_lstm():
    simulation = lb.simulation(recurrence("forward", 1), None, "int8-dynamic")
    program = export(simulation)
    codes = program.graph.initializers["r_codes"]
    codes.const_value = ir.tensor(codes.const_value.numpy()[:, ::-1].copy())
    with pytest.raises(MismatchError, match=r"layer 'lstm_2': onnxruntime and the simulation differ by .* of 'ys'"):
        verify(simulation, program, [sequences([20], 1)])


def test_the_proof_finds_a_state_that_is_an_output_and_is_read_by_a_dynamic_layer():
    weights = {
        "w": RNG.normal(size=(1, 64, 24)) / 2,
        "r": RNG.normal(size=(1, 64, 16)) / 2,
        "v": RNG.normal(size=(16, 6)),
    }
    text = """toy (float[T,B,24] x) => (float[1,B,16] h, float[1,B,6] z) {
        y, h = LSTM <hidden_size = 16> (x, w, r)  z = MatMul (h, v) }"""
    x = [RNG.normal(size=(5, 3, 24)).astype(np.float32) for _ in range(2)]
    quantized = lb.quantize(network(text, **weights), [{"x": one} for one in x], "int8-dynamic")
    assert json.loads(quantized.metadata["lowbit.parity"])["codes"] > 0
    assert quantized.run({"x": x[0]})["h"].shape == (1, 3, 16)


def test_an_exact_walk_takes_the_float_lstm():
    simulation = lb.simulation(recurrence("forward", 1), None, "int8-dynamic")
    batch = sequences([20], 1)
    with simulation.mode("quantize"), torch.no_grad():
        exact = Walk(simulation.module, [torch.from_numpy(v) for v in batch.values()], exact=True)
        *_, node = in_step(exact)
    expected = recurrence("forward", 1).run(batch)["y"]
    assert np.allclose(exact.env[node]["y"].numpy(), expected, atol=1e-5)
