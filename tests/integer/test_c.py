"""The C that is written compiles without a warning and computes the reference's bytes."""

import re
import shutil
import subprocess
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
from compiled import STRICT, codes_of, program_of, quantized, reference_bytes, run_c
from small_networks import mobile, residual
from toy_networks import convolutions, images, network

from lowbit.engines.compile import ENGINES
from lowbit.errors import InputError
from lowbit.integer.c import write_c
from lowbit.integer.engine import IntegerReference
from lowbit.integer.float32 import with_float32_factors
from lowbit.integer.memory import constants
from lowbit.integer.plan import plan
from lowbit.integer.program import Conv, Program, Rescale, Rounding, Tensor
from lowbit.integer.reference import run
from lowbit.integer.weights import in_lanes, neighbours

NETWORKS = {"convolutions": lambda: (convolutions(), {"x": images()}), "mobile": mobile, "residual": residual}


@pytest.mark.parametrize("compiler", ["gcc", "clang"])
@pytest.mark.parametrize("name", NETWORKS)
def test_c_and_reference_give_the_same_bytes(name: str, compiler: str, tmp_path: Path):
    model, batch = NETWORKS[name]()
    program = program_of(quantized(model, batch))
    codes = codes_of(program, batch)
    sanitized = ["-fsanitize=undefined", "-fno-sanitize-recover"] if compiler == "gcc" else []
    assert run_c(program, codes, tmp_path, compiler, *sanitized) == reference_bytes(program, codes)


@pytest.mark.parametrize("name", NETWORKS)
def test_rounded_twice_c_and_reference_give_the_same_bytes(name: str, tmp_path: Path):
    model, batch = NETWORKS[name]()
    program = program_of(quantized(model, batch), "twice")
    codes = {"x": np.random.default_rng(0).integers(-128, 128, (60, program.inputs[0].size)).astype(np.int8)}
    assert run_c(program, codes, tmp_path) == reference_bytes(program, codes)


@pytest.mark.parametrize("name", ["convolutions", "mobile"])
def test_weights_of_4_bits_lie_two_a_byte_and_give_the_references_bytes(name: str, tmp_path: Path):
    model, batch = NETWORKS[name]()
    program = program_of(quantized(model, batch, "w4a8-fast"))
    codes = codes_of(program, batch)
    sanitized = ["-fsanitize=undefined,address", "-fno-sanitize-recover"]
    assert run_c(program, codes, tmp_path, "gcc", *sanitized) == reference_bytes(program, codes)
    convolutions = [layer for layer in program.layers if isinstance(layer, Conv)]
    packed = [layer for layer in convolutions if layer.packed]
    assert packed == convolutions
    for layer in packed:  # bytes: weights, of which rows may be filled up, and 9 for each output
        weights = constants(layer) - 9 * len(layer.weight)
        assert layer.weight.size / 2 <= weights <= layer.weight.size * 13 / 16


def test_products_of_two_values_are_the_same_in_c_and_in_the_reference(tmp_path: Path):
    text = "f (float[N,40] x) => (float[N,40] y) { a = MatMul (x, w)  b = Sigmoid (a)  c = Mul (a, b)  y = Sub (c, x) }"
    r = np.random.default_rng(0)
    file = quantized(network(text, w=r.normal(size=(40, 40))), {"x": r.normal(size=(64, 40)).astype(np.float32)})
    codes = {"x": r.integers(-128, 128, (60, 40)).astype(np.int8)}
    for rounding in get_args(Rounding):
        program = program_of(file, rounding)
        assert run_c(program, codes, tmp_path) == reference_bytes(program, codes)


TRANSPOSED = {
    "strides 2, one more row": (
        "<strides=[2,2], pads=[1,1,1,1], output_padding=[1,1]>",
        "N,4,5,6",
        "N,6,10,12",
        (4, 6, 3, 3),
    ),
    "groups, dilations": ("<group=2, dilations=[2,1]>", "N,4,5,6", "N,6,9,8", (4, 3, 3, 3)),
    "one axis": ("<strides=[3], pads=[1,0]>", "N,4,7", "N,5,21", (4, 5, 4)),
}


