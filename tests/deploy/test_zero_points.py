"""Files for OpenVINO: only the sums of residuals are rounded, and zero points are in biases.

Codes are held against the simulation in OpenVINO itself, and what it executes is read off its runtime model.
"""

from functools import cache

import numpy as np
import onnx_ir as ir
import pytest
from toy_networks import network

import lowbit as lb
from lowbit.deploy.export import export
from lowbit.deploy.proof import verify
from lowbit.flows.fidelity import layer_fidelity
from lowbit.graph.weights import constant
from lowbit.network.calibrate import observe, solve_weights
from lowbit.network.network import Network
from lowbit.network.place import place
from lowbit.repair.ranges import choose_ranges

SHAPES = [(6, 3, 3, 3), (12, 6, 1, 1), (12, 1, 3, 3), (6, 12, 1, 1), (12, 6, 1, 1), (6, 12, 1, 1), (6, 6, 1, 1)]
SQUARE = np.random.default_rng(2).normal(size=(4, 4, 1, 1))
SAMPLES = [{"x": np.random.default_rng(1).normal(size=(8, 3, 12, 12)).astype(np.float32)}]


def inverted() -> lb.Model:
    """Two inverted residuals. a, c, s and t have both signs; c is read by a convolution that pads."""
    rng = np.random.default_rng(0)
    weights = {f"w{n}": rng.normal(size=shape) / np.sqrt(np.prod(shape[1:])) for n, shape in enumerate(SHAPES)}
    biases = {f"b{n}": rng.normal(size=shape[0]) / 4 for n, shape in enumerate(SHAPES)}
    text = """m (float[N,3,12,12] x) => (float[N,6,1,1] y) {
        a = Conv <pads = [1,1,1,1]> (x, w0, b0)
        c = Conv (a, w1, b1) d = Conv <group = 12, pads = [1,1,1,1]> (c, w2, b2) e = Relu (d)
        q = Conv (e, w3, b3) s = Add (q, a)
        f = Conv (s, w4, b4) g = Relu (f) r = Conv (g, w5, b5) t = Add (s, r)
        h = Conv (t, w6, b6) i = Relu (h) y = GlobalAveragePool (i) }"""
    return network(text, **weights, **biases)


@cache
def simulated(target: str = "openvino") -> Network:
    model, recipe = inverted(), lb.Recipe(lb.RECIPES["int8"](target).rules, (), target)
    simulation = Network(model.program, place(model.program, recipe))
    observe(simulation, SAMPLES)
    solve_weights(simulation)
    choose_ranges(simulation, SAMPLES)
    return simulation


@cache
def quantized() -> lb.Model:
    return lb.quantize(inverted(), SAMPLES, target="openvino")


def zeros(program: ir.Model) -> dict[str, float]:
    """Zero points of a file, by the value that is quantized."""
    encoders = [node for node in program.graph if node.op_type == "QuantizeLinear"]
    return {str(n.outputs[0].name).removesuffix("_quantized"): float(constant(n.inputs[2]) or 0) for n in encoders}


def test_only_the_sum_of_a_convolution_and_a_residual_is_rounded_for_openvino():
    assert not {"q", "r"} & set(simulated().activations())
    assert {"q", "r", "s", "t"} <= set(simulated("onnxruntime").activations())


@pytest.mark.parametrize(
    ("nodes", "rounded"),
    [
        ("p = Conv (x, v) q = Conv (x, w) s = Add (q, p)", {"p", "s"}),  # the later layer adds what the earlier made
        ("p = Conv (x, v) r = Relu (p) q = Conv (r, w) s = Add (p, q)", {"p", "r", "s"}),
        ("q = Conv (x, w) p = GlobalAveragePool (q) s = Add (q, p)", {"q", "p", "s"}),  # another shape
        ("q = Conv (x, w) p = Relu (q) s = Add (p, x)", {"p", "s"}),  # a clip in between
    ],
)
def test_a_sum_has_one_term_that_is_not_rounded_at_most(nodes, rounded):
    model = network(f"m (float[1,4,5,5] x) => (float[1,4,5,5] y) {{ {nodes} y = Conv (s, w) }}", w=SQUARE, v=SQUARE)
    placement = place(model.program, lb.RECIPES["int8"]("openvino"))
    assert {site.value for site in placement.sites.values() if site.role == "activation"} == rounded | {"x", "y"}


def test_zero_points_go_into_biases_but_where_a_convolution_pads():
    simulation = simulated()
    both_signs = {name for name, quantizer in simulation.activations().items() if float(quantizer.zero)}
    assert both_signs == {"x", "a", "c", "s", "t"}
    assert {name for name, zero in zeros(export(simulation)).items() if zero} == {"x", "c"}
    assert {name for name, zero in zeros(export(simulated("onnxruntime"))).items() if zero} == both_signs | {"q", "r"}


@pytest.mark.parametrize("engine", ["onnxruntime", "openvino"])
def test_the_codes_are_those_of_the_simulation(engine):
    pytest.importorskip(engine)
    simulation = simulated()
    parity = verify(simulation, export(simulation), SAMPLES, engine)
    assert parity.codes > 50_000
    assert parity.worst[1] <= 1
    assert parity.one_step < 1e-3


def test_openvino_executes_convolutions_of_uint8_with_the_sums_inside():
    openvino = pytest.importorskip("openvino")
    core = openvino.Core()
    proto = ir.to_proto(quantized().program).SerializeToString()
    compiled = core.compile_model(core.read_model(proto), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    facts = [operator.get_rt_info() for operator in compiled.get_runtime_model().get_ordered_ops()]
    executed = [(f["layerType"].astype(str), f["runtimePrecision"].astype(str)) for f in facts]
    assert executed.count(("Convolution", "u8")) == len(SHAPES)
    assert not [layer for layer, _ in executed if layer in ("Eltwise", "Subtract")]
    handed_on = [f["outputPrecisions"].astype(str) for f in facts if f["layerType"].astype(str) == "Convolution"]
    assert handed_on == ["u8"] * len(SHAPES)


def test_a_raised_value_is_not_compared_as_if_it_were_the_users():
    """x + c under the name of x would have a signal-to-noise of a few dB."""
    rows = layer_fidelity(inverted().program, quantized().program, SAMPLES)
    assert {"c", "e", "g", "i", "y"} <= {row.value for row in rows}
    assert not {"a", "q", "r", "s", "t"} & {row.value for row in rows}
    assert min(row.sqnr_db for row in rows) > 30
