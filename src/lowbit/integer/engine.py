"""The integer reference as an engine: floats are quantized at the inputs and decoded at the outputs, nowhere else."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx_ir as ir

from lowbit.engines.compile import Batch, Run
from lowbit.errors import LowbitError, ModelError
from lowbit.integer.lower import lower, read_program
from lowbit.integer.program import Ints, Tensor
from lowbit.integer.reference import run as run_program
from lowbit.integer.values import onnx_shape


@dataclass(frozen=True)
class IntegerReference:
    """Runs what `--target integer` wrote, in integers by definition (docs/integers.md); slower than onnxruntime."""

    name: str = "integer"

    def compile(
        self,
        program: ir.Model | Path,
        *,
        threads: int | None = None,
        outputs: Sequence[str] | None = None,
        optimize: bool = True,
    ) -> Run:
        lowered = read_program(program) if isinstance(program, Path) else lower(program)
        tensors = {str(t.name): t for t in lowered.tensors()} | dict(zip(lowered.names, lowered.outputs, strict=True))
        names = list(outputs or lowered.names)
        if unknown := [name for name in names if name not in tensors]:
            raise ModelError(f"the integer program has no value '{unknown[0]}'. There are {', '.join(tensors)}.")

        def run(batch: Batch) -> Batch:
            held = run_program(lowered, {t.name: encode(batch[t.name], t) for t in lowered.inputs})
            return {name: decode(held[tensors[name].name], tensors[name]) for name in names}

        return run

    def unsupported(self, program: ir.Model) -> list[str]:
        try:
            lower(program)
        except LowbitError as error:
            return [str(error)]
        return []


def encode(values: "np.ndarray", tensor: Tensor) -> Ints:
    """(samples, …) in ONNX's order → codes as they lie in memory, (samples, size). As QuantizeLinear rounds."""
    codes = np.clip(np.rint(values / np.float32(tensor.scale)) + tensor.zero, *tensor.ends).astype(tensor.dtype)
    apart = codes.reshape(-1, *onnx_shape(tensor)).transpose(0, *(1 + axis for axis in tensor.order))
    return np.ascontiguousarray(apart).reshape(len(apart), -1)


def decode(codes: Ints, tensor: Tensor) -> "np.ndarray":
    """Codes as they lie in memory → float32 in ONNX's order."""
    lies = codes.reshape(-1, *tensor.shape).transpose(0, *(1 + np.argsort(tensor.order)))
    first, *rest = onnx_shape(tensor) or (1,)
    together = lies.reshape(len(codes) * first, *rest)
    return np.asarray((together.astype(np.int32) - tensor.zero).astype(np.float32) * np.float32(tensor.scale))
