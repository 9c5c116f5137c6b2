"""The integer reference as an engine: floats are quantized at the inputs and decoded at the outputs, nowhere else."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import onnx_ir as ir

from lowbit.engines.compile import Batch, Run
from lowbit.graph.load import read_file
from lowbit.integer.lower import lower
from lowbit.integer.reference import run as run_program
from lowbit.integer.tensors import Ints, Tensor
from lowbit.integer.values import onnx_shape


@dataclass(frozen=True)
class IntegerReference:
    """Runs what `--target integer` wrote, in integers by definition (docs/integers.md); slower than onnxruntime.

    sizes   of dimensions of the inputs that have only a name
    """

    name: str = "integer"
    sizes: Mapping[str, int] = field(default_factory=dict)

    def compile(
        self,
        program: ir.Model | Path,
        *,
        threads: int | None = None,
        outputs: Sequence[str] | None = None,
        optimize: bool = True,
    ) -> Run:
        source = read_file(program) if isinstance(program, Path) else program
        lowered = lower(source, sizes=self.sizes, outputs=outputs)
        coded = {v.name: v.dtype.numpy() for n in source.graph for v in n.outputs if v.dtype and v.dtype.is_integer()}

        def run(batch: Batch) -> Batch:
            held = run_program(lowered, {t.name: encode(batch[t.name], t) for t in lowered.inputs})
            given = zip(lowered.names, lowered.outputs, strict=True)
            return {name: decode(held[t.name], t, coded.get(name)) for name, t in given}

        return run


def encode(values: "np.ndarray", tensor: Tensor) -> Ints:
    """(samples, …) in ONNX's order → codes as they lie in memory, (samples, size). As QuantizeLinear rounds."""
    codes = np.clip(np.rint(values / np.float32(tensor.scale)) + tensor.zero, *tensor.ends).astype(tensor.dtype)
    apart = codes.reshape(-1, *onnx_shape(tensor)).transpose(0, *(1 + axis for axis in tensor.order))
    return np.ascontiguousarray(apart).reshape(len(apart), -1)


def decode(codes: Ints, tensor: Tensor, kind: "np.dtype | None" = None) -> "np.ndarray":
    """Codes as they lie in memory → float32 in ONNX's order, or the codes themselves in a type of the file."""
    lies = codes.reshape(-1, *tensor.shape).transpose(0, *(1 + np.argsort(tensor.order)))
    first, *rest = onnx_shape(tensor) or (1,)
    together = lies.reshape(len(codes) * first, *rest)
    if kind is not None:
        return np.asarray(together.astype(np.int32) + np.iinfo(kind).min - tensor.ends[0]).astype(kind)
    return np.asarray((together.astype(np.int32) - tensor.zero).astype(np.float32) * np.float32(tensor.scale))
