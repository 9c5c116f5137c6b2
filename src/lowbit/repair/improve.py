"""A step must prove itself: it stays only if the outputs come closer to float on samples that it was not fitted to."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from lowbit.network.calibrate import Batch, forward
from lowbit.network.network import Network

Outputs = list[dict[str, Tensor]]


def float_outputs(simulation: Network, batches: Sequence[Batch]) -> Outputs:
    """What the network computes in float with the parameters that it has now; steps that edit them come later."""
    with simulation.mode("off"):
        return [forward(simulation, batch) for batch in batches]


def output_error(simulation: Network, batches: Sequence[Batch], exact: Outputs) -> float:
    """Squared error of the quantized outputs relative to the power of the exact ones, averaged over the outputs.

    Where the exact output is infinite there is nothing to compare; where only the quantized one is, its power is lost.
    """
    noise: dict[str, float] = {}
    power: dict[str, float] = {}
    with simulation.mode("quantize"):
        for batch, wanted in zip(batches, exact, strict=True):
            for name, y in forward(simulation, batch).items():
                if y.is_floating_point():
                    known, x = wanted[name].isfinite(), wanted[name]
                    off = torch.where(y.isfinite(), y - x, x)[known]
                    noise[name] = noise.get(name, 0.0) + float(off.double().square().sum())
                    power[name] = power.get(name, 0.0) + float(x[known].double().square().sum())
    return sum(noise[n] / max(power[n], 1e-30) for n in noise) / max(1, len(noise))


def keep_if_better(
    simulation: Network, step: Callable[[], list[str]], batches: Sequence[Batch], exact: Outputs
) -> tuple[list[str], float]:
    """Run a step that edits vectors, of any rank; undo it unless the error on these batches fell.

    step     edits parameters in place, and says what it did
    return   what was done, in words; the error that the outputs now have
    """
    vectors = {name: p for name, p in simulation.module.named_parameters() if p.numel() == max(p.shape, default=1)}
    saved = {name: p.detach().clone() for name, p in vectors.items()}
    before = output_error(simulation, batches, exact)
    done = step()
    after = output_error(simulation, batches, exact)
    if after < before:
        return [*done, f"kept: squared error of the outputs {before:.3g} → {after:.3g} of their power"], after
    with torch.no_grad():
        for name, value in saved.items():
            vectors[name].copy_(value)
    said = f"undone: {'; '.join(done)}; squared error of the outputs {before:.3g} → {after:.3g} of their power"
    return [said], before