@pytest.mark.parametrize("case", TRANSPOSED)
def test_transposed_convolutions_give_the_same_bytes_and_onnxruntimes_codes_to_one_step(case: str, tmp_path: Path):
    attributes, given, made, kernel = TRANSPOSED[case]
    text = f"f (float[{given}] x) => (float[{made}] y) {{ y = ConvTranspose {attributes} (x, w, b) }}"
    r, outputs = np.random.default_rng(0), int(made.split(",")[1])
    x = r.normal(size=[16, *map(int, given.split(",")[1:])]).astype(np.float32)
    file = quantized(network(text, w=r.normal(size=kernel), b=r.normal(size=outputs)), {"x": x})
    program = program_of(file)
    codes = codes_of(program, {"x": x})
    assert run_c(program, codes, tmp_path) == reference_bytes(program, codes)
    ours, theirs = (
        engine.compile(file.program)({"x": x})["y"] for engine in (IntegerReference(), ENGINES["onnxruntime"])
    )
    steps = np.abs(ours - theirs) / program.outputs[0].scale
    assert steps.max() < 1.5
    assert (steps > 0.5).mean() < 0.01


SHORT_ROWS = """f (float[N,3,9,70] x) => (float[N,24,2,14] y) {
    a = Conv <pads=[1,1,1,1]> (x, wa)
    b = Conv <pads=[1,1,1,1], group=8> (a, wb)
    c = Conv (b, wc)
    d = Conv <pads=[0,1,1,0], strides=[2,2], group=16> (c, wd)
    e = Conv <pads=[0,2,0,2], dilations=[1,2], group=16> (d, we)
    f = Conv <strides=[2,1]> (e, wf)
    g = Conv <pads=[0,4,1,4], strides=[1,3], group=32> (f, wg)
    y = Conv <pads=[1,0,0,0]> (g, wy)
}"""
SHAPES = {
    **{"wa": (8, 3, 3, 3), "wb": (8, 1, 3, 3), "wc": (16, 8, 1, 1), "wd": (16, 1, 3, 3), "we": (16, 1, 3, 3)},
    **{"wf": (32, 16, 1, 1), "wg": (32, 1, 2, 2), "wy": (24, 32, 1, 1)},
}


@pytest.mark.parametrize(
    ("compiler", "rounding"),
    [
        *(pytest.param("gcc", rounding, marks=pytest.mark.slow) for rounding in get_args(Rounding)),
        pytest.param("clang", "onnxruntime", marks=pytest.mark.slow),
        ("without vectors", "onnxruntime"),
    ],
)
def test_short_rows_and_few_channels_are_computed_together_to_the_same_bytes(compiler, rounding, tmp_path: Path):
    r = np.random.default_rng(0)
    weights = {name: r.normal(size=shape) for name, shape in SHAPES.items()}
    x = r.normal(size=(8, 3, 9, 70)).astype(np.float32)
    program = program_of(quantized(network(SHORT_ROWS, **weights), {"x": x}), rounding)
    convolutions = [layer for layer in program.layers if isinstance(layer, Conv)]
    together = [in_lanes(layer) or (neighbours(layer) > 1 and layer.output.shape[2] > 8) for layer in convolutions]
    assert all(together[:-1])
    flags = ["-U__SSE2__"] if compiler == "without vectors" else ["-O3", "-march=native"]
    codes = codes_of(program, {"x": x})
    written = run_c(program, codes, tmp_path, "clang" if compiler == "clang" else "gcc", *flags)
    assert written == reference_bytes(program, codes)


DEPTHWISE = """f (float[N,5,9,20] x) => (float[N,70,4,8] y) {
    a = Conv <pads=[2,2,2,2], group=5> (x, wa)
    b = Conv (a, wb)
    c = Conv <pads=[0,1,1,0], strides=[2,2], group=24> (b, wc)
    d = Conv (c, wd)
    y = Conv <pads=[1,1,1,0], group=70> (d, wy)
}"""


