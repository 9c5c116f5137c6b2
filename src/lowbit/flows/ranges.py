"""Which range for which activation: the one whose error reaches the outputs least, judged without labels.

A rounding error δ in an activation x changes the outputs y by J δ, to first order. For random signs v,
E (vᵀ J δ)² = |J δ|², and vᵀ J is one backward pass. So a few backward passes over a few samples price every candidate
of every tensor at once, where quantizing one tensor at a time would take a forward pass for each.
The estimator is Hutchinson's (1990); with 2 projections of 32 samples its spread is about √(2/64) = 18 %.

Other losses need other v (`flows.projections`). With the probabilities p of the outputs, cross-entropy against the float
network's own answers grows by ½ (J δ)ᵀ (diag p − p pᵀ) (J δ), to second order; a v of that covariance prices it.

First order holds for small errors only: where a candidate clips the one large channel that a LayerNorm divides by, the
gradient sees nothing. A candidate whose squared error in the tensor itself is over 4 times the least is therefore out.
(MiniLM, its 200 calibration sentences: outputs at 16.5 dB without this bound.)
"""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor, nn

from lowbit.errors import DataError
from lowbit.flows.calibrate import Batch
from lowbit.flows.projections import projections
from lowbit.numerics import scale_and_zero
from lowbit.numerics.noise import SquaredError
from lowbit.ranges import LOSSES, Auto, Range
from lowbit.simulate.fakequant import FakeQuant, Simulation, fake_quantize

PROJECTIONS = 2
LARGEST_LOCAL_ERROR = 4.0  # relative to the least among the candidates


def choose_ranges(simulation: Simulation, batches: Sequence[Batch]) -> None:
    """Scale and zero of every activation from what was observed; `Auto` becomes its best candidate.

    batches   a few samples, to judge the candidates by
    """
    static = {n: q for n, q in simulation.activations().items() if not q.dynamic}
    undecided = {n: q for n, q in static.items() if isinstance(q.spec.range, Auto)}
    tried = {name: _candidates(q, name) for name, q in undecided.items()}
    open_questions = {name: candidates for name, candidates in tried.items() if len(candidates) > 1}
    errors: dict[str, Tensor | None] = {}
    for loss in LOSSES:
        asked = {name: c for name, c in open_questions.items() if _loss(undecided[name]) == loss}
        errors |= output_errors(simulation, asked, batches, loss) if asked else {}
    for name, quantizer in undecided.items():
        costs = errors.get(name)
        best = 0 if costs is None else int(costs.argmin())
        if costs is not None or len(tried[name]) == 1:
            quantizer.spec = replace(quantizer.spec, range=list(tried[name])[best])
    for name, quantizer in static.items():
        _set(quantizer, *_bounds(quantizer, quantizer.spec.range, name))


Parameters = tuple[Tensor, Tensor]


def _loss(quantizer: FakeQuant) -> str:
    assert isinstance(quantizer.spec.range, Auto)
    return quantizer.spec.range.loss


def _candidates(quantizer: FakeQuant, name: str) -> dict[Range, Parameters]:
    assert isinstance(quantizer.spec.range, Auto)
    noise = SquaredError(*quantizer.statistics.points(), quantizer.grid)
    found = {c: scale_and_zero(*_bounds(quantizer, c, name), quantizer.format) for c in quantizer.spec.range.candidates}
    local = {candidate: float(noise(*parameters)) for candidate, parameters in found.items()}
    near = {c: found[c] for c in found if local[c] <= LARGEST_LOCAL_ERROR * min(local.values())}
    distinct = {(float(scale), float(zero)): candidate for candidate, (scale, zero) in reversed(near.items())}
    return {candidate: near[candidate] for candidate in near if candidate in distinct.values()}


def _bounds(quantizer: FakeQuant, range: Range, name: str) -> Parameters:
    try:
        return range.bounds(quantizer.statistics, quantizer.format)
    except DataError as error:
        raise DataError(f"'{name}': {error}") from None


def _set(quantizer: FakeQuant, lo: Tensor, hi: Tensor) -> None:
    scale, zero = scale_and_zero(lo, hi, quantizer.format)
    quantizer.set_parameters(scale.reshape(()), zero.reshape(()))


def quantizer_costs(simulation: Simulation, batches: Sequence[Batch]) -> dict[str, float]:
    """Squared error that each quantizer alone adds to the outputs as it is set now: activations by group, weights."""
    quantizers = simulation.activations() | {name: q for name, (_, q) in simulation.constants().items()}
    tried = {name: {q.spec.range: (q.scale, q.zero)} for name, q in quantizers.items()}
    errors = output_errors(simulation, tried, batches)
    return {name: float(cost[0]) for name, cost in errors.items() if cost is not None}


def output_errors(
    simulation: Simulation,
    tried: dict[str, dict[Range, Parameters]],
    batches: Sequence[Batch],
    loss: str = "squares",
) -> dict[str, Tensor | None]:
    """What each candidate adds to the loss of the outputs, to the first order at which it moves them.

    return   group → (candidates,) ; None where no gradient reaches the tensor (an operator outside the table is behind
             it)
    """
    generator = torch.Generator().manual_seed(0)
    total: dict[str, Tensor | None] = dict.fromkeys(tried)
    quantizers = {name: simulation.quantizers[name] for name in tried}
    for batch in batches:
        with simulation.mode("probe", [q for q in quantizers.values() if isinstance(q, FakeQuant)]):
            arrays = [
                torch.from_numpy(np.ascontiguousarray(batch[str(v.name)])) for v in simulation.program.graph.inputs
            ]
            outputs = [y for y in simulation.module(*arrays).values() if y.requires_grad]
        probes = {name: q.take_probes() for name, q in quantizers.items() if isinstance(q, FakeQuant)}
        if not outputs:
            continue
        noise = {
            name: [[_error(x, quantizers[name].format, p) for p in tried[name].values()] for x in found]
            for name, found in probes.items()
        }
        for step in range(PROJECTIONS):
            weights = projections(outputs, generator, loss)
            xs = [x for found in probes.values() for x in found]
            grads = iter(
                torch.autograd.grad(outputs, xs, weights, retain_graph=step < PROJECTIONS - 1, allow_unused=True)
            )
            for name, found in probes.items():
                pairs = [(g, noise[name][i], found[i]) for i in range(len(found)) if (g := next(grads)) is not None]
                if pairs:
                    seen = torch.stack([_reached(*pair) for pair in pairs]).sum(0)
                    total[name] = seen if (before := total[name]) is None else before + seen
    return total


def _error(x: Tensor, format: object, parameters: Parameters) -> Tensor:
    with torch.no_grad():
        return fake_quantize(x, format, *parameters) - x  # type: ignore[arg-type]


def _reached(gradient: Tensor, candidates: list[Tensor], x: Tensor) -> Tensor:
    """Σ over samples of (vᵀ J δ)² for each candidate's δ; a weight is one for all samples."""
    samples = gradient.shape[0] if gradient.dim() and not isinstance(x, nn.Parameter) else 1
    rows = gradient.reshape(samples, -1)
    return torch.stack([torch.linalg.vecdot(rows, d.reshape(samples, -1)).square().sum() for d in candidates])
