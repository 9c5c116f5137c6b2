"""The TFLite file in LiteRT and in TFLite Micro against the reference."""

import numpy as np
import pytest
from compiled import codes_of, program_of, quantized
from recurrent_toys import recurrent
from small_networks import mobile, residual
from test_widths import quantized as with_bits
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


SMALL = {  # body, shape of x, shape of y, shape of the weight, steps that a code may be apart
    "grouped": ("y = Conv <group = 2, pads = [1,1,1,1]> (x, w)", "8,9,9", "12,9,9", (12, 4, 3, 3), 1),
    "average": ("y = AveragePool <kernel_shape = [3,3], strides = [2,2]> (x)", "8,9,9", "8,4,4", (), 1),
    "average of padding": (
        "y = AveragePool <kernel_shape = [3,3], pads = [1,1,1,1], count_include_pad = 1> (x)",
        *("8,9,9", "8,9,9", (), 1),
    ),
    "average beside padding": (  # TFLite rounds it in the scale of its input, then again
        "y = AveragePool <kernel_shape = [3,3], pads = [1,1,1,1]> (x)",
        *("8,9,9", "8,9,9", (), 2),
    ),
    "concat": ("a = Conv (x, w)  b = Conv (x, w)  y = Concat <axis = 1> (a, b)", "8,9,9", "8,9,9", (4, 8, 1, 1), 1),
    "transposed": (
        "y = ConvTranspose <strides = [2,2], pads = [1,1,1,1], output_padding = [1,1]> (x, w)",
        *("4,5,6", "6,10,12", (4, 6, 3, 3), 1),
    ),
    "nearest resize": (
        'a = Conv (x, w)  y = Resize <mode = "nearest"> (a, , scales)',
        *("3,4,5", "4,8,10", (4, 3, 1, 1), 1),
    ),
}


@pytest.mark.parametrize("case", SMALL)
def test_litert_gives_the_references_codes_of_each_operator(case: str):
    body, given, made, weight, apart = SMALL[case]
    r = np.random.default_rng(0)
    constants = {"w": r.normal(size=weight)} if weight else {}
    constants |= {"scales": np.array([1, 1, 2, 2], np.float32)} if "Resize" in body else {}
    model = network(f"f (float[N,{given}] x) => (float[N,{made}] y) {{ {body} }}", **constants)
    batch = {"x": r.normal(size=(16, *map(int, given.split(",")))).astype(np.float32)}
    program = program_of(quantized(model, batch))
    codes = codes_of(program, batch)
    steps = np.abs(run_litert(write_tflite(program), codes["x"]).astype(int) - expected(program, codes))
    assert steps.max() <= apart
    assert apart == 2 or (steps > 0).mean() < 0.002


def test_16_bit_codes_in_litert_are_within_three_of_65536_steps():
    """TFLite multiplies 16-bit accumulators with 15 bits of the scale; the reference with 31."""
    model, batch = mobile()
    program = program_of(with_bits(model, batch, 8, "int16"))
    codes = codes_of(program, batch)
    steps = np.abs(run_litert(write_tflite(program), codes["x"]).astype(int) - expected(program, codes))
    assert codes["x"].dtype == np.int16
    assert steps.max() <= 3


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


def test_what_tflite_has_no_operator_for_is_named_all_at_once():
    text = "f (float[N,3,4,5,6] x) => (float[N,2,4,5,6] y) { a = Elu (x)  y = Conv (a, w) }"
    r = np.random.default_rng(0)
    model = network(text, w=r.normal(size=(2, 3, 1, 1, 1)))
    program = program_of(quantized(model, {"x": r.normal(size=(9, 3, 4, 5, 6)).astype(np.float32)}))
    with pytest.raises(UnsupportedError, match=r"'a': a table of codes; 'y': positions over depth"):
        write_tflite(program)


def test_recurrent_layers_are_named_too():
    with pytest.raises(UnsupportedError, match=r"no operator in TFLite: 'v.states': a layer Recurrent; .* Export"):
        write_tflite(program_of(quantized(*recurrent("GRU backwards"))))
