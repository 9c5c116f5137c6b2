"""The table of kernels by device: numba on the CPU, torch expressions on every other device.

A Triton kernel for CUDA is one file here, `cuda.py`, with a function named as the kernel it replaces, and one row of
DEVICES: `"cuda": _of(cuda, elsewhere)`.
"""

from collections.abc import Callable
from dataclasses import dataclass, fields
from types import ModuleType

import torch
from torch import Tensor

from lowbit.numerics.buckets import Buckets
from lowbit.numerics.grids import Fitted, Grid, Int
from lowbit.numerics.kernels import counting, cpu, elsewhere, learning
from lowbit.numerics.roundings import Rounding


@dataclass(frozen=True)
class Kernels:
    """What is computed for each element, on one device; the same bits on all of them.

    rows are (n_blocks, n) float32, scale and zero (n_blocks, 1), or (1, 1) for all; a scale of 0 stands for infinity.
    A rounding is one of ROUNDINGS; for `Int` it is `nearest`. table: sorted values of each block, for a fitted grid.

    encode           (rows, scale, zero, grid, rounding, table) → codes of x / scale + zero. `Int` rounds before it adds
                     the zero, as ONNX QuantizeLinear does: ties would go elsewhere otherwise
    decode           (codes, scale, zero, grid, table) → (value - zero) * scale
    fake_quantize    (rows, scale, zero, grid) → encoded to nearest and decoded; NaN stays NaN
    extremes         (rows) → least and greatest of each row, (n_blocks, 1); not finite where a value is not
    symmetric_scale  (lo, hi, reach, signed, empty, least, most) → max(|lo|, |hi|) / reach, or hi / reach if unsigned,
                     clipped to least … most; `empty` for a range of no width
    error_along      (rows, along, scales, zeros, grid) → Σ along · (x̂ − x) over each row under each of the scales
                     (n_scales,) to nearest: (n_blocks, n_scales) float64
    count            (rows) → their `Buckets`
    round_to_step    (x, scale, low, high, past_low, marks) → x / scale to the nearest of the integers low … high, times
                     scale; and what its gradients need, in int8 or int16: round(x / scale) − x / scale, 1/2 as that
                     type's end less 1; the end itself for above, its negative for below. past_low: low itself is below.
                     x has any shape, float32 or bfloat16, with one scale for all
    step_gradient    (marks, along) → `along` inside and 0 elsewhere; and three sums of `along`: times
                     round(x / scale) − x / scale inside, below, above
    """

    encode: Callable[[Tensor, Tensor, Tensor, Grid | Fitted, Rounding, Tensor | None], Tensor]
    decode: Callable[[Tensor, Tensor, Tensor, Grid | Fitted, Tensor | None], Tensor]
    fake_quantize: Callable[[Tensor, Tensor, Tensor, Grid], Tensor]
    extremes: Callable[[Tensor], tuple[Tensor, Tensor]]
    symmetric_scale: Callable[[Tensor, Tensor, float, bool, float, float, float], Tensor]
    error_along: Callable[[Tensor, Tensor, Tensor, Tensor, Int], Tensor]
    count: Callable[[Tensor], Buckets]
    round_to_step: Callable[[Tensor, Tensor, Tensor, Tensor, bool, torch.dtype], tuple[Tensor, Tensor]]
    step_gradient: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


def _of(*modules: ModuleType) -> Kernels:
    """Each kernel from the first of the modules that has it."""
    return Kernels(**{f.name: next(getattr(m, f.name) for m in modules if hasattr(m, f.name)) for f in fields(Kernels)})


ELSEWHERE = _of(elsewhere)
DEVICES = {"cpu": _of(cpu, counting, learning)}


def kernels(x: Tensor) -> Kernels:
    """The kernels of the device on which a tensor lies; torch expressions while torch compiles, which it can read."""
    return ELSEWHERE if torch.compiler.is_compiling() else DEVICES.get(x.device.type, ELSEWHERE)
