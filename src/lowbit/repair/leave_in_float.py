"""Leave the most sensitive layers in float, where the quantized outputs are too far from the float ones.

Most networks never need it: the error of their outputs on the judging samples is below `TOLERANCE`. Ranges and biases
are not fitted to these samples, but the layers are chosen on them. The backward passes of `repair.ranges` estimate what
each quantizer adds to the error; the layers around those that add most stay in float; then the network is placed anew.
"""

from math import log10

import onnx_ir as ir

from lowbit.network.network import Network
from lowbit.network.place import place
from lowbit.network.sites import Placement
from lowbit.repair.prove import Calibration, fit
from lowbit.repair.sensitivity import quantizer_costs
from lowbit.targets import Role, Target, find_target

TOLERANCE = 0.02  # squared error of the outputs, relative to their power: 17 dB
ROUNDS = 4


def leave_in_float(network: Network, calibration: Calibration) -> list[str]:
    """Place the network with more and more layers in float, until it is good enough; the best is kept."""
    notes: list[str] = []
    best, undo, kept = calibration.error, network.undo(), 0
    for _ in range(ROUNDS):
        recipe, error = network.placement.recipe, calibration.error
        if error <= TOLERANCE or recipe is None:
            break
        layers = _costliest(network, calibration, find_target(recipe.target))
        if not layers:
            break
        placement = place(network.program, recipe.keep_float(*(_literal(name) for name in layers)))
        if not placement.sites:
            notes.append(f"outputs at {_db(error)}: left as they are, or nothing would be quantized")
            break
        notes.append(f"outputs at {_db(error)}: left in float, as they cost most: {', '.join(layers)}")
        network.place_again(placement)
        notes += fit(network, calibration)
        if calibration.error < best:
            best, undo, kept = calibration.error, network.undo(), len(notes)
    if len(notes) > kept:
        undo()
        calibration.error = best
        notes.append(f"taken back, as it did not help: what was done after {_db(best)} were reached")
    return notes


def _db(error: float) -> str:
    return f"{-10 * log10(error):.1f} dB"


def _literal(name: str) -> str:
    """A glob that matches this name only."""
    return "".join(f"[{c}]" if c in "[*?" else c for c in name)


def _costliest(network: Network, calibration: Calibration, target: Target) -> list[str]:
    """The layers around the quantizers that together cost all but half of what is tolerated."""
    costs, most = quantizer_costs(network, calibration.judging), TOLERANCE / calibration.error / 2
    total, left = sum(costs.values()), sum(costs.values())
    layers: dict[str, None] = {}
    for name in sorted(costs, key=costs.__getitem__, reverse=True):
        if left <= total * most or not total:
            break
        left -= costs[name]
        layers |= dict.fromkeys(_around(network.program, network.placement, name, target))
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
