"""Calibration: one pass over the data fills the statistics that answer every range."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lowbit.errors import DataError
from lowbit.network.fakequant import FakeQuant, Simulation
from lowbit.solve import SOLVERS

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
