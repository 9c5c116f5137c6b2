"""Networks in integers only: `python -m benchmarks.integers [kws resnet8 …]`.

accuracy     of float and of the reference on all samples that are evaluated, and the reference's processor time
agreement    the reference, its C, and onnxruntime on the same file, on up to 1,000 samples
bytes        of the C (gcc -Os, this machine; flash and RAM of a Cortex-M4 from the linker map), its arena, the .tflite,
             and the published int8 model's file; the least arena with which TFLite Micro takes either .tflite
times        ms a sample, one thread, one run: the C, the C of emx-onnx-cgen from the float network and from the file
             with Q/DQ, onnxruntime, LiteRT, and LiteRT on the published model

transformers and recurrent networks are in integer_sequences.py, decibels between them and float; of recurrent ones also
with states of other formats

A value is off where the reference and onnxruntime disagree though both started from onnxruntime's codes; end to end,
where both started from the same input.
"""

import ctypes
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

import lowbit as lb
from benchmarks.integer_sequences import MAKERS, RECURRENT, states_rows
from benchmarks.integer_sequences import row as sequence_row
from benchmarks.networks import CASES, FOLDER
from benchmarks.tables import arguments, show
from benchmarks.timing import alternating
from lowbit.engines.compile import ENGINES
from lowbit.integer.c import Source, write_c
from lowbit.integer.engine import encode
from lowbit.integer.lower import lower
from lowbit.integer.program import Program
from lowbit.integer.reference import run
from lowbit.integer.tflite import write_tflite
from lowbit.model import Model

PUBLISHED = {"kws": "kws_ref_model.tflite", "resnet8": "pretrainedResnet_quant.tflite", "vww": "vww_96_int8.tflite"}
NAMES = (*PUBLISHED, "resnet20", "mobilenet", *MAKERS)
SAMPLES = 1000
_STEPS = "16 bits: codes one step from the reference %"
DIGITS = {"off by one %": 4, "end to end, within one %": 4, "more than two %": 6, _STEPS: 4}


def main(given: Sequence[str] | None = None) -> None:
    options = arguments(__doc__ or "", NAMES).parse_args(given)
    accuracy, agreement, sizes, times = [], [], [], []
    wanted = options.networks or NAMES
    for name in (name for name in wanted if name not in MAKERS):
        network = lb.load(CASES[name].file())
        file = lb.quantize(network, CASES[name].calibration(network), target="integer")
        program = lower(file.program)
        with tempfile.TemporaryDirectory(prefix="lowbit-") as folder:
            source = write_c(program, "net", main=True)
            (Path(folder) / "net.c").write_text(source.code)
            (Path(folder) / "net.h").write_text(source.header)
            accuracy.append({"network": name} | scores(name, network, program))
            agreement.append({"network": name} | agrees(name, network, file, program, Path(folder)))
            sizes.append({"network": name} | takes(name, program, source, Path(folder)))
            times.append({"network": name} | times_of(name, network, file, program, source, Path(folder)))
    tables = {"accuracy": accuracy, "agreement": agreement, "bytes": sizes, "ms a sample": times}
    tables["transformers and recurrent networks"] = [sequence_row(name) for name in wanted if name in MAKERS]
    tables["states, simulated"] = [row for name in wanted if name in RECURRENT for row in states_rows(name)]
    for title, rows in tables.items():
        if rows:
            show(title, rows, options.json, DIGITS)


def scores(name: str, network: Model, program: Program) -> dict[str, Any]:
    (port,), (output,) = program.inputs, program.outputs
    samples = lb.Data.of(CASES[name].evaluation(network), network.inputs)
    floats, own, seconds = [], [], 0.0
    for inputs, labels in samples.batches(500):
        floats.append(network.run(inputs)[program.names[0]].argmax(1) == labels)
        codes = encode(inputs[port.name], port)
        start = time.process_time()
        own.append(run(program, {port.name: codes})[output.name].argmax(1) == labels)
        seconds += time.process_time() - start
    right = {"float top1 %": np.concatenate(floats), "integer top1 %": np.concatenate(own)}
    shares = {key: 100 * float(hits.mean()) for key, hits in right.items()}
    return {"samples": sum(map(len, own)), **shares, "processor seconds of the reference": seconds}


