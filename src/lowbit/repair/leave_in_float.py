"""Leave the most sensitive layers in float, where the quantized outputs are too far from the float ones.

Most networks never need it: the error of their outputs on the judging samples is below `TOLERANCE`. Ranges and biases
are not fitted to these samples, but the layers are chosen on them. The backward passes of `repair.ranges` estimate what
each quantizer adds to the error; the layers around those that add most stay in float; then the network is placed anew.
"""

from collections.abc import Mapping
from math import log10

import onnx_ir as ir

from lowbit.graph.layer import layers_of
from lowbit.network.network import Network
from lowbit.network.place import place
from lowbit.repair.prove import Calibration, fit
from lowbit.repair.ranges import quantizer_costs
from lowbit.targets import COMPUTING, Role, find_target

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
        costs, share = quantizer_costs(network, calibration.judging), TOLERANCE / error / 2
        layers = list(dict.fromkeys(layer for name in costliest(costs, share) for layer in around(network, name)))
        if not layers:
            break
        placement = place(network.program, recipe.keep_float(*map(literal, layers)))
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


def literal(name: str) -> str:
    """A glob that matches this name only."""
    return "".join(f"[{c}]" if c in "[*?" else c for c in name)


def costliest(costs: Mapping[str, float], share: float) -> list[str]:
    """The quantizers that together cost all but this share, the costliest first."""
    total = left = sum(costs.values())
    found = []
    for name in sorted(costs, key=costs.__getitem__, reverse=True):
        if left <= total * share or not total:
            break
        left -= costs[name]
        found.append(name)
    return found


def around(network: Network, name: str) -> list[str]:
    """Layers that would quantize this value (or any that shares its scale) again if they stayed in integers.

    Where a clip makes the value, what computes before it is one of them: a kernel does both at once.
    """
    assert network.placement.recipe is not None
    kernels = find_target(network.placement.recipe.target).kernels
    values = {s.value for s in network.placement.sites.values() if name in (s.value, s.group)}
    found: dict[ir.Node, None] = {}
    for node in network.program.graph:
        if any(v is not None and v.name in values for v in (*node.inputs, *node.outputs)):
            before = node.inputs[0].producer() if node.inputs and node.inputs[0] is not None else None
            makes = any(v.name in values for v in node.outputs)
            if makes and before is not None and kernels.get(node.op_type) is Role.ABSORB:
                found[before] = None
            found[node] = None
    return [str(n.name) for n in found if kernels.get(n.op_type) in COMPUTING or any(layers_of(n))]
