"""Leave the most sensitive layers in float, where the quantized outputs are too far from the float ones.

Most networks never need it: the error of their outputs on the judging samples is below `TOLERANCE`. Ranges and biases
are not fitted to these samples, but the layers are chosen on them. The backward passes of `repair.sensitivity` estimate
what each quantizer adds to the error; an integer program (`solve.program`) chooses the layers; then the network is
placed anew.
"""

from collections.abc import Iterable, Sequence
from math import log10

import onnx_ir as ir

from lowbit.engines.compile import Batch
from lowbit.network.idle_rules import computes
from lowbit.network.network import Network
from lowbit.network.place import place
from lowbit.network.sites import Placement
from lowbit.repair.prove import Calibration, fit
from lowbit.repair.sensitivity import quantizer_costs
from lowbit.solve.program import Between, Option, Program
from lowbit.targets import Role, Target, find_target

TOLERANCE = 0.02  # squared error of the outputs, relative to their power: 17 dB
ROUNDS = 4


def leave_in_float(network: Network, calibration: Calibration) -> list[str]:
    """Place the network with more and more layers in float, until it is good enough; the best is kept."""
    notes: list[str] = []
    recipe = network.placement.recipe
    if recipe is not None and find_target(recipe.target).whole:
        return [f"no layer left in float: target '{recipe.target}' computes everything in integers"]
    best, undo, kept = calibration.error, network.undo(), 0
    for _ in range(ROUNDS):
        recipe, error = network.placement.recipe, calibration.error
        if error <= TOLERANCE or recipe is None:
            break
        layers = fewest_in_float(network, calibration.single or calibration.judging, TOLERANCE / error / 2)
        if not layers:
            break
        placement = place(network.program, recipe.keep_float(*(literal(name) for name in layers)))
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


def fewest_in_float(network: Network, batches: Sequence[Batch], share: float) -> list[str]:
    """The fewest layers that, left in float, leave at most this share of the error that the network has now.

    batches   samples by which the error is estimated, to first order (`repair.sensitivity`)
    return    names; none where nothing is to be gained. `recipe.keep_float(*map(literal, names))` leaves them in float

    A value stays quantized while a layer around it is in integers, so the choice is an integer program.
    """
    recipe = network.placement.recipe
    if recipe is None:
        return []
    target, costs = find_target(recipe.target), quantizer_costs(network, batches)
    beside = {name: layers_around(network.program, network.placement, name, target) for name in costs}
    losses = _losses(network, dict.fromkeys(layer for layers in beside.values() for layer in layers))
    options = {layer: (Option({}), Option({"loss": loss}, in_float=True)) for layer, loss in losses.items()}
    program = Program(options, [Between({"error": cost}, beside[name]) for name, cost in costs.items()])
    chosen = program.least("loss", {"error": share * sum(costs.values())})
    return [layer for layer, index in (chosen or {}).items() if index]


def _losses(network: Network, layers: Iterable[str]) -> dict[str, float]:
    """Layer → what float costs there: its share of the integer layers, for their time, and of the weights' bytes."""
    sizes: dict[str, float] = dict.fromkeys(layers, 0.0)
    for name, (site, _) in network.constants().items():
        sizes[site.layer] = sizes.get(site.layer, 0.0) + network.parameter(name).numel()
    integer, total = network.placement.integer, max(1.0, sum(sizes.values()))
    return {layer: (layer in integer) / max(1, len(integer)) + size / total for layer, size in sizes.items()}


def layers_around(program: ir.Model, placement: Placement, name: str, target: Target) -> list[str]:
    """Layers that would quantize this value (or any that shares its scale) again if they stayed in integers.

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
    in_float = placement.float_reasons  # already, as the Sigmoid and the Mul of a SiLU
    return [str(n.name) for n in program.graph if n.name in found and n.name not in in_float and computes(n, target)]
