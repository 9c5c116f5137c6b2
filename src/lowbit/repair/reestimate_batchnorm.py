"""Batch norms estimated anew behind quantized layers: each channel gets back its mean and its standard deviation.

A batch norm divides by the deviation that the float layer had. Rounding changes it: y' = (y − μ_q) · σ / σ_q + μ has
that of the float network again. Where the norm is folded into its layer, σ / σ_q goes into the weight's scale of that
channel and the rest into the bias: codes stay.
Source: Hubara et al. 2020 (AdaQuant, arXiv 2006.10518), section 3.4, "batch-norm tuning".
"""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from lowbit.graph.layer import Layer
from lowbit.network.calibrate import both_walks
from lowbit.network.in_step import in_step
from lowbit.network.network import Network
from lowbit.network.stored import WeightQuant
from lowbit.repair.correct_bias import layers_with_bias
from lowbit.repair.prove import Calibration

LARGEST = 2.0  # factor: a channel that rounding all but switched off is not blown up


def reestimate_batchnorm(network: Network, calibration: Calibration) -> list[str]:
    """Give each layer's outputs the mean and deviation that they have in float. What was done, in words."""
    calibration.stage("estimating batch norms")
    layers = layers_with_bias(network.module)
    with network.mode("quantize"), torch.no_grad():
        exact, quantized = both_walks(network, calibration.together)
        for node in in_step(*exact, *quantized):
            if node not in layers:
                continue
            layer, name = layers[node]
            axis = layer.kind.channels
            wanted = _moments([walk.compute(node) for walk in exact], axis)
            found = _moments([walk.compute(node) for walk in quantized], axis)
            gain = _scaled(network.constants()[str(layer.value.name)][1], layer, wanted[1] / found[1].clamp_min(1e-12))
            bias = network.parameter(name)
            bias.copy_((gain * (bias.reshape(-1) - found[0]) + wanted[0]).reshape(bias.shape))
            for walk in quantized:
                walk.env[node] = ((walk.env[node].movedim(axis, -1) - found[0]) * gain + wanted[0]).movedim(-1, axis)
    return [f"estimated the batch norms of {len(layers)} layers anew"] if layers else []


def _moments(parts: Sequence[Tensor], axis: int) -> tuple[Tensor, Tensor]:
    """(channels,) mean and standard deviation over samples and positions."""
    rows = [x.movedim(axis, 0).flatten(1).double() for x in parts]
    count = sum(x.shape[1] for x in rows)
    mean = torch.stack([x.sum(1) for x in rows]).sum(0) / count
    square = torch.stack([(x - mean[:, None]).square().sum(1) for x in rows]).sum(0) / count
    return mean.float(), square.sqrt().float()


def _scaled(quantizer: WeightQuant, layer: Layer, gain: Tensor) -> Tensor:
    """Multiply the weight's scales by these factors of its outputs; the factors taken, ones where they cannot be."""
    stored = quantizer.stored
    assert stored is not None
    if not isinstance(stored.scale, Tensor) or stored.tiles[layer.output_axis] != len(gain):
        return torch.ones_like(gain)  # channels share a scale, or it is stored in codes
    gain = gain.clamp(1 / LARGEST, LARGEST)
    along = [-1 if axis == layer.output_axis else 1 for axis in range(len(stored.tiles))]
    quantizer.store(replace(stored, scale=stored.scale * gain.reshape(along)))
    return gain
