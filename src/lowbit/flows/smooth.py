"""Smoothing before quantization: what `graph.smooth` needs to know, read from a few samples."""

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from lowbit.deploy.engines import ENGINES
from lowbit.flows.calibrate import Batch
from lowbit.graph.smooth import smooth


def smooth_activations(program: ir.Model, batches: Sequence[Batch]) -> list[str]:
    """Move outlier channels of MatMul inputs into the weights, where that costs no operator. What was done."""
    values = {
        str(x.name): x
        for node in program.graph
        if node.op_type in ("MatMul", "Gemm") and _has_constant_weight(node)
        if (x := node.inputs[0]) is not None and x.producer() is not None
    }
    if not values:
        return []
    maxima: dict[str, np.ndarray] = {}
    run = ENGINES["onnxruntime"].compile(program, outputs=list(values))
    for batch in batches:
        for name, array in run(dict(batch)).items():
            if array.ndim and array.dtype.kind == "f":
                seen = np.abs(array).reshape(-1, array.shape[-1]).max(axis=0, initial=0)
                maxima[name] = np.maximum(maxima.get(name, seen), seen)
    return list(smooth(program, maxima).done)


def _has_constant_weight(node: ir.Node) -> bool:
    return node.inputs[1] is not None and node.inputs[1].const_value is not None
