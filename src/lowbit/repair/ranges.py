"""Which range for which activation: the one whose error reaches the outputs least, judged without labels.

A rounding error δ in an activation x changes the outputs y by J δ, to first order. For random signs v,
E (vᵀ J δ)² = |J δ|², and vᵀ J is one backward pass. So a few backward passes over a few samples estimate the error
of every candidate of every tensor at once. Quantizing one tensor at a time would take a forward pass for each.
It is the Hutchinson estimator (1990); with a projection of each of 64 samples its spread is about √(2/64) = 18 %.

Other losses need other v (`repair.projections`). With the probabilities p of the outputs, cross-entropy against the
float network's own answers grows by ½ (J δ)ᵀ (diag p − p pᵀ) (J δ), to second order; a v of that covariance
estimates it.

First order holds for small errors only: where a candidate clips the one large channel that a LayerNorm divides by, the
gradient sees nothing. A candidate whose squared error in the tensor itself is over 4 times the least is therefore out.
(MiniLM, its 200 calibration sentences: outputs at 16.5 dB without this bound.)
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor, nn

from lowbit.engines.compile import Batch
from lowbit.errors import DataError
from lowbit.network.calibrate import tensors
from lowbit.network.network import Network
from lowbit.network.quantizers import FakeQuant, Quantizer, as_stored, fake_quantize
from lowbit.numerics import Int, scale_and_zero
from lowbit.numerics.kernels import kernels
from lowbit.numerics.noise import SquaredError
from lowbit.ranges import LOSSES, Auto, Range
from lowbit.ranges.extremes import Bounds
from lowbit.repair.projections import projections

LARGEST_LOCAL_ERROR = 4.0  # relative to the least among the candidates


def choose_ranges(simulation: Network, batches: Sequence[Batch]) -> None:
    """Scale and zero of every activation from what was observed; `Auto` becomes its best candidate.

    batches   a few samples, to judge the candidates by
    """
    static = {n: q for n, q in simulation.activations().items() if not q.dynamic}
    undecided = {n: q for n, q in static.items() if isinstance(q.spec.range, Auto)}
    tried = {name: _candidates(q, name) for name, q in undecided.items()}
    open_questions = {name: candidates for name, candidates in tried.items() if len(candidates) > 1}
    errors: dict[str, Tensor | None] = {}
    for loss in LOSSES:
        asked = {n: list(c.values()) for n, c in open_questions.items() if _loss(undecided[n]) == loss}
        errors |= output_errors(simulation, asked, batches, loss) if asked else {}
    for name, quantizer in undecided.items():
        costs = errors.get(name)
        best = 0 if costs is None else int(costs.argmin())
        if costs is not None or len(tried[name]) == 1:
            quantizer.spec = replace(quantizer.spec, range=list(tried[name])[best])
    for name, quantizer in static.items():
        chosen = quantizer.spec.range
        known = tried.get(name, {}).get(chosen)
        scale, zero = known or scale_and_zero(*_bounds(quantizer, chosen, name), quantizer.format)
        quantizer.set_parameters(scale.reshape(()), zero.reshape(()))


ScaleAndZero = tuple[Tensor, Tensor]


def _loss(quantizer: FakeQuant) -> str:
    assert isinstance(quantizer.spec.range, Auto)
    return quantizer.spec.range.loss


def _candidates(quantizer: FakeQuant, name: str) -> dict[Range, ScaleAndZero]:
    assert isinstance(quantizer.spec.range, Auto)
    noise = SquaredError(*quantizer.statistics.points(), quantizer.grid)
    found = {c: scale_and_zero(*_bounds(quantizer, c, name), quantizer.format) for c in quantizer.spec.range.candidates}
    local = {candidate: float(noise(*chosen)) for candidate, chosen in found.items()}
    near = {c: found[c] for c in found if local[c] <= LARGEST_LOCAL_ERROR * min(local.values())}
    distinct = {(float(scale), float(zero)): candidate for candidate, (scale, zero) in reversed(near.items())}
    return {candidate: near[candidate] for candidate in near if candidate in distinct.values()}


def _bounds(quantizer: FakeQuant, range: Range, name: str) -> Bounds:
    try:
        return range.bounds(quantizer.statistics, quantizer.format)
    except DataError as error:
        raise DataError(f"'{name}': {error}") from None


def quantizer_costs(simulation: Network, batches: Sequence[Batch]) -> dict[str, float]:
    """Squared error that each quantizer alone adds to the outputs as it is set now: activations by group, weights."""
    quantizers = simulation.activations() | {name: q for name, (_, q) in simulation.constants().items()}
    errors = output_errors(simulation, dict.fromkeys(quantizers, ()), batches)
    return {name: float(cost[0]) for name, cost in errors.items() if cost is not None}


def output_errors(
    simulation: Network,
    tried: Mapping[str, Sequence[ScaleAndZero]],
    batches: Sequence[Batch],
    loss: str = "squares",
) -> dict[str, Tensor | None]:
    """What each candidate adds to the loss of the outputs, to the first order at which it moves them.

    tried    group or constant → its candidates; none: as its quantizer is set now
    return   group → (candidates,) ; None where no gradient reaches the tensor (an operator outside the table is behind
             it)

    An error is computed when its gradient arrives and is let go at once: memory holds one batch's activations.
    """
    generator = torch.Generator().manual_seed(0)
    constants = simulation.constants()
    quantizers = {name: q for name in tried if isinstance(q := simulation.quantizers[name], Quantizer)}
    total: dict[str, Tensor | None] = dict.fromkeys(tried)
    moved = _moved(simulation)

    def arrived(name: str, x: Tensor, gradient: Tensor) -> None:
        samples = 1 if name in constants or not x.dim() else len(x)
        seen = _squared_projections(quantizers[name], x, gradient, tried[name], samples)
        total[name] = seen if (before := total[name]) is None else before + seen

    def estimate(batch: Batch) -> None:
        with simulation.mode("probe", quantizers.values()):
            outputs = [y for y in simulation.module(*tensors(simulation, batch)).values() if y.requires_grad]
        probes = [(name, x) for name, q in quantizers.items() for x in _new(q.take_probes(), moved[q])]
        for name, x in probes:
            x.register_hook(partial(arrived, name, x.detach()))  # type: ignore[no-untyped-call]
        leaves = [x for _, x in probes if x.is_leaf]
        if outputs:
            torch.autograd.backward(outputs, projections(outputs, generator, loss), inputs=leaves)

    with _frozen(simulation.module):
        for batch in batches:
            estimate(batch)
    return total


def _squared_projections(
    quantizer: Quantizer, x: Tensor, gradient: Tensor, tried: Sequence[ScaleAndZero], samples: int
) -> Tensor:
    """Σ over samples of (vᵀ J δ)² for each candidate's δ; tried: none is as the quantizer is set now."""
    kind, grid = quantizer.format, quantizer.format.grid
    with torch.no_grad():
        rows, along = (as_stored(t, x).reshape(samples, -1) for t in (x, gradient))
        scalars = all(scale.numel() == 1 for scale, _ in tried)
        if tried and scalars and isinstance(grid, Int) and kind.rounding == "nearest":
            scales, zeros = (torch.stack([p[i].reshape(()) for p in tried]) for i in (0, 1))
            errors = kernels(x).error_along(rows.contiguous(), along.contiguous(), scales, zeros, grid)
            return errors.square().sum(0)
        rounded = (fake_quantize(x, kind, *p) for p in tried) if tried else iter([quantizer.rounded(x)])
        dots = [torch.linalg.vecdot(along, as_stored(y - x, x).reshape(samples, -1)) for y in rounded]
        return torch.stack([dot.double().square().sum() for dot in dots])


def _moved(simulation: Network) -> dict[nn.Module, list[bool]]:
    """For each call of a quantizer: whether its input was only moved since the same one rounded it (MaxPool, Concat).

    Rounding it again changes nothing, so such a call adds no error of its own.
    """
    found: dict[nn.Module, list[bool]] = {}
    for node in simulation.module.graph.nodes:
        if node.op == "call_module" and "quantized_value" in node.meta:
            (source,) = node.all_input_nodes
            again = any(n.op == "call_module" and n.target == node.target for n in source.all_input_nodes)
            found.setdefault(simulation.module.get_submodule(str(node.target)), []).append(again)
    return found


def _new(probes: list[Tensor], moved: Sequence[bool]) -> list[Tensor]:
    return [x for x, again in zip(probes, moved, strict=False) if not again]


@contextmanager
def _frozen(module: nn.Module) -> Iterator[None]:
    """No parameter asks for a gradient: the graph then starts at the first probes, and holds only what these need."""
    asking = [p for p in module.parameters() if p.requires_grad]
    for parameter in asking:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in asking:
            parameter.requires_grad_(True)
