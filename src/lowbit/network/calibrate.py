"""Calibration: one pass over the data fills the statistics that answer every range."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lowbit.errors import DataError
from lowbit.network.fakequant import FakeBias, FakeQuant, Simulation
from lowbit.numerics import Int, quantize
from lowbit.solve import SOLVERS

LARGEST_BIAS = 2.0**30  # steps: half of int32, the other half is for the sum that it is added to
Batch = Mapping[str, np.ndarray[Any, Any]]


def tensors(simulation: Simulation, batch: Batch) -> list[Tensor]:
    """What the simulated network is called with."""
    return [torch.from_numpy(np.ascontiguousarray(batch[str(v.name)])) for v in simulation.program.graph.inputs]


def forward(simulation: Simulation, batch: Batch) -> dict[str, Tensor]:
    """Outputs of the simulated network for one batch."""
    with torch.no_grad():
        outputs: dict[str, Tensor] = simulation.module(*tensors(simulation, batch))
    return outputs


def observe(simulation: Simulation, batches: Iterable[Batch], chosen: "Sequence[FakeQuant] | None" = None) -> int:
    """Fold every activation of every batch into its quantizer's statistics; the number of batches seen.

    chosen   the quantizers that look; None: those of all activations
    """
    seen = 0
    with simulation.mode("observe", chosen):
        for batch in batches:
            forward(simulation, batch)
            seen += 1
    if not seen:
        raise DataError("the calibration data is empty: not one batch came out of it.")
    return seen


def solve_weights(simulation: Simulation) -> None:
    """Find the codes of every weight; the simulated network then holds their values."""
    for name, (site, quantizer) in simulation.constants().items():
        quantizer.store(SOLVERS[site.spec.solve](simulation.parameter(name), site.spec))


def hold_biases(simulation: Simulation) -> list[str]:
    """Widen weight scales under which a bias would not fit its int32. What was done, in words.

    A channel that training switched off has weights of 1e-12 and a bias of order 1: at scale S_x · S_w its bias needs
    more than 31 bits and saturates. Its weights may as well round to 0, so its scale is raised until |bias| ≤ 2^30
    steps.
    """
    done = []
    for name, site in simulation.placement.sites.items():
        quantizer = simulation.quantizers[name]
        if not isinstance(quantizer, FakeBias) or site.product is None:
            continue
        activation, weight = quantizer.sources
        bias = simulation.parameter(name).detach()
        least = (bias.abs() / (activation.scale.reshape(()) * LARGEST_BIAS)).reshape(-1)
        scale = weight.scale.reshape(-1)
        short = scale < least if scale.numel() > 1 else scale < least.max()
        if bool(short.any()) and isinstance(weight.format.grid, Int):
            top = weight.format.reach or weight.format.grid.maximum
            bound = (torch.maximum(scale, least if scale.numel() > 1 else least.max()) * top).reshape(-1, 1)
            weight.store(quantize(simulation.parameter(site.product[1]).detach(), weight.format, (-bound, bound)))
            done.append(f"'{name}': {int(short.sum())} channel(s) with weights near 0 got a scale that their bias fits")
    return done