def agrees(name: str, network: Model, file: Model, program: Program, folder: Path) -> dict[str, Any]:
    samples = lb.Data.of(CASES[name].evaluation(network), network.inputs, limit=SAMPLES)
    parts = list(samples.batches(SAMPLES))
    inputs = {key: np.concatenate([part[key] for part, _ in parts]) for key in parts[0][0]}
    count = len(next(iter(inputs.values())))
    (port,), (output,) = program.inputs, program.outputs
    codes = encode(inputs[port.name], port)
    compiled(folder, "-O3", "-march=native", "-o", "net")
    written = subprocess.run([folder / "net"], input=codes.tobytes(), capture_output=True, check=True).stdout
    own = run(program, {port.name: codes})[output.name]

    off, ends, whole = [], [], []
    names = [t.name for t in program.tensors() if t.name not in inputs]
    session = ENGINES["onnxruntime"].compile(file.program, outputs=names)
    for begin in range(0, count, 100):
        batch = {key: array[begin : begin + 100] for key, array in inputs.items()}
        values = session(batch) | batch
        theirs = {t.name: encode(values[t.name], t) for t in program.tensors()}
        ends.append(np.abs(theirs[output.name].astype(int) - own[begin : begin + 100]).reshape(-1))
        through = run(program, {port.name: theirs[port.name]})
        for layer in program.layers:
            apart = through[layer.output.name].astype(np.int16) - theirs[layer.output.name]
            whole.append(np.abs(apart).reshape(-1).astype(np.uint8))
            alone = Program(layer.inputs, (layer.output,), (layer.output.name,), (layer,))
            ours = run(alone, {t.name: theirs[t.name] for t in layer.inputs})[layer.output.name]
            off.append(np.abs(ours.astype(np.int16) - theirs[layer.output.name]).reshape(-1).astype(np.uint8))
    steps, last, inner = np.concatenate(off), np.concatenate(ends), np.concatenate(whole)
    return {
        "samples": count,
        "C = reference": "every byte" if written == own.tobytes() else "DIFFERS",
        "values": steps.size,
        "off by one %": 100 * float((steps == 1).mean()),
        "most steps off": int(steps.max()),
        "end to end, within one %": 100 * float((inner <= 1).mean()),
        "more than two %": 100 * float((inner > 2).mean()),
        "most": int(inner.max()),
        "outputs off by one %": 100 * float((last == 1).mean()),
        "outputs, most off": int(last.max()),
    }


def takes(name: str, program: Program, source: Source, folder: Path) -> dict[str, Any]:
    compiled(folder, "-Os", "-c", "-o", "net.o")
    told = subprocess.run(["size", folder / "net.o"], capture_output=True, text=True, check=True).stdout
    row = {"C, code and constants": int(told.splitlines()[1].split()[0]), **cortex(folder), "arena": source.arena_bytes}
    flat = write_tflite(program)
    row |= {"tflite": len(flat), "its arena in TFLite Micro": micro_arena(flat)}
    if name in PUBLISHED:
        published = (FOLDER / "peers" / PUBLISHED[name]).read_bytes()
        row |= {"published tflite": len(published), "published's arena": micro_arena(published)}
    return row


def cortex(folder: Path) -> dict[str, int]:
    """Flash and RAM of the network on a Cortex-M4, by the linker map; nothing where there is no compiler for it."""
    if shutil.which("arm-none-eabi-gcc") is None:
        return {}
    (folder / "cortex.c").write_text(
        '#include "net.h"\nstatic int8_t in[NET_INPUT_BYTES], out[NET_OUTPUT_BYTES];\n'
        "static int32_t arena[NET_ARENA_BYTES / 4];\nint main(void) { return net_run(in, out, arena, sizeof arena); }\n"
    )
    bare = (folder / "net.c").read_text().split("/* Input codes from standard input")[0]
    (folder / "bare.c").write_text(bare.replace("#include <stdio.h>", ""))
    options = ["-mcpu=cortex-m4", "-mthumb", "-Os", "-ffunction-sections", "-fdata-sections"]
    for name in ("bare", "cortex"):
        built = ["arm-none-eabi-gcc", *options, "-c", f"{name}.c", "-o", f"{'net' if name == 'bare' else name}.o"]
        subprocess.run(built, check=True, cwd=folder)
    linked = ["-nostartfiles", "-specs=nosys.specs", "-e", "main", "-Wl,--gc-sections", "-Wl,-Map=net.map"]
    subprocess.run(["arm-none-eabi-gcc", *options, *linked, "cortex.o", "net.o"], check=True, cwd=folder)
    flash, ram = linked_bytes((folder / "net.map").read_text())
    return {"Cortex-M4, flash": flash, "RAM beside the arena": ram}


