"""High biases absorbed into the next layer: what always passes a Relu need not be in the activation's range.

Where channel i before a Relu never falls below c_i > 0, relu(x) = relu(x − c) + c: the first layer's bias loses c, the
next layer's bias gains W·c. Exact while x ≥ c holds and the next layer pads nothing; stated as approximate.
Source: Nagel et al. 2019 (arXiv 1906.04721), section 4.1.3.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx_ir as ir

from lowbit.graph.changed import Changed
from lowbit.graph.equalize import pairs_of
from lowbit.graph.relu6 import relu_ceiling


def absorb_high_biases(program: ir.Model, minima: Mapping[str, np.ndarray]) -> Changed:
    """Move c = max(0, minimum) of each channel before a Relu from the first layer's bias to the next layer's.

    minima   smallest value of each channel, (channels,), by the name of the first layer's output. Without data the
             paper takes β − 3γ of the batch normalisation folded into the layer
    """
    done: list[str] = []
    pairs, kept = pairs_of(program)
    for pair in pairs:
        name = str(pair.first.output.name)
        low = minima.get(name)
        if (
            low is None
            or low.shape != (pair.first.outputs,)
            or not any(relu_ceiling(node) is not None for node in pair.between)
        ):
            continue
        shift = np.maximum(0.0, np.asarray(low, dtype=np.float64))
        if not shift.any():
            continue
        if any(relu_ceiling(node) != float("inf") for node in pair.between):
            kept.append(f"{pair} kept: more than a Relu lies between")
        elif pair.second.node.op_type == "ConvTranspose" or pair.second.pads():
            kept.append(f"{pair} kept: the second layer pads with zeros, where nothing was taken away")
        elif any(layer.node.op_type == "MatMul" and layer.bias_node is None for layer in (pair.first, pair.second)):
            kept.append(f"{pair} kept: a MatMul without a bias")
        else:
            pair.first.set_bias(pair.first.bias - shift)
            pair.second.set_bias(pair.second.bias + pair.second.response(shift))
            done.append(f"{int((shift > 0).sum())} biases of '{pair.first.node.name}' absorbed by the next layer")
    return Changed(tuple(done), tuple(kept), exact=False)
