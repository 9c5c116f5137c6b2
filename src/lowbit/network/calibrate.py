"""Calibration: one pass over the data fills the statistics that answer every range."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, fx

from lowbit import processes
from lowbit.errors import DataError
from lowbit.network.in_step import Walk
from lowbit.network.moments import moments_in_step
from lowbit.network.network import Network
from lowbit.network.quantizers import FakeQuant
from lowbit.network.widen_scales import widen_scales_for_biases
from lowbit.numerics import QuantTensor
from lowbit.ranges import Histogram
from lowbit.recipe import TensorSpec
from lowbit.solve import NEED_MOMENTS, SOLVERS

if TYPE_CHECKING:
    from lowbit.engines.compile import Batch


def tensors(simulation: Network, batch: "Batch") -> list[Tensor]:
    """What the simulated network is called with."""
    return [torch.from_numpy(np.ascontiguousarray(batch[str(v.name)])) for v in simulation.program.graph.inputs]


def forward(simulation: Network, batch: "Batch") -> dict[str, Tensor]:
    """Outputs of the simulated network for one batch."""
    with torch.no_grad():
        outputs: dict[str, Tensor] = simulation.module(*tensors(simulation, batch))
    return outputs


def observe(simulation: Network, batches: "Iterable[Batch]", chosen: "Sequence[FakeQuant] | None" = None) -> int:
    """Fold every activation of every batch into its quantizer's statistics; the number of batches seen.

    Of several processes each takes every so many batches, and all get the statistics of all.

    chosen   the quantizers that look; None: those of all activations
    """
    quantizers = list(simulation.activations().values() if chosen is None else chosen)
    before = [quantizer.statistics for quantizer in quantizers]
    if processes.count() > 1:
        for quantizer, held in zip(quantizers, before, strict=True):
            quantizer.statistics = Histogram(held.block, held.name)
    seen = 0
    with simulation.mode("observe", chosen):
        for batch in batches:
            if seen % processes.count() == processes.number():
                for quantizer in quantizers:
                    quantizer.statistics.time = seen
                forward(simulation, batch)
            seen += 1
    if not seen:
        raise DataError("the calibration data is empty: not one batch came out of it.")
    if processes.count() > 1:
        everyone = processes.gathered([quantizer.statistics for quantizer in quantizers])
        for quantizer, held, *shards in zip(quantizers, before, *everyone, strict=True):
            held.merge(Histogram.dealt(shards))
            quantizer.statistics = held
    return seen


def both_walks(simulation: Network, batches: "Iterable[Batch]") -> tuple[list[Walk], list[Walk]]:
    """These batches on their way through the network, as if it had no quantizers and with them; see `in_step`."""
    given = [tensors(simulation, batch) for batch in batches]
    exact = [Walk(simulation.module, x, exact=True, parameters=simulation.before_steps) for x in given]
    return exact, [Walk(simulation.module, x) for x in given]


def solve_weights(simulation: Network, batches: "Sequence[Batch]" = ()) -> list[str]:
    """Find the codes of every weight; the quantized network then holds their values. What was done beside, in words.

    batches   what solvers that need moments are fitted to; without any, and for weights without moments, these round to
              nearest. `spec.solve` of a weight's quantizer says what it really got
    """
    waits = False
    for name, (site, quantizer) in simulation.constants().items():
        if site.spec.format is None:  # pruned, and stored in float
            continue
        weight, solve = simulation.parameter(name), site.spec.solve
        quantizer.store(SOLVERS[solve](weight, site.spec, None))
        if solve in NEED_MOMENTS:
            quantizer.spec, waits = replace(site.spec, solve="nearest"), True
    if waits and batches:
        with simulation.mode("quantize"):
            return solve_in_step(simulation, *both_walks(simulation, batches))
    return []


def solve_in_step(
    simulation: Network, exact: Sequence[Walk], quantized: Sequence[Walk], nodes: Iterable[fx.Node] | None = None
) -> list[str]:
    """Take batches through the network, or these nodes of it; each weight whose solver needs moments gets its codes.

    Scales under which a bias would not fit are raised at once: layers behind would be fitted to a bias that is cut.
    """
    notes: list[str] = []
    biases = {site.product[1]: site.value for site in simulation.placement.sites.values() if site.product is not None}
    specs = {name: site.spec for name, (site, _) in simulation.constants().items() if site.spec.solve in NEED_MOMENTS}
    for name, moments in moments_in_step(exact, quantized, specs, nodes):
        _, quantizer = simulation.constants()[name]
        quantizer.spec = specs[name]
        quantizer.store(SOLVERS[quantizer.spec.solve](simulation.parameter(name), quantizer.spec, moments))
        notes += widen_scales_for_biases(simulation, [name])
        for walk in quantized if biases.get(name) in simulation.nodes else ():
            walk.renew(simulation.nodes[biases[name]])
    return notes


def solve_alone(
    simulation: Network, batches: "Sequence[Batch]", specs: Mapping[str, Sequence[TensorSpec]]
) -> dict[str, list[QuantTensor]]:
    """Codes of each weight by several specs, as if no other tensor were quantized; nothing is stored."""
    found = {
        name: [SOLVERS[spec.solve](simulation.parameter(name), spec, None) for spec in several]
        for name, several in specs.items()
    }
    asking = {name for name, several in specs.items() if any(spec.solve in NEED_MOMENTS for spec in several)}
    if asking and batches:
        with simulation.mode("off"):
            for name, moments in moments_in_step(*both_walks(simulation, batches), asking):
                weight = simulation.parameter(name)
                found[name] = [SOLVERS[spec.solve](weight, spec, moments) for spec in specs[name]]
    return found
