"""Calibration: one pass over the data fills the statistics that answer every range."""

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lowbit.errors import DataError
from lowbit.simulate.fakequant import Simulation
from lowbit.solve import SOLVERS

Batch = Mapping[str, np.ndarray[Any, Any]]


def forward(simulation: Simulation, batch: Batch) -> dict[str, Tensor]:
    """Outputs of the simulated network for one batch."""
    inputs = [torch.from_numpy(np.ascontiguousarray(batch[str(v.name)])) for v in simulation.program.graph.inputs]
    with torch.no_grad():
        outputs: dict[str, Tensor] = simulation.module(*inputs)
    return outputs


def observe(simulation: Simulation, batches: Iterable[Batch]) -> int:
    """Fold every activation of every batch into its quantizer's statistics; the number of batches seen."""
    seen = 0
    with simulation.mode("observe"):
        for batch in batches:
            forward(simulation, batch)
            seen += 1
    if not seen:
        raise DataError("the calibration data is empty: not one batch came out of it.")
    return seen


def solve_weights(simulation: Simulation) -> None:
    """Find the codes of every weight; the simulated network then holds their values."""
    for name, (site, quantizer) in simulation.constants().items():
        weight = simulation.parameter(name)
        stored = SOLVERS[site.spec.solve](weight, site.spec)
        quantizer.stored = stored
        quantizer.set_parameters(stored.scale_values(), stored.zero_values())