def test_depthwise_layers_of_any_number_of_channels_and_taps_have_the_references_bytes(tmp_path: Path):
    """5 and 24 channels do not fill a block of 64, 70 are more; 25 and 12 taps are not multiples of 9."""
    shapes = {"wa": (5, 1, 5, 5), "wb": (24, 5, 1, 1), "wc": (24, 1, 3, 3), "wd": (70, 24, 1, 1), "wy": (70, 1, 3, 4)}
    r = np.random.default_rng(0)
    x = r.normal(size=(8, 5, 9, 20)).astype(np.float32)
    model = network(DEPTHWISE, **{name: r.normal(size=shape) for name, shape in shapes.items()})
    program = program_of(quantized(model, {"x": x}))
    codes = codes_of(program, {"x": x})
    sanitized = ["-fsanitize=undefined,address", "-fno-sanitize-recover"]
    assert run_c(program, codes, tmp_path, "gcc", *sanitized) == reference_bytes(program, codes)


def test_ties_go_to_the_even_code_as_in_float32(tmp_path: Path):
    """Half of all products are ties; of the second output no product has a fraction, and it reaches 2^24."""
    x = Tensor("x", (1, 1, 1, 1), (0, 2, 3, 1), 1.0, 0)
    y = Tensor("y", (1, 1, 1, 2), (0, 2, 3, 1), 2.0, -3)
    weight, bias = np.ones((2, 1, 1, 1, 1), np.int8), np.array([0, 1 << 24], np.int32)
    scales = np.array([1.0, 2.0**-20])
    fields = {"strides": (1, 1, 1), "pads": (0, 0, 0), "dilations": (1, 1, 1), "groups": 1, "low": -128, "high": 127}
    layer = Conv("y", x, y, weight, bias, Rescale.of(scales / 2), **fields, weight_scale=scales)
    program = Program((x,), (y,), ("y",), (with_float32_factors(layer),), "onnxruntime")
    codes = np.arange(-128, 128).astype(np.int8).reshape(-1, 1)
    expected = np.rint((codes + bias).astype(np.float32) * scales.astype(np.float32) / 2) - 3
    np.testing.assert_array_equal(run(program, {"x": codes})["y"], expected)
    assert run_c(program, {"x": codes}, tmp_path) == expected.astype(np.int8).tobytes()


@pytest.mark.parametrize(
    ("body", "given", "made", "kernel"),
    [
        ("Conv <pads=[1,1,1,1,1,1], strides=[2,1,2]> (x, w)", "N,3,5,6,7", "N,4,3,6,4", (4, 3, 3, 3, 3)),
        ('Resize <mode="nearest"> (c, , scales)', "N,3,4,5", "N,4,8,10", (4, 3, 1, 1)),
    ],
    ids=["over depth", "nearest resize"],
)
def test_convolutions_over_depth_and_nearest_resizing(body: str, given: str, made: str, kernel, tmp_path: Path):
    head = "c = Conv (x, w)  " if "(c," in body else ""
    text = f"f (float[{given}] x) => (float[{made}] y) {{ {head} y = {body} }}"
    r = np.random.default_rng(0)
    x = r.normal(size=[16, *map(int, given.split(",")[1:])]).astype(np.float32)
    scales = {"scales": np.array([1, 1, 2, 2], np.float32)} if head else {}
    file = quantized(network(text, w=r.normal(size=kernel), **scales), {"x": x})
    program = program_of(file)
    codes = codes_of(program, {"x": x})
    assert run_c(program, codes, tmp_path) == reference_bytes(program, codes)
    ours, theirs = (e.compile(file.program)({"x": x})["y"] for e in (IntegerReference(), ENGINES["onnxruntime"]))
    assert np.abs(ours - theirs).max() < 1.5 * program.outputs[0].scale


