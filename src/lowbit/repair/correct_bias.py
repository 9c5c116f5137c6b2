"""Bias correction: give each layer back the mean that its rounding took.

Rounding errors of a weight do not cancel when its inputs are all positive: E[W̃x] − E[Wx] = E[ε x] shifts a whole
channel, and a depthwise layer of nine weights shifts it far. The shift is a constant, so the bias can carry it.
Source: Nagel et al. 2019 (arXiv 1906.04721), section 4.2, in its empirical form (appendix D): the shift is measured,
layer after layer, each with the corrections before it in place. Here it is the median error, see `_shift`.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, fx

from lowbit.graph.layer import Layer
from lowbit.graph.weights import constant
from lowbit.network.calibrate import both_walks
from lowbit.network.in_step import in_step
from lowbit.network.network import Network
from lowbit.repair.prove import Calibration

# (layer, exact outputs, quantized outputs of each batch, channels last) → gain and shift of each channel.
Correction = Callable[[Layer, Sequence[Tensor], Sequence[Tensor]], tuple["Tensor | float", Tensor]]

MEDIAN_POSITIONS = 4096  # positions of a layer that its median is taken over


def correct_bias(network: Network, calibration: Calibration) -> list[str]:
    """Shift every bias by the error of its layer's output per channel. What was done, in words."""
    calibration.stage("correcting biases")
    count = correct_layers(network, calibration, _shift)
    return [f"corrected the biases of {count} layers"] if count else []


def correct_layers(network: Network, calibration: Calibration, correction: Correction) -> int:
    """Give each quantized layer with a bias of its own the outputs gain · y + shift; how many layers there are.

    Layer after layer, each with the corrections before it in place. A gain that is not 1 must be in the weight already.
    """
    layers = _layers(network.module)
    with network.mode("quantize"), torch.no_grad():
        exact, quantized = both_walks(network, calibration.together)
        for node in in_step(*exact, *quantized):
            if node not in layers:
                continue
            layer, name = layers[node]
            axis, bias = layer.kind.channels, network.parameter(name)
            parts = [[walk.compute(node).movedim(axis, -1) for walk in walks] for walks in (exact, quantized)]
            gain, shift = correction(layer, *parts)
            bias.copy_((gain * bias.reshape(-1) + shift).reshape(bias.shape))
            for walk, y in zip(quantized, parts[1], strict=True):
                walk.env[node] = (gain * y + shift).movedim(-1, axis)
    return len(layers)


def _shift(layer: Layer, exact: Sequence[Tensor], quantized: Sequence[Tensor]) -> tuple[float, Tensor]:
    """1, and the median of exact − quantized over samples and positions, per channel.

    Not the mean: where a few tokens or pixels are clipped far, the mean moves all the others to make up for them
    (MiniLM: cosine of the sentence vectors 0.987 with the mean, 0.993 with the median, which for rounding noise is the
    same).
    """
    positions = sum(y.numel() // y.shape[-1] for y in exact)
    every = max(1, positions // MEDIAN_POSITIONS) | 1  # odd: positions of a row of pixels take turns
    rows = [[y.flatten(0, -2)[::every] for y in pair] for pair in zip(exact, quantized, strict=True)]
    return 1.0, torch.cat([wanted - found for wanted, found in rows]).T.contiguous().median(1).values


def _layers(module: fx.GraphModule) -> dict[fx.Node, tuple[Layer, str]]:
    """Node behind which a bias is in → layer, name of the bias; of quantized layers with a bias of their own."""
    made = {node.meta["value"]: node for node in module.graph.nodes if "value" in node.meta}
    found: dict[fx.Node, tuple[Layer, str]] = {}
    for node in module.graph.nodes:
        layer: Layer | None = node.meta.get("layer")
        bias = None if layer is None else constant(layer.bias_value)
        if layer is None or layer.bias_value is None or bias is None or "quantized_value" not in node.args[1].meta:
            continue
        if bias.size == layer.outputs and len(layer.bias_value.uses()) == 1:
            found[made[layer.output.name]] = layer, str(layer.bias_value.name)
    return found
