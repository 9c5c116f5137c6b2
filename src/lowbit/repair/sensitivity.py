"""What a weight's error does to the outputs: its gradient, squared, from a few backward passes and no labels."""

from collections.abc import Mapping

import torch
from torch import Tensor

from lowbit.network.compressed import CompressedNetwork
from lowbit.network.moments import Inputs
from lowbit.repair.projections import projections

SAMPLES = 64


def squared_gradients(
    network: CompressedNetwork, values: Mapping[str, Tensor], keys: list[str], batches: Inputs
) -> dict[str, float]:
    """Mean square of the outputs' derivatives by one weight, summed over outputs, relative to their power."""
    generator = torch.Generator().manual_seed(0)
    total = dict.fromkeys(keys, 0.0)
    weights = {key: value.detach().clone().requires_grad_(key in total) for key, value in values.items()}
    together = max((len(x) for x in batches[0] if x.dim()), default=1)
    for inputs in batches[: -(-SAMPLES // together)]:
        outputs = [y for y in network(*inputs, weights=weights).values() if y.requires_grad]
        if not outputs:
            continue
        along = projections(outputs, generator)
        gradients = torch.autograd.grad(outputs, [weights[key] for key in keys], along, allow_unused=True)
        for key, gradient in zip(keys, gradients, strict=True):
            total[key] += 0.0 if gradient is None else float(gradient.square().mean())
    return total
