"""A step must prove itself: it stays only if the outputs come closer to float on samples that it was not fitted to."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from itertools import zip_longest

import numpy as np
import torch
from torch import Tensor

from lowbit.engines.compile import Batch
from lowbit.network.calibrate import forward, observe, solve_weights
from lowbit.network.network import Network
from lowbit.network.widen_scales import widen_scales_for_biases
from lowbit.recipe import Recipe
from lowbit.repair.projections import projections
from lowbit.repair.ranges import choose_ranges

Outputs = list[dict[str, Tensor]]
DRAWS = 16  # random projections of each batch's outputs, which estimate a loss


@dataclass
class Calibration:
    """The samples that a network is calibrated with, in batches, and how far it has come.

    fitting    what ranges are fitted to
    together   those of them that go through the network at once, exactly and quantized, layer by layer
    judging    what steps are judged by; exact: the float outputs for them
    observed   gives all that are in memory, for quantizers that a step adds
    stage      told what begins
    single     some of the fitting samples one by one, which sensitivities are estimated on; none: the judging ones are
    error      squared error of the outputs on the judging samples now, relative to their power
    earlier    the steps so far, which are taken again when the network is placed anew

    judging_labels, single_labels   of each of these batches, where the data has labels
    again, seconds    the network that another recipe makes of the float one, with what it observes; the time that a
                      network's file takes for a sample, by the engine's profile
    made_up_signals   some inputs are numbers that nobody measured: their means say nothing
    """

    fitting: Sequence[Batch]
    together: Sequence[Batch]
    judging: Sequence[Batch]
    exact: Outputs
    observed: Callable[[], Iterable[Batch]]
    stage: Callable[[str], object] = lambda _: None
    single: Sequence[Batch] = ()
    error: float = 0.0
    earlier: list["Step"] = field(default_factory=list)
    judging_labels: Sequence[np.ndarray] = ()
    single_labels: Sequence[np.ndarray] = ()
    made_up_signals: bool = False
    again: Callable[[Recipe], Network] | None = None
    seconds: Callable[[Network, Batch], float] | None = None


# Changes the network in place and says in words what it did; an empty list: nothing.
Step = Callable[[Network, Calibration], list[str]]


class LeftOut(Exception):  # noqa: N818  told in the notes, no error
    """Raised by a step, before it changes anything, where it cannot do its work: says why."""


def fit(network: Network, calibration: Calibration) -> list[str]:
    """Ranges and codes for a network that has observed; then the steps so far. What was done, in words."""
    new = [q for q in network.activations().values() if not (q.dynamic or q.statistics.count)]
    if new:  # values that get a quantizer because a layer beside them lost its own
        observe(network, calibration.observed(), new)
    calibration.stage("choosing ranges")
    choose_ranges(network, calibration.fitting)
    calibration.stage("solving weights")
    notes = solve_weights(network, calibration.together) + widen_scales_for_biases(network)
    if calibration.exact:
        calibration.error = output_error(network, calibration.judging, calibration.exact)
    return notes + [line for step in calibration.earlier for line in prove(network, step, calibration)]


def prove(network: Network, step: Step, calibration: Calibration) -> list[str]:
    """Take a step; undo it as a whole unless the error of the outputs fell. What was done, in words."""
    before, undo = calibration.error, network.undo()
    try:
        done = step(network, calibration)
    except LeftOut as why:
        return [f"left out: {why}"]
    if not done:
        return []
    calibration.error = output_error(network, calibration.judging, calibration.exact)
    change = f"squared error of the outputs {before:.3g} → {calibration.error:.3g} of their power"
    if calibration.error < before:
        return [*done, f"kept: {change}"]
    undo()
    calibration.error = before
    return [f"undone: {'; '.join(done)}; {change}"]


def float_outputs(network: Network, batches: Sequence[Batch]) -> Outputs:
    """What the network computes in float with the parameters that it has now; steps that edit them come later."""
    with network.mode("off"):
        return [forward(network, batch) for batch in batches]


def output_error(network: Network, batches: Sequence[Batch], exact: Outputs) -> float:
    """Squared error of the quantized outputs relative to the power of the exact ones, averaged over the outputs.

    Where the exact output is infinite there is nothing to compare; where only the quantized one is, its power is lost.
    """
    noise: dict[str, float] = {}
    power: dict[str, float] = {}
    with network.mode("quantize"):
        for batch, wanted in zip(batches, exact, strict=True):
            for name, y in forward(network, batch).items():
                if y.is_floating_point():
                    known, x = wanted[name].isfinite(), wanted[name]
                    off = torch.where(y.isfinite(), y - x, x)[known]
                    noise[name] = noise.get(name, 0.0) + float(off.double().square().sum())
                    power[name] = power.get(name, 0.0) + float(x[known].double().square().sum())
    return sum(noise[n] / max(power[n], 1e-30) for n in noise) / max(1, len(noise))


def judging_error(network: Network, calibration: Calibration, exact: Outputs, loss: str) -> float:
    """What the quantized outputs lose on the judging samples, in the unit of `output_errors`; exact: without.

    Of "squares" it is `output_error`; else the mean over samples of the loss's second order, as it is predicted.
    """
    if loss == "squares":
        return output_error(network, calibration.judging, exact)
    generator, total, samples = torch.Generator().manual_seed(0), 0.0, 0
    with network.mode("quantize"):
        for batch, wanted, known in zip_longest(calibration.judging, exact, calibration.judging_labels):
            floats = {name: y for name, y in wanted.items() if y.is_floating_point()}
            rough = forward(network, batch)
            for _ in range(DRAWS):
                for name, v in projections(floats, generator, loss, known).items():
                    change = v * (rough[name] - floats[name])
                    total += float(change.flatten(1).sum(1).square().sum() if v.dim() > 1 else change.square().sum())
            samples += max((len(wanted[name]) for name in floats if wanted[name].dim()), default=1)
    return total / (DRAWS * samples)
