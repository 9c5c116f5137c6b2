"""Leave the most sensitive layers in float, where the quantized outputs are too far from the float ones.

Most networks never need it: the error of their outputs on the judging samples is below `TOLERANCE`. Ranges and biases
are not fitted to these samples, but the layers are chosen on them. The backward passes of `repair.sensitivity` estimate
what each quantizer adds to the error; an integer program (`repair.wider`) chooses the layers; then the network is
placed anew.
"""

from lowbit.network.network import Network
from lowbit.network.place import place
from lowbit.numerics.noise import decibels
from lowbit.repair.prove import Calibration, fit
from lowbit.repair.sensitivity import quantizer_costs
from lowbit.repair.wider import fewest_in_float, literal

TOLERANCE = 0.02  # squared error of the outputs, relative to their power: 17 dB
ROUNDS = 4


def leave_in_float(network: Network, calibration: Calibration) -> list[str]:
    """Place the network with more and more layers in float, until it is good enough; the best is kept."""
    notes: list[str] = []
    if (target := network.placement.target).whole:
        return [f"no layer left in float: target '{target.name}' computes everything in integers"]
    best, undo, kept = calibration.error, network.undo(), 0
    for _ in range(ROUNDS):
        recipe, error = network.placement.recipe, calibration.error
        if error <= TOLERANCE:
            break
        costs = quantizer_costs(network, calibration.single or calibration.judging)
        layers = fewest_in_float(network, costs, TOLERANCE / error / 2)
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
    return f"{decibels(error):.1f} dB"
