"""Leave the most sensitive layers in float, where the quantized outputs are too far from the float ones.

Most networks never need it: the error of their outputs on the judging samples is below `TOLERANCE`. Ranges and biases
are not fitted to these samples, but the layers are chosen on them. The backward passes of `repair.ranges` estimate what
each quantizer adds to the error; the layers around those that add most stay in float; then the network is placed anew.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from math import log10

import onnx_ir as ir

from lowbit.network.calibrate import Batch
from lowbit.network.network import Network
from lowbit.network.place import place
from lowbit.network.quantizers import FakeQuant
from lowbit.network.sites import Placement
from lowbit.recipe import Recipe
from lowbit.repair.ranges import quantizer_costs
from lowbit.targets import Role, Target, find_target

TOLERANCE = 0.02  # squared error of the outputs, relative to their power: 17 dB
ROUNDS = 4


def leave_in_float(
    simulation: Network,
    recipe: Recipe,
    error: float,
    refit: Callable[[Network], tuple[list[str], float]],
    judging: Sequence[Batch],
) -> tuple[Network, Recipe, list[str]]:
    """The simulation as it is, or the best of some with layers in float; its recipe; and what was done, in words.

    error   squared error of the outputs, relative to their power
    refit   finds codes, ranges and biases of a simulation that has observed; what it did, and the error then
    """
    notes: list[str] = []
    best = error, simulation, recipe, 0
    for _ in range(ROUNDS):
        if error <= TOLERANCE:
            break
        layers = _costliest(simulation, judging, error, find_target(recipe.target))
        if not layers:
            break
        recipe = recipe.keep_float(*(_literal(name) for name in layers))
        notes.append(f"outputs at {-10 * log10(error):.1f} dB: left in float, as they cost most: {', '.join(layers)}")
        placement = place(simulation.program, recipe)
        if not placement.sites:
            notes[-1:] = [f"outputs at {-10 * log10(error):.1f} dB: left as they are, or nothing would be quantized"]
            break
        simulation = _placed_again(simulation, placement)
        said, error = refit(simulation)
        notes += said
        if error < best[0]:
            best = error, simulation, recipe, len(notes)
    if best[1] is not simulation:
        notes.append(f"taken back, as it did not help: what was done after {-10 * log10(best[0]):.1f} dB were reached")
    return best[1], best[2], notes


def _literal(name: str) -> str:
    """A glob that matches this name only."""
    return "".join(f"[{c}]" if c in "[*?" else c for c in name)


def _costliest(simulation: Network, batches: Sequence[Batch], error: float, target: Target) -> list[str]:
    """The layers around the quantizers that together cost all but half of what is tolerated."""
    costs = quantizer_costs(simulation, batches)
    total, left = sum(costs.values()), sum(costs.values())
    layers: dict[str, None] = {}
    for name in sorted(costs, key=costs.__getitem__, reverse=True):
        if left <= total * TOLERANCE / error / 2 or not total:
            break
        left -= costs[name]
        layers |= dict.fromkeys(_around(simulation.program, simulation.placement, name, target))
    return list(layers)


def _around(program: ir.Model, placement: Placement, name: str, target: Target) -> list[str]:
    """Nodes that would quantize this value (or any that shares its scale) again if they stayed in integers.

    Where a clip makes the value, what computes before it is one of them: a kernel does both at once.
    """
    values = {s.value for s in placement.sites.values() if name in (s.value, s.group)}
    found: dict[str, None] = {}
    for node in program.graph:
        if any(v is not None and v.name in values for v in (*node.inputs, *node.outputs)):
            before = node.inputs[0].producer() if node.inputs and node.inputs[0] is not None else None
            makes = any(v.name in values for v in node.outputs)
            if makes and before is not None and target.kernels.get(node.op_type) is Role.ABSORB:
                found[str(before.name)] = None
            found[str(node.name)] = None
    return list(found)


def _placed_again(simulation: Network, placement: Placement) -> Network:
    """A new simulation under another placement, with what the old one has observed."""
    renewed = Network(simulation.program, placement)
    for quantizer in renewed.activations().values():
        known = next((q for v in quantizer.values if isinstance(q := simulation.quantizers.get(v), FakeQuant)), None)
        if known is not None:
            quantizer.statistics = known.statistics
            quantizer.spec = replace(quantizer.spec, range=known.spec.range)
    return renewed
