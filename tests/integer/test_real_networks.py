"""The four networks of MLPerf Tiny's kind: reference, C, onnxruntime and a Cortex-M, on real samples."""

import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from benchmarks.integers import linked_bytes
from benchmarks.networks import CASES
from compiled import codes_of, program_of, reference_bytes, run_c

import lowbit as lb
from lowbit.engines.compile import ENGINES
from lowbit.integer.c import write_c
from lowbit.integer.engine import IntegerReference, encode
from lowbit.integer.program import Program
from lowbit.integer.reference import run
from lowbit.model import Model

pytestmark = pytest.mark.slow
LEAST = {"kws": 0.88, "resnet8": 0.82, "resnet20": 0.88, "vww": 0.81}  # of the samples used here


@pytest.fixture(scope="module", params=LEAST)
def case(request: pytest.FixtureRequest, data: Path) -> tuple[str, Model, Program, dict[str, np.ndarray], np.ndarray]:
    """(name, file, program, samples, labels)"""
    name = str(request.param)
    network = lb.load(CASES[name].file())
    file = lb.quantize(network, CASES[name].calibration(network), "int8-fast", target="integer")
    samples = lb.Data.of(CASES[name].evaluation(network), network.inputs, limit=150)
    ((inputs, labels),) = samples.batches(150)
    return name, file, program_of(file), inputs, labels


def by_layer(file: Model, program: Program, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """For each layer, steps between the reference and onnxruntime where both start from onnxruntime's codes."""
    tensors = [t for t in program.tensors() if t.name not in inputs]
    values = ENGINES["onnxruntime"].compile(file.program, outputs=[t.name for t in tensors])(inputs) | inputs
    codes = {t.name: encode(values[t.name], t) for t in program.tensors()}
    found = {}
    for layer in program.layers:
        alone = Program(layer.inputs, (layer.output,), (layer.output.name,), (layer,))
        own = run(alone, {t.name: codes[t.name] for t in layer.inputs})[layer.output.name]
        found[layer.name] = np.abs(own.astype(int) - codes[layer.output.name]).reshape(-1)
    return found


def test_the_c_gives_the_references_bytes_and_the_reference_onnxruntimes_codes(case, tmp_path: Path):
    name, file, program, inputs, labels = case
    codes = codes_of(program, inputs)
    assert run_c(program, codes, tmp_path, "gcc", "-O3", "-march=native") == reference_bytes(program, codes)

    few = {key: array[:40] for key, array in inputs.items()}
    steps = by_layer(file, program, few)  # each layer is given onnxruntime's own codes
    assert max(apart.max() for apart in steps.values()) == 0
    ours, theirs = (engine.compile(file.program)(few) for engine in (IntegerReference(), ENGINES["onnxruntime"]))
    for port in program.outputs:
        np.testing.assert_allclose(ours[port.name], theirs[port.name], rtol=0, atol=port.scale / 10)

    outputs = IntegerReference().compile(file.program)(inputs)[program.names[0]]
    assert (outputs.argmax(1) == labels).mean() >= LEAST[name]


def test_a_cortex_m_gives_the_references_bytes(data: Path, tmp_path: Path):
    """mps2-an386 (Cortex-M4) in qemu, semihosting: 20 samples; flash and RAM from the linker map."""
    compiler, machine = "arm-none-eabi-gcc", "qemu-system-arm"
    if not (shutil.which(compiler) and shutil.which(machine)):
        pytest.skip("no arm-none-eabi-gcc and qemu-system-arm here")
    network = lb.load(CASES["kws"].file())
    program = program_of(lb.quantize(network, CASES["kws"].calibration(network), "int8-fast", target="integer"))
    source = write_c(program, "net")
    codes = {"input": np.random.default_rng(0).integers(-128, 128, (20, program.inputs[0].size)).astype(np.int8)}
    (tmp_path / "net.c").write_text(source.code)
    (tmp_path / "net.h").write_text(source.header)
    (tmp_path / "samples.h").write_text(
        f"static const signed char samples[] = {{{','.join(map(str, codes['input'].reshape(-1)))}}};"
    )
    for name in ("device.c", "device.ld"):
        shutil.copy(Path(__file__).parent / name, tmp_path)
    cortex = ["-mcpu=cortex-m4", "-mthumb", "-Os", "-ffunction-sections", "-fdata-sections"]
    link = ["-nostartfiles", "-specs=nano.specs", "-specs=rdimon.specs", "-Tdevice.ld", "-Wl,--gc-sections"]
    subprocess.run([compiler, *cortex, "-c", "net.c"], check=True, cwd=tmp_path)
    linked = [compiler, *cortex, *link, "-Wl,-Map=net.map", "device.c", "net.o", "-o", "net.elf"]
    subprocess.run(linked, check=True, cwd=tmp_path)
    board = [machine, "-M", "mps2-an386", "-nographic", "-semihosting", "-kernel", "net.elf"]
    given, console = subprocess.DEVNULL, subprocess.PIPE  # semihosting writes to stderr
    told = subprocess.run(board, check=False, stdin=given, stderr=console, timeout=200, cwd=tmp_path, text=True)
    assert bytes.fromhex(told.stderr.strip()) == reference_bytes(program, codes)

    flash, ram = linked_bytes((tmp_path / "net.map").read_text())
    assert ram == 0  # no state but the arena
    assert 25_000 < flash < 35_000  # the published model's file: 53,936
    assert source.arena_bytes < 17_000  # its arena: 24,272
