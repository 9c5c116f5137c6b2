"""Batch normalisation folded into the linear layer beside it. Exact but for float rounding.

BN(x) = a·x + b for each channel, with a = γ / √(σ² + ε) and b = β − a·μ. After a layer: its rows times a, its bias
a·bias + b. Before a layer: its columns times a, its bias + W·b, which is exact only where no zeros are padded.
Source: Jacob et al. 2018 (arXiv 1712.05877), eq. 14.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from lowbit.graph.changed import Changed
from lowbit.graph.layer import Layer, linear_before, linear_layer, number
from lowbit.graph.links import only_reader, remove_node
from lowbit.graph.weights import constant, drop_unread

FOLDED = "folded batch norm"  # in the meta data of a node in memory: what was folded into the layer before it


@dataclass(frozen=True)
class FoldedNorm:
    """A batch norm as it was before the layer in front of it took it; training makes it anew (network.live_batchnorm).

    name        of its γ
    mean        of what the layer makes without its bias, (channels,), as is variance
    weight      the layer's, before it was multiplied with γ / √(σ² + ε)
    """

    name: str
    mean: np.ndarray
    variance: np.ndarray
    epsilon: float
    weight: np.ndarray


def fold_batchnorm(program: ir.Model) -> Changed:
    """Fold every BatchNormalization, and every Mul or Add of one constant a channel, into a neighbouring layer."""
    done: list[str] = []
    kept: list[str] = []
    for graph in program.graphs():
        for node in list(graph):
            affine = channel_affine(node)
            if affine is None:
                continue
            reason = _fold_after(node, *affine)
            if reason is not None and node.op_type == "BatchNormalization":
                before = _fold_before(node, *affine)
                reason = f"{reason}; {before}" if before is not None else None
            if reason is None:
                done.append(f"{node.op_type} '{node.name}' folded into its neighbour")
            elif node.op_type == "BatchNormalization":
                kept.append(f"BatchNormalization '{node.name}' kept: {reason}")
    drop_unread(program)
    return Changed(tuple(done), tuple(kept))


def channel_affine(node: ir.Node) -> tuple[np.ndarray, np.ndarray] | None:
    """(a, b), each float64 (channels,), where the node computes a·x + b along axis 1 of its first input; else None."""
    if node.op_type == "BatchNormalization":
        parts = [constant(value) for value in node.inputs[1:5]]
        training = node.attributes.get("training_mode")
        if any(part is None for part in parts) or (training is not None and training.as_int()):
            return None
        gamma, beta, mean, variance = (np.asarray(part, dtype=np.float64) for part in parts)
        a = gamma / np.sqrt(variance + number(node, "epsilon", 1e-5))
        return a, beta - a * mean
    if node.op_type in ("Mul", "Add", "Sub", "Div") and len(node.inputs) == 2:
        return _elementwise_affine(node)
    return None


def _elementwise_affine(node: ir.Node) -> tuple[np.ndarray, np.ndarray] | None:
    x = node.inputs[0] if constant(node.inputs[0]) is None else node.inputs[1]
    swapped = x is node.inputs[1]
    array = constant(node.inputs[0] if swapped else node.inputs[1])
    if array is None or array.dtype.kind != "f" or x is None or x.shape is None or x.shape.rank() < 2:
        return None
    if swapped and node.op_type in ("Sub", "Div"):
        return None
    channels, rank = x.shape[1], x.shape.rank()
    if not isinstance(channels, int) or array.ndim > rank:
        return None
    full = array.reshape([1] * (rank - array.ndim) + list(array.shape)).astype(np.float64)
    if full.shape[1] not in (1, channels) or full.size != full.shape[1]:
        return None
    c = np.broadcast_to(full.reshape(-1), (channels,))
    ones, zeros = np.ones(channels), np.zeros(channels)
    match node.op_type:
        case "Mul":
            return c, zeros
        case "Div" if not c.all():
            return None  # infinite weights would not be the same
        case "Div":
            return 1 / c, zeros
        case "Add":
            return ones, c
    return ones, -c


def _fold_after(node: ir.Node, a: np.ndarray, b: np.ndarray) -> str | None:
    """Fold into the layer before; the reason why not, or None when done."""
    x = next(value for value in node.inputs if value is not None and constant(value) is None)
    layer = linear_before(x)
    if layer is None:
        return "no Conv, ConvTranspose, Gemm or MatMul with a constant weight comes before it"
    if layer.add is node:
        return "it is the layer's own bias"
    if only_reader(x) is not node:
        return f"the output of '{layer.node.name}' has other readers"
    if reason := _unfit(layer, layer.outputs, a, b):
        return reason
    normalizes = node.op_type == "BatchNormalization"
    if normalizes:
        mean, variance = (np.asarray(constant(value), np.float64) for value in node.inputs[3:5])
        epsilon, name = number(node, "epsilon", 1e-5), str(node.inputs[1].name if node.inputs[1] else "")
        layer.node.meta[FOLDED] = FoldedNorm(name, mean - layer.bias, variance, epsilon, layer.weight)
    # A batch norm leaves a bias even where it is 0 now: training moves it.
    shifts = layer.bias_input is not None and (normalizes or (b != 0).any() or layer.bias.any())
    layer.scale_outputs(a, b if shifts else None)
    remove_node(node, x)
    return None


def _fold_before(node: ir.Node, a: np.ndarray, b: np.ndarray) -> str | None:
    """Fold into the one layer after; the reason why not, or None when done."""
    x, output = node.inputs[0], node.outputs[0]
    layer = linear_layer(only_reader(output))
    if x is None or layer is None or layer.node.inputs[0] is not output:
        return "nor is its only reader one"
    if layer.pads() and (b != 0).any():
        return f"'{layer.node.name}' pads with zeros, which the shift would change"
    if reason := _unfit(layer, layer.inputs, a, b):
        return reason
    if (b != 0).any():
        layer.set_bias(layer.bias + layer.response(b))
    layer.scale_inputs(a)
    layer.node.replace_input_with(0, x)
    assert node.graph is not None
    node.graph.remove(node, safe=True)
    return None


def _unfit(layer: Layer, channels: int, a: np.ndarray, b: np.ndarray) -> str | None:
    """Why a layer with so many channels beside the node cannot take a·x + b; None where it can."""
    name = layer.node.name
    if layer.channel_axis(layer.output) != 1:
        return f"the channels of '{name}' are not on axis 1"
    if a.shape != (channels,):
        return f"it has {a.size} channels and '{name}' {channels} there"
    if layer.bias_input is None and (b != 0).any():
        return f"'{name}' has no bias that could take the shift"
    if not (np.isfinite(a).all() and np.isfinite(b).all()):
        return "its variance or scale is not finite"
    return None
