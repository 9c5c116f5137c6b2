"""What a weight's error does to the outputs: its gradient, squared, from a few backward passes and no labels."""

from collections.abc import Mapping, Sequence

import torch

from lowbit.engines.compile import Batch
from lowbit.network.calibrate import tensors
from lowbit.network.network import Network
from lowbit.network.stored import WeightQuant
from lowbit.repair.projections import projections

SAMPLES = 64


def squared_gradients(
    network: Network, weights: Mapping[str, WeightQuant], batches: Sequence[Batch]
) -> dict[str, float]:
    """Mean square of the outputs' derivatives by one weight, summed over outputs, relative to their power."""
    generator = torch.Generator().manual_seed(0)
    total = dict.fromkeys(weights, 0.0)
    together = max((len(x) for x in tensors(network, batches[0]) if x.dim()), default=1)
    for batch in batches[: -(-SAMPLES // together)]:
        with network.mode("probe", weights.values()):
            outputs = [y for y in network.module(*tensors(network, batch)).values() if y.requires_grad]
        probes = [(name, x) for name, quantizer in weights.items() for x in quantizer.take_probes()]
        if outputs:
            along = projections(outputs, generator)
            gradients = torch.autograd.grad(outputs, [x for _, x in probes], along, allow_unused=True)
            for (name, _), gradient in zip(probes, gradients, strict=True):
                total[name] += 0.0 if gradient is None else float(gradient.square().mean())
    return total
