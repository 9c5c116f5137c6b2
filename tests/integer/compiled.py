"""Networks quantized for the target `integer`, and their C compiled and run."""

import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest

import lowbit as lb
from lowbit.integer.c import Library, write_c
from lowbit.integer.engine import encode
from lowbit.integer.lower import lower
from lowbit.integer.program import Program, Rounding
from lowbit.integer.reference import run
from lowbit.model import Model

STRICT = ["-std=c99", "-Wall", "-Wextra", "-Werror", "-pedantic"]


def quantized(model: Model, batch: dict[str, np.ndarray], recipe: str = "int8-fast") -> Model:
    return lb.quantize(model, batch, recipe, target="integer")


def program_of(model: Model, rounding: Rounding = "onnxruntime") -> Program:
    return lower(model.program, rounding)


def codes_of(program: Program, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {t.name: encode(batch[t.name], t) for t in program.inputs}


def run_c(
    program: Program,
    codes: dict[str, np.ndarray],
    folder: Path,
    compiler: str = "gcc",
    *more: str,
    library: Library = "none",
) -> bytes:
    """What the C with --main writes for these input codes."""
    if shutil.which(compiler) is None:
        pytest.skip(f"{compiler} is not installed")
    source = write_c(program, "net", main=True, library=library)
    (folder / "net.c").write_text(source.code)
    (folder / "net.h").write_text(source.header)
    binary = folder / f"net-{compiler}"
    subprocess.run([compiler, *STRICT, "-O1", *more, folder / "net.c", "-o", binary], check=True)
    arrays = [codes[t.name] for t in program.inputs]
    stream = b"".join(array[sample].tobytes() for sample in range(len(arrays[0])) for array in arrays)
    return subprocess.run([binary], input=stream, check=True, capture_output=True, timeout=120).stdout


def reference_bytes(program: Program, codes: dict[str, np.ndarray]) -> bytes:
    """What the reference gives, as the C writes it: for each sample all outputs."""
    held = run(program, codes)
    samples = len(next(iter(codes.values())))
    return b"".join(held[t.name][sample].tobytes() for sample in range(samples) for t in program.outputs)
