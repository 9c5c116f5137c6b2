"""Smoothing before quantization: what `graph.smooth` needs to know, read from a few samples."""

from collections.abc import Iterable
from typing import Any

import numpy as np
import onnx_ir as ir

from lowbit.engines.compile import ENGINES, Batch
from lowbit.graph.smooth import smooth, smoothable


def smooth_activations(program: ir.Model, batches: Iterable[Batch]) -> list[str]:
    """Move outlier channels of MatMul inputs into the weights, where that costs no operator. What was done."""
    values = smoothable(program)
    if not values:
        return []
    maxima: dict[str, np.ndarray[Any, Any]] = {}
    run = ENGINES["onnxruntime"].compile(program, outputs=values)
    for batch in batches:
        for name, array in run(dict(batch)).items():
            if array.ndim and array.dtype.kind == "f":
                seen = np.abs(array).reshape(-1, array.shape[-1]).max(axis=0, initial=0)
                maxima[name] = np.maximum(maxima.get(name, seen), seen)
    return list(smooth(program, maxima))
