"""The ONNX program: reading it, and passes that rewrite it, ONNX → ONNX, one a file.

PASSES holds those that need nothing but the program; each is `program → Changed`, in place. relax_relu6,
equalize_activations, smooth and absorb_high_biases also take what was observed on data.
"""

from collections.abc import Callable

import onnx_ir as ir

from lowbit.graph.changed import Changed
from lowbit.graph.equalize import equalize_weights
from lowbit.graph.fold_batchnorm import fold_batchnorm
from lowbit.graph.fuse_gemm import fuse_gemm
from lowbit.graph.recognize import recognize_operators

PASSES: dict[str, Callable[[ir.Model], Changed]] = {
    "recognize_operators": recognize_operators,
    "fold_batchnorm": fold_batchnorm,
    "fuse_gemm": fuse_gemm,
    "equalize_weights": equalize_weights,
}

__all__ = ["PASSES", "Changed"]
