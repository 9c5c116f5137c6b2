"""When int8 costs too much, leave the layers in float that cost most, and say so.

Most networks never come here: their outputs stay within `TOLERANCE` of float on samples that nothing was fitted to.
Where they do not (depthwise detectors with SiLU, for one), the backward passes of `flows.ranges` price every quantizer
at once, the dearest values lose theirs, and the network is placed anew: a file that does its job more slowly beats one
that does not.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from math import log10

import onnx_ir as ir

from lowbit.flows.calibrate import Batch
from lowbit.flows.improve import Outputs, output_error
from lowbit.flows.ranges import quantizer_costs
from lowbit.recipe import Recipe
from lowbit.simulate.fakequant import FakeQuant, Simulation
from lowbit.simulate.place import place
from lowbit.simulate.sites import Placement

TOLERANCE = 0.02  # squared error of the outputs, relative to their power: 17 dB
ROUNDS = 4


def protect(
    simulation: Simulation,
    recipe: Recipe,
    settle: Callable[[Simulation], list[str]],
    judging: Sequence[Batch],
    exact: Outputs,
) -> tuple[Simulation, Recipe, list[str]]:
    """The simulation as it is, or one with the costliest layers in float; the recipe that says so; and what was done.

    settle   finds codes, ranges and biases of a simulation that has observed, and says what it did
    exact    the float outputs for the judging batches
    """
    notes: list[str] = []
    for _ in range(ROUNDS):
        error = output_error(simulation, judging, exact)
        if error <= TOLERANCE:
            break
        layers = _costliest(simulation, judging, error)
        if not layers:
            break
        recipe = recipe.keep_float(*(_literal(name) for name in layers))
        notes.append(f"outputs at {-10 * log10(error):.1f} dB: left in float, as they cost most: {', '.join(layers)}")
        simulation = _placed_again(simulation, recipe)
        notes += settle(simulation)
    return simulation, recipe, notes


def _literal(name: str) -> str:
    """A glob that matches this name only."""
    return "".join(f"[{c}]" if c in "[*?" else c for c in name)


def _costliest(simulation: Simulation, batches: Sequence[Batch], error: float) -> list[str]:
    """The layers around the quantizers that together cost all but half of what is tolerated."""
    costs = quantizer_costs(simulation, batches)
    total, left = sum(costs.values()), sum(costs.values())
    layers: dict[str, None] = {}
    for name in sorted(costs, key=costs.__getitem__, reverse=True):
        if left <= total * TOLERANCE / error / 2 or not total:
            break
        left -= costs[name]
        layers |= dict.fromkeys(_around(simulation.program, simulation.placement, name))
    return list(layers)


def _around(program: ir.Model, placement: Placement, name: str) -> list[str]:
    """Nodes that would quantize this value (or any that shares its scale) again if they stayed in integers."""
    values = {s.value for s in placement.sites.values() if name in (s.value, s.group)}
    return [
        str(node.name)
        for node in program.graph
        if any(v is not None and v.name in values for v in (*node.inputs, *node.outputs))
    ]


def _placed_again(simulation: Simulation, recipe: Recipe) -> Simulation:
    """A new simulation under another recipe, with what the old one has observed."""
    renewed = Simulation(simulation.program, place(simulation.program, recipe))
    for quantizer in renewed.activations().values():
        known = next(q for v in quantizer.values if isinstance(q := simulation.quantizers.get(v), FakeQuant))
        quantizer.statistics = known.statistics
        quantizer.spec = replace(quantizer.spec, range=known.spec.range)
    return renewed
