"""Which range for which activation: the one whose error reaches the outputs least, judged without labels.

`repair.sensitivity` estimates the error of every candidate of every tensor at once. First order holds for small errors
only: where a candidate clips the one large channel that a LayerNorm divides by, the gradient sees nothing. A
candidate whose squared error in the tensor itself is over 4 times the least is therefore out.
(MiniLM, its 200 calibration sentences: outputs at 16.5 dB without this bound.)
"""

from collections.abc import Sequence
from dataclasses import replace

from torch import Tensor

from lowbit.engines.compile import Batch
from lowbit.errors import DataError
from lowbit.network.network import Network
from lowbit.network.quantizers import FakeQuant, fixed_grid
from lowbit.numerics import Format, scale_and_zero
from lowbit.numerics.noise import SquaredError
from lowbit.ranges import LOSSES, Auto, Range
from lowbit.repair.sensitivity import Rounding, output_errors

LARGEST_LOCAL_ERROR = 4.0  # relative to the least among the candidates


def choose_ranges(simulation: Network, batches: Sequence[Batch]) -> None:
    """Scale and zero of every activation from what was observed; `Auto` becomes its best candidate.

    batches   a few samples, to judge the candidates by
    """
    static = {n: q for n, q in simulation.activations().items() if not q.dynamic}
    undecided = {n: q for n, q in static.items() if isinstance(q.spec.range, Auto)}
    tried = {name: candidates(q, name) for name, q in undecided.items()}
    open_questions = {name: several for name, several in tried.items() if len(several) > 1}
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
        _, scale, zero = known or _candidate(quantizer, chosen, quantizer.format, name)
        quantizer.set_parameters(scale.reshape(()), zero.reshape(()))


def candidates(quantizer: FakeQuant, name: str, format: Format | None = None) -> dict[Range, Rounding]:
    """Range → what it makes of an activation that has observed, in its own format or another."""
    kind, asked = format or quantizer.format, quantizer.spec.range
    tried = asked.candidates if isinstance(asked, Auto) else (asked,)
    found = {c: _candidate(quantizer, c, kind, name) for c in tried}
    if len(found) == 1:
        return found
    noise = SquaredError(*quantizer.statistics.points(), fixed_grid(kind))
    local = {candidate: float(noise(*chosen[1:])) for candidate, chosen in found.items()}
    near = {c: found[c] for c in found if local[c] <= LARGEST_LOCAL_ERROR * min(local.values())}
    distinct = {(float(scale), float(zero)): candidate for candidate, (_, scale, zero) in reversed(near.items())}
    return {candidate: near[candidate] for candidate in near if candidate in distinct.values()}


def _loss(quantizer: FakeQuant) -> str:
    assert isinstance(quantizer.spec.range, Auto)
    return quantizer.spec.range.loss


def _candidate(quantizer: FakeQuant, range: Range, format: Format, name: str) -> Rounding:
    try:
        bounds = range.bounds(quantizer.statistics, format)
    except DataError as error:
        raise DataError(f"'{name}': {error}") from None
    return format, *scale_and_zero(*bounds, format)
