"""Calibration: one pass over the data fills the statistics that answer every range."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lowbit.errors import DataError
from lowbit.network.fakequant import FakeBias, FakeQuant, Simulation
from lowbit.network.in_step import Run
from lowbit.network.moments import moments_in_step
from lowbit.numerics import Int, QuantTensor, quantize
from lowbit.numerics.rows import expand_tiles
from lowbit.recipe import TensorSpec
from lowbit.solve import NEED_MOMENTS, SOLVERS

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


def both_runs(simulation: Simulation, batches: Iterable[Batch]) -> tuple[list[Run], list[Run]]:
    """These batches on their way through the network, as if it had no quantizers and with them; see `in_step`."""
    given = [tensors(simulation, batch) for batch in batches]
    exact, quantized = ([Run(simulation.module, x, exact=exact) for x in given] for exact in (True, False))
    return exact, quantized


def solve_weights(simulation: Simulation, batches: Sequence[Batch] = ()) -> None:
    """Find the codes of every weight; the quantized network then holds their values.

    batches   what solvers that need moments are fitted to; without any, and for weights without moments, these round to
              nearest. `spec.solve` of a weight's quantizer says what it really got
    """
    keys = simulation.module.meta["keys"]
    waiting: dict[str, tuple[str, FakeQuant, TensorSpec]] = {}
    for name, (site, quantizer) in simulation.constants().items():
        weight, solve = simulation.parameter(name), site.spec.solve
        quantizer.store(SOLVERS[solve](weight, site.spec, None))
        if solve in NEED_MOMENTS:
            quantizer.spec = replace(site.spec, solve="nearest")
            waiting[keys[name]] = name, quantizer, site.spec
    if waiting and batches:
        with simulation.mode("quantize"):
            for key, moments in moments_in_step(*both_runs(simulation, batches), waiting):
                name, quantizer, quantizer.spec = waiting[key]
                quantizer.store(SOLVERS[quantizer.spec.solve](simulation.parameter(name), quantizer.spec, moments))


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
            wider = quantize(simulation.parameter(site.product[1]).detach(), weight.format, (-bound, bound))
            weight.store(_keep_codes(weight.stored, wider))
            done.append(f"'{name}': {int(short.sum())} channel(s) with weights near 0 got a scale that their bias fits")
    return done


def _keep_codes(before: QuantTensor | None, wider: QuantTensor) -> QuantTensor:
    """The wider tensor with the codes from before where scale and zero stayed: a solver chose them."""
    assert before is not None
    same = (before.scale_values() == wider.scale_values()) & (before.zero_values() == wider.zero_values())
    stayed = expand_tiles(torch.as_tensor(same), wider.shape, wider.tile)
    return replace(wider, codes=torch.where(stayed, torch.as_tensor(before.codes), torch.as_tensor(wider.codes)))