@pytest.mark.parametrize("rounding", ["once", "twice"])
@pytest.mark.parametrize("name", ["convolutions", "mobile"])
def test_calls_of_cmsis_nn_give_the_references_bytes(name: str, rounding: Rounding, tmp_path: Path):
    """Against its documented arithmetic (cmsis/arm_nnfunctions.h), which rounds as it is compiled."""
    model, batch = NETWORKS[name]()
    program = program_of(quantized(model, batch), rounding)
    codes = codes_of(program, batch)
    stub = [f"-I{Path(__file__).parent / 'cmsis'}", "-Wno-unused-function"]
    single = ["-DCMSIS_NN_USE_SINGLE_ROUNDING"] if rounding == "once" else []
    given = run_c(program, codes, tmp_path, "gcc", *stub, *single, library="cmsis-nn")
    assert given == reference_bytes(program, codes)
    calls = (tmp_path / "net.c").read_text().count("if (cmsis_")
    assert calls == sum(isinstance(layer, Conv) and layer.groups in (1, len(layer.weight)) for layer in program.layers)
    other = [] if rounding == "once" else ["-DCMSIS_NN_USE_SINGLE_ROUNDING"]
    compiler = ["gcc", "-c", "net.c", "-o", "net.o", *stub, *other]
    refused = subprocess.run(compiler, cwd=tmp_path, check=False, capture_output=True, text=True)
    assert f"exported with --rounding {rounding}" in refused.stderr


def test_cmsis_nn_cannot_round_as_onnxruntime():
    model, batch = NETWORKS["convolutions"]()
    with pytest.raises(InputError, match="Export with --rounding once or --rounding twice"):
        write_c(program_of(quantized(model, batch)), "net", library="cmsis-nn")


def test_a_value_may_be_called_as_a_parameter_of_the_c(tmp_path: Path):
    r = np.random.default_rng(0)
    model = network(
        "f (float[N,8] input) => (float[N,8] output) { output = MatMul (input, w) }", w=r.normal(size=(8, 8))
    )
    program = program_of(quantized(model, {"input": r.normal(size=(16, 8)).astype(np.float32)}))
    codes = {"input": r.integers(-128, 128, (9, 8)).astype(np.int8)}
    assert run_c(program, codes, tmp_path) == reference_bytes(program, codes)


def test_an_arena_that_is_too_small_is_refused_and_nothing_is_written(tmp_path: Path):
    program = program_of(quantized(convolutions(), {"x": images()}))
    source = write_c(program, "net")
    (tmp_path / "net.c").write_text(source.code)
    (tmp_path / "net.h").write_text(source.header)
    (tmp_path / "try.c").write_text("""
        #include "net.h"
        int main(void) {
            static int32_t arena[NET_ARENA_BYTES / 4 + 1];
            static int8_t input[NET_INPUT_BYTES], output[NET_OUTPUT_BYTES];
            if (net_run(input, output, arena, NET_ARENA_BYTES - 1) != 1) return 1;
            if (net_run(input, output, (char *)arena + 1, NET_ARENA_BYTES) != 2) return 2;
            for (int i = 0; i < NET_ARENA_BYTES / 4; i++) if (arena[i]) return 3;
            return net_run(input, output, arena, NET_ARENA_BYTES);
        }""")
    subprocess.run(["gcc", *STRICT, "net.c", "try.c", "-o", "try"], check=True, cwd=tmp_path)
    assert subprocess.run([tmp_path / "try"], check=False).returncode == 0
    assert source.arena_bytes == plan(program).bytes


RUST = """use std::io::{Read, Write};
extern "C" { fn net_run(input: *const i8, output: *mut i8, arena: *mut core::ffi::c_void, bytes: usize) -> i32; }
fn main() {
    let (mut input, mut output, mut arena) = ([0u8; INPUT], [0u8; OUTPUT], [0i32; ARENA / 4]);
    while std::io::stdin().read_exact(&mut input).is_ok() {
        let (x, y) = (input.as_ptr().cast(), output.as_mut_ptr().cast());
        assert_eq!(unsafe { net_run(x, y, arena.as_mut_ptr().cast(), ARENA) }, 0);
        std::io::stdout().write_all(&output).unwrap();
    }
}
"""