def linked_bytes(linker_map: str) -> tuple[int, int]:
    """(flash, RAM) of net.o in a linker map: sections that were kept, by where they lie."""
    placed = linker_map.split("Linker script and memory map", 1)[1]  # before it: what --gc-sections dropped
    found = re.findall(r"^ \.(\w+)[\w.]*\s+0x\w+\s+0x(\w+) net\.o$", placed, re.MULTILINE)
    sizes = {
        kind: sum(int(size, 16) for name, size in found if name in kind.split()) for kind in ("text rodata", "data bss")
    }
    return sizes["text rodata"], sizes["data bss"]


def micro_arena(model: bytes) -> int:
    """Bytes of the smallest arena, to 16, with which TFLite Micro runs a model."""
    least, most = 0, 1 << 18
    while most - least > 16:
        middle = (least + most) // 32 * 16
        # A process of its own: an arena that is too small ends in an error, or in a crash of the interpreter.
        tried = subprocess.run(
            [sys.executable, "-c", _MICRO, str(middle)], input=model, capture_output=True, check=False
        )
        least, most = (least, middle) if tried.returncode == 0 else (middle, most)
    return most


_MICRO = """
import sys
from tflite_micro import runtime
engine = runtime.Interpreter.from_bytes(sys.stdin.buffer.read(), arena_size=int(sys.argv[1]))
engine.invoke()
"""


def times_of(
    name: str, network: Model, file: Model, program: Program, source: Source, folder: Path
) -> dict[str, float]:
    compiled(folder, "-O3", "-march=native", "-shared", "-fPIC", "-o", "net.so")
    library = ctypes.CDLL(str(folder / "net.so"))
    arena = np.zeros(source.arena_bytes + 64, np.int8)
    given, made = (np.zeros(port.bytes, np.int8) for port in (*program.inputs, *program.outputs))
    pointers = [array.ctypes.data_as(ctypes.c_void_p) for array in (given, made, arena)]
    size = ctypes.c_size_t(arena.size)
    shape = [d if isinstance(d, int) else 1 for d in file.inputs[0].shape]
    batch = {file.inputs[0].name: np.zeros(shape, np.float32)}
    session = ENGINES["onnxruntime"].compile(file.program, threads=1)
    calls: dict[str, Callable[[], object]] = {
        "C": lambda: library.net_run(*pointers, size),
        "emx, float": emx(network, folder, "emx_float"),
        "emx, Q/DQ": emx(file, folder, "emx_qdq"),
        "onnxruntime": lambda: session(batch),
        "LiteRT": litert(write_tflite(program)),
    }
    if name in PUBLISHED:
        calls["LiteRT, published"] = litert((FOLDER / "peers" / PUBLISHED[name]).read_bytes())
    ten = {key: lambda call=call: [call() for _ in range(10)] for key, call in calls.items()}
    return {key: ms / 10 for key, ms in alternating(ten, seconds=3).items()}


def emx(network: Model, folder: Path, name: str) -> Callable[[], object]:
    """What emx-onnx-cgen makes of a network for one sample, compiled as our C is."""
    network.save(folder / f"{name}.onnx")
    batch = network.inputs[0].shape[0]
    fixed = [] if isinstance(batch, int) else ["--input-dim", f"{batch}=1"]
    command = [str(Path(sys.executable).with_name("emx-onnx-cgen")), "compile", *fixed, f"{name}.onnx", f"{name}.c"]
    subprocess.run(command, check=True, cwd=folder, capture_output=True)
    built = ["gcc", "-O3", "-march=native", "-shared", "-fPIC", f"{name}.c", "-lm", "-o", f"{name}.so"]
    subprocess.run(built, check=True, cwd=folder, capture_output=True)
    library = ctypes.CDLL(str(folder / f"{name}.so"))
    given, made = np.zeros(1 << 16, np.float32), np.zeros(1 << 16, np.float32)
    pointers = [array.ctypes.data_as(ctypes.c_void_p) for array in (given, made)]
    return lambda: library.model(*pointers)


def litert(model: bytes) -> Callable[[], object]:
    from ai_edge_litert.interpreter import Interpreter

    engine = Interpreter(model_content=model, num_threads=1)
    engine.allocate_tensors()
    port = engine.get_input_details()[0]
    engine.set_tensor(port["index"], np.zeros(port["shape"], port["dtype"]))
    return lambda: engine.invoke()


def compiled(folder: Path, *options: str) -> None:
    subprocess.run(["gcc", "-std=c99", *options, "net.c"], check=True, cwd=folder)


if __name__ == "__main__":
    main()
