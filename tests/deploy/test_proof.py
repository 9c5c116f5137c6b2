"""The proof: what it refuses, and networks with infinities and odd constants that it lets pass."""

import re

import numpy as np
import onnx_ir as ir
import pytest
from toy_networks import convolutions, images, network, sqnr_db

import lowbit as lb
from lowbit.deploy.export import export
from lowbit.deploy.proof import verify
from lowbit.engines import cpu
from lowbit.engines.compile import Batch
from lowbit.errors import MismatchError
from lowbit.network.calibrate import observe, solve_weights
from lowbit.network.network import Network
from lowbit.network.place import place
from lowbit.repair.ranges import choose_ranges
from lowbit.report.ledger import Ledger

RNG = np.random.default_rng(0)
SMALL = RNG.normal(size=(4, 4, 1, 1))
X = RNG.normal(size=(32, 4, 8, 8)).astype(np.float32)


def tampered(
    model: lb.Model, x: np.ndarray, recipe: str, **constants: np.ndarray
) -> tuple[Network, ir.Model, list[Batch]]:
    """A simulation, and its file in which these initialisers hold something else."""
    batches = [{"x": x}]
    simulation = Network(model.program, place(model.program, lb.RECIPES[recipe]()))
    observe(simulation, batches)
    solve_weights(simulation)
    choose_ranges(simulation, batches)
    program = export(simulation)
    for name, array in constants.items():
        stored = program.graph.initializers[name]
        stored.const_value = ir.tensor(array.astype(np.float32), name=name)
    return simulation, program, batches


@pytest.mark.parametrize("recipe", ["int8", "int8-weights"])
@pytest.mark.parametrize("also", [0.0, -np.inf])
def test_a_file_that_gives_nan_is_refused(recipe, also):
    """One factor of four is NaN in the file; also where the float network gives −∞ elsewhere."""
    scale, shift = np.ones((4, 1, 1)), np.array([also, 0, 0, 0]).reshape(4, 1, 1)
    model = network(
        "t (float[N,4,8,8] x) => (float y) { a = Conv (x, w) b = Relu (a) c = Div (b, k) y = Sub (c, s) }",
        w=RNG.normal(size=(4, 4, 3, 3)) if recipe == "int8" else RNG.normal(size=(64, 4, 3, 3)),
        k=2 * scale if recipe == "int8" else np.full((64, 1, 1), 2.0),
        s=-shift if recipe == "int8" else np.resize(-shift, (64, 1, 1)),
    )
    holed = model.program.graph.initializers["k"].const_value.numpy().copy()
    holed[-1] = np.nan
    simulation, program, batches = tampered(model, X, recipe, k=holed)
    with pytest.raises(
        MismatchError, match=r"output 'y': \d+ of \d+ values are NaN in onnxruntime, 0 in the simulation"
    ):
        verify(simulation, program, batches)


def test_infinities_of_the_float_network_are_no_difference():
    """A mask writes −∞ into half of the output; the other half is compared."""
    mask = np.where(np.arange(8) < 4, 0, -np.inf)
    model = network("t (float[N,4,8,8] x) => (float y) { a = Conv (x, w) y = Add (a, k) }", w=SMALL, k=mask)
    exact, rough = model.run({"x": X})["y"], lb.quantize(model, X).run({"x": X})["y"]
    assert np.array_equal(np.isinf(exact), np.isinf(rough))
    assert sqnr_db(exact[..., :4], rough[..., :4]) > 30


@pytest.mark.parametrize("recipe", ["int8", "bare"])
@pytest.mark.parametrize("lowest", [-np.inf, np.finfo(np.float32).min])
def test_a_max_pool_that_is_padded_with_minus_infinity_is_quantized(lowest, recipe):
    """TensorFlow's SAME: Pad below and on the right, then MaxPool; with the pass that fuses the two and without it."""
    model = network(
        """t (float[N,4,8,8] x) => (float y) {
            a = Conv (x, w) p = Pad (a, pads, lowest) m = MaxPool <kernel_shape = [3,3], strides = [2,2]> (p)
            y = Conv (m, v) }""",
        **{"w": SMALL, "v": SMALL, "pads": np.array([0, 0, 0, 0, 0, 0, 1, 1]), "lowest": np.float32(lowest)},
    )
    quantized = lb.quantize(model, X, lb.Recipe(lb.RECIPES["int8"]().rules) if recipe == "bare" else recipe)
    assert sqnr_db(model.run({"x": X})["y"], quantized.run({"x": X})["y"]) > 30


@pytest.mark.parametrize("shape", [(), (1,), (1, 1), (1, 8)])
def test_a_gemm_may_have_a_scalar_for_a_bias_and_share_it(shape):
    bias = RNG.normal(size=shape)
    model = network(
        "t (float[N,16] x) => (float[N,8] y) { a = Gemm (x, w, c) b = Relu (a) y = Gemm (b, v, c) }",
        w=RNG.normal(size=(16, 8)) / 4,
        v=RNG.normal(size=(8, 8)) / 3,
        c=bias,
    )
    x = RNG.normal(size=(32, 16)).astype(np.float32)
    quantized = lb.quantize(model, x)
    assert sqnr_db(model.run({"x": x})["y"], quantized.run({"x": x})["y"]) > 30
    counts = [row["arithmetic"] for row in Ledger.of(quantized).rows if row["role"] == "weight"]
    assert counts == ["integers", "integers"]


@pytest.mark.parametrize(
    "text", ["c = Div (b, zero) y = Clip (c, low, high)", "c = Mul (b, b) d = Div (c, zero) y = Clip (d, low, high)"]
)
def test_a_division_by_a_constant_0_is_quantized(text):
    model = network(
        f"t (float[N,4,8,8] x) => (float y) {{ a = Conv (x, w) b = Exp (a) {text} }}",
        **{"w": SMALL, "zero": np.float32(0), "low": np.float32(-1), "high": np.float32(1)},
    )
    assert np.isfinite(lb.quantize(model, X).run({"x": X})["y"]).all()


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ("flags : sse avx2 avx512_vnni", ""),
        ("flags : sse avx2", "This CPU has no VNNI"),
        ("", "If this CPU has no VNNI"),
    ],
)
def test_missing_vnni_is_blamed_only_where_it_is_missing(flags, said, tmp_path, monkeypatch):
    (tmp_path / "cpuinfo").write_text(f"processor : 0\n{flags}\n")
    monkeypatch.setattr(cpu, "CPUINFO", tmp_path / "cpuinfo")
    monkeypatch.setattr(cpu.platform, "machine", lambda: "x86_64")
    cpu.adds_in_32_bits.cache_clear()
    assert cpu.saturation_advice().startswith(said)
    assert bool(cpu.saturation_advice()) == bool(said)
    cpu.adds_in_32_bits.cache_clear()


def test_a_difference_of_steps_names_the_rule_that_helps():
    simulation, program, batches = tampered(convolutions(), images(32), "int8")
    codes = program.graph.initializers["conv2.weight_codes"]
    array = codes.const_value.numpy().copy()
    array[0, 0, 1, 1] -= np.int8(40 if array[0, 0, 1, 1] > 0 else -40)
    codes.const_value = ir.tensor(array, name=codes.name)
    with pytest.raises(MismatchError, match=re.escape("a rule 'float' for 'conv_3'")):
        verify(simulation, program, batches)
