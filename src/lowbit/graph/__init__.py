"""The ONNX program: reading it, and passes that rewrite it, ONNX → ONNX, one a file.

PASSES holds those that need nothing but the program; each is `program → Changed`, in place. `smooth` also takes what
was observed on data.
"""

from collections.abc import Callable

import onnx_ir as ir

from lowbit.graph.changed import Changed
from lowbit.graph.equalize import equalize_weights
from lowbit.graph.finite_masks import finite_masks
from lowbit.graph.fold_batchnorm import fold_batchnorm
from lowbit.graph.fold_scale import fold_scales
from lowbit.graph.fuse_gemm import fuse_gemm
from lowbit.graph.fuse_pad import fuse_pad
from lowbit.graph.recognize import recognize_operators
from lowbit.graph.repeats import merge_repeats
from lowbit.graph.reshapes import simplify_reshapes
from lowbit.graph.space_to_depth import space_to_depth
from lowbit.graph.split_residuals import split_residuals

PASSES: dict[str, Callable[[ir.Model], Changed]] = {
    "simplify_reshapes": simplify_reshapes,
    "merge_repeats": merge_repeats,
    "recognize_operators": recognize_operators,
    "space_to_depth": space_to_depth,
    "fuse_pad": fuse_pad,
    "fold_batchnorm": fold_batchnorm,
    "fold_scales": fold_scales,
    "fuse_gemm": fuse_gemm,
    "finite_masks": finite_masks,
    "split_residuals": split_residuals,
    "equalize_weights": equalize_weights,
}

__all__ = ["PASSES", "Changed"]
