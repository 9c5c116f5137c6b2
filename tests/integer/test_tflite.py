"""The TFLite file in LiteRT and in TFLite Micro against the reference."""

import numpy as np
import pytest
from compiled import codes_of, program_of, quantized
from small_networks import mobile, residual
from toy_networks import convolutions, images, network

from lowbit.errors import UnsupportedError
from lowbit.integer.program import Program
from lowbit.integer.reference import run
from lowbit.integer.tflite import write_tflite

pytest.importorskip("tflite")
NETWORKS = {"convolutions": lambda: (convolutions(), {"x": images()}), "mobile": mobile, "residual": residual}


def run_litert(file: bytes, codes: np.ndarray, reference: bool = False) -> np.ndarray:
    """(samples, size): outputs of TFLite's reference kernels, or of those that LiteRT chooses (XNNPACK)."""
    litert = pytest.importorskip("ai_edge_litert.interpreter")
    kinds = litert.OpResolverType
    kind = kinds.BUILTIN_REF if reference else kinds.AUTO
    engine = litert.Interpreter(model_content=file, num_threads=1, experimental_op_resolver_type=kind)
    engine.allocate_tensors()
    given, made = engine.get_input_details()[0], engine.get_output_details()[0]
    rows = []
    for sample in codes:
        engine.set_tensor(given["index"], sample.reshape(given["shape"]))
        engine.invoke()
        rows.append(engine.get_tensor(made["index"]).reshape(-1))
    return np.array(rows)


def expected(program: Program, codes: dict[str, np.ndarray]) -> np.ndarray:
    return run(program, codes)[program.outputs[0].name]


@pytest.mark.parametrize("name", NETWORKS)
def test_litert_gives_the_references_codes_to_one_step(name: str):
    model, batch = NETWORKS[name]()
    program = program_of(quantized(model, batch))
    codes = codes_of(program, batch)
    steps = np.abs(run_litert(write_tflite(program), codes["x"]).astype(int) - expected(program, codes))
    assert steps.max() <= 1
    assert (steps > 0).mean() < 0.03


def test_rounded_twice_convolutions_are_tflites_own_bytes():
    """Padding that TFLite has no name for, a stride, a depthwise and a pointwise layer, ReLU6."""
    r = np.random.default_rng(0)
    model = network(
        """
        f (float[N,3,11,11] x) => (float[N,16,6,6] y) {
            a = Conv <pads = [1,1,1,1], strides = [2,2]> (x, w1, b1)
            b = Clip (a, zero, six)
            c = Conv <group = 8, pads = [1,1,1,1]> (b, w2, b2)
            d = Relu (c)
            y = Conv (d, w3, b3)
        }""",
        zero=np.float32(0),
        six=np.float32(6),
        w1=r.normal(size=(8, 3, 3, 3)),
        b1=r.normal(size=8),
        w2=r.normal(size=(8, 1, 3, 3)),
        b2=r.normal(size=8),
        w3=r.normal(size=(16, 8, 1, 1)),
        b3=r.normal(size=16),
    )
    program = program_of(quantized(model, {"x": r.normal(size=(16, 3, 11, 11)).astype(np.float32)}), "twice")
    codes = {"x": r.integers(-128, 128, (30, 363)).astype(np.int8)}
    assert np.array_equal(run_litert(write_tflite(program), codes["x"], reference=True), expected(program, codes))


@pytest.mark.parametrize("name", ["convolutions", "mobile"])
def test_rounded_twice_whole_networks_are_tflites_own_bytes(name: str):
    model, batch = NETWORKS[name]()
    program = program_of(quantized(model, batch), "twice")
    codes = codes_of(program, batch)
    assert np.array_equal(run_litert(write_tflite(program), codes["x"], reference=True), expected(program, codes))


def test_rounded_twice_a_sum_is_tflites_own():
    r = np.random.default_rng(0)
    weight = {"w": r.normal(size=(40, 40)), "v": r.normal(size=(40, 40))}
    text = (
        "f (float[N,40] x) => (float[N,40] y) { a = MatMul (x, w)  b = MatMul (x, v)  c = Sub (a, b)  y = Add (c, x) }"
    )
    model = network(text, **weight)
    program = program_of(quantized(model, {"x": r.normal(size=(64, 40)).astype(np.float32)}), "twice")
    codes = r.integers(-128, 128, (50, 40)).astype(np.int8)
    found = run_litert(write_tflite(program), codes, reference=True)
    assert np.array_equal(found, expected(program, {"x": codes}))


def test_tflite_micro_gives_the_references_codes_to_one_step():
    runtime = pytest.importorskip("tflite_micro").runtime
    program = program_of(quantized(convolutions(), {"x": images()}))
    codes = codes_of(program, {"x": images(8)})
    engine = runtime.Interpreter.from_bytes(write_tflite(program))
    for sample, row in zip(codes["x"], expected(program, codes), strict=True):
        engine.set_input(sample.reshape(1, 8, 8, 3), 0)
        engine.invoke()
        assert np.abs(engine.get_output(0).reshape(-1).astype(int) - row).max() <= 2


def test_what_tflite_has_no_operator_for_is_named():
    model = network("f (float[N,16] x) => (float[N,16] y) { y = Elu (x) }")
    program = program_of(quantized(model, {"x": np.random.default_rng(0).normal(size=(9, 16)).astype(np.float32)}))
    with pytest.raises(UnsupportedError, match="'y': a table of codes"):
        write_tflite(program)
