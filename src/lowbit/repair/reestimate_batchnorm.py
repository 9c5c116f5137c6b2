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
from lowbit.network.network import Network
from lowbit.network.stored import WeightQuant
from lowbit.repair.correct_bias import correct_layers
from lowbit.repair.prove import Calibration

LARGEST = 2.0  # factor: a channel that rounding all but switched off is not blown up


def reestimate_batchnorm(network: Network, calibration: Calibration) -> list[str]:
    """Give each layer's outputs the mean and deviation that they have in float. What was done, in words."""
    calibration.stage("estimating batch norms")
    weights = {name: quantizer for name, (_, quantizer) in network.constants().items()}

    def tuned(layer: Layer, exact: Sequence[Tensor], quantized: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        (mean, deviation), (found, found_deviation) = _moments(exact), _moments(quantized)
        gain = _scaled(weights[str(layer.value.name)], layer, deviation / found_deviation.clamp_min(1e-12))
        return gain, mean - gain * found

    count = correct_layers(network, calibration, tuned)
    return [f"estimated the batch norms of {count} layers anew"] if count else []


def _moments(parts: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """(channels,) mean and standard deviation over samples and positions."""
    rows = [y.flatten(0, -2).double() for y in parts]
    count = sum(len(y) for y in rows)
    mean = torch.stack([y.sum(0) for y in rows]).sum(0) / count
    square = torch.stack([(y - mean).square().sum(0) for y in rows]).sum(0) / count
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