@pytest.mark.slow
def test_rust_calls_what_the_header_declares(tmp_path: Path):
    if shutil.which("rustc") is None:
        pytest.skip("rustc is not installed")
    model, batch = NETWORKS["residual"]()
    program = program_of(quantized(model, batch))
    source = write_c(program, "net")
    (tmp_path / "net.c").write_text(source.code)
    (tmp_path / "net.h").write_text(source.header)
    assert "int net_run(const int8_t *input, int8_t *output, void *arena, size_t arena_bytes);" in source.header
    sizes = {word: re.search(rf"NET_{word}_BYTES (\d+)", source.header) for word in ("INPUT", "OUTPUT", "ARENA")}
    constants = "".join(f"const {word}: usize = {found[1]};\n" for word, found in sizes.items() if found)
    (tmp_path / "main.rs").write_text(constants + RUST)
    subprocess.run(["gcc", *STRICT, "-c", "net.c"], cwd=tmp_path, check=True)
    subprocess.run(["rustc", "main.rs", "-C", "link-arg=net.o"], cwd=tmp_path, check=True)
    codes = codes_of(program, batch)
    given = next(iter(codes.values())).tobytes()
    written = subprocess.run([tmp_path / "main"], input=given, capture_output=True, check=True).stdout
    assert written == reference_bytes(program, codes)


def test_cpp_can_include_the_header(tmp_path: Path):
    source = write_c(program_of(quantized(convolutions(), {"x": images()})), "net")
    (tmp_path / "net.h").write_text(source.header)
    (tmp_path / "try.cpp").write_text('#include "net.h"\nint main() { return net_run(0, 0, 0, 0) - 1; }\n')
    subprocess.run(["g++", "-Wall", "-Werror", "-pedantic", "-c", "try.cpp", "-o", "try.o"], check=True, cwd=tmp_path)
    symbols = subprocess.run(["nm", "-u", "try.o"], check=True, capture_output=True, text=True, cwd=tmp_path).stdout
    assert symbols.split() == ["U", "net_run"]  # by its name in C: C++ has not mangled it


@pytest.mark.parametrize("name", ["9lives", "a-b", "while", "", "größe"])
def test_a_name_that_c_cannot_call_is_an_error(name: str):
    program = program_of(quantized(convolutions(), {"x": images()}))
    with pytest.raises(InputError, match="is no name for C functions"):
        write_c(program, name)


def test_values_that_live_together_never_share_bytes():
    model, batch = residual()
    placed = plan(program_of(quantized(model, batch)))
    slots = list(placed.slots.values())
    together = [(a, b) for a in slots for b in slots if a is not b and a.first <= b.last and b.first <= a.last]
    assert len(together) > 10
    assert not [(a, b) for a, b in together if a.offset < b.offset + b.bytes and b.offset < a.offset + a.bytes]
    assert placed.bytes < sum(slot.bytes for slot in slots)


def test_two_readers_of_a_turned_tensor_share_one_copy(tmp_path: Path):
    """A product along the height reads channels first, in memory they are last."""
    text = """
        f (float[N,4,6,6] x) => (float[N,4,6,5] y) {
            a = Conv <pads = [1,1,1,1]> (x, w)
            b = MatMul (a, u)
            c = MatMul (a, v)
            y = Add (b, c)
        }"""
    r = np.random.default_rng(0)
    weights = {"w": r.normal(size=(4, 4, 3, 3)), "u": r.normal(size=(6, 5)), "v": r.normal(size=(6, 5))}
    batch = {"x": r.normal(size=(16, 4, 6, 6)).astype(np.float32)}
    program = program_of(quantized(network(text, **weights), batch))
    assert [type(layer).__name__ for layer in program.layers] == ["Conv", "Copy", "Conv", "Conv", "Add"]
    codes = codes_of(program, batch)
    assert run_c(program, codes, tmp_path) == reference_bytes(program, codes)
