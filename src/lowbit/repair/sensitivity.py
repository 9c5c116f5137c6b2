"""What an error in a tensor costs at the outputs: all candidates of all tensors at once, from a few backward passes.

A rounding error δ in a tensor changes the outputs y by J δ, to first order. For random signs v, E (vᵀ J δ)² = |J δ|²,
and vᵀ J is one backward pass. So a few backward passes over a few samples estimate the error of every candidate of
every tensor. Quantizing one tensor at a time would take a forward pass for each. It is the Hutchinson estimator (1990);
with a projection of each of 64 samples its spread is about √(2/64) = 18 %. A weight's error is one for all samples that
go through the network together: batches of one sample tell most of it.

Other losses need other v (`repair.projections`). With the probabilities p of the outputs, cross-entropy against the
float network's own answers grows by ½ (J δ)ᵀ (diag p − p pᵀ) (J δ), to second order; a v of that covariance
estimates it. With labels, v is the gradient of a label's cross-entropy, and (vᵀ J δ)² the square of its change.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import groupby, zip_longest

import numpy as np
import torch
from torch import Tensor, nn

from lowbit.engines.compile import Batch
from lowbit.network.calibrate import tensors
from lowbit.network.memory_order import as_stored
from lowbit.network.network import Network
from lowbit.network.quantizers import Quantizer, fake_quantize
from lowbit.network.stored import WeightQuant
from lowbit.numerics import Format, Int
from lowbit.numerics.kernels import kernels
from lowbit.repair.projections import projections

SAMPLES = 64

Rounding = tuple[Format, Tensor, Tensor]  # of an activation: format, scale, zero
Candidate = Rounding | Tensor  # what a tensor may become: rounded, or a weight's new values


def quantizer_costs(
    network: Network, batches: Sequence[Batch], loss: str = "squares", labels: Sequence[np.ndarray] = ()
) -> dict[str, float]:
    """What each quantizer alone adds to the loss of the outputs as it is set now: activations by group, weights."""
    quantizers = network.activations() | {name: q for name, (_, q) in network.constants().items()}
    errors = output_errors(network, dict.fromkeys(quantizers, ()), batches, loss, labels)
    return {name: float(cost[0]) for name, cost in errors.items() if cost is not None}


def squared_gradients(
    network: Network, weights: Mapping[str, WeightQuant], batches: Sequence[Batch]
) -> dict[str, float]:
    """Mean square of the outputs' derivatives by one weight, summed over outputs, relative to their power."""
    total = dict.fromkeys(weights, 0.0)
    together = max((len(x) for x in tensors(network, batches[0]) if x.dim()), default=1)

    def arrived(name: str, _: Tensor, gradient: Tensor) -> None:
        total[name] += float(gradient.square().mean())

    at_gradients(network, weights, batches[: -(-SAMPLES // together)], arrived)
    return total


def output_errors(
    network: Network,
    tried: Mapping[str, Sequence[Candidate]],
    batches: Sequence[Batch],
    loss: str = "squares",
    labels: Sequence[np.ndarray] = (),
) -> dict[str, Tensor | None]:
    """What each candidate adds to the loss of the outputs, to the first order at which it moves them.

    tried    group or constant → its candidates; none: as its quantizer is set now
    labels   of each batch, where the loss is "labels"
    return   group → (candidates,) sums over batches; None where no gradient reaches the tensor (an operator outside the
             table is behind it)
    """
    constants, quantizers = network.constants(), network.quantizers
    total: dict[str, Tensor | None] = dict.fromkeys(tried)

    def arrived(name: str, x: Tensor, gradient: Tensor) -> None:
        quantizer, samples = quantizers[name], 1 if name in constants or not x.dim() else len(x)
        assert isinstance(quantizer, Quantizer)
        seen = _squared_projections(quantizer, x, gradient, tried[name], samples)
        total[name] = seen if (before := total[name]) is None else before + seen

    at_gradients(network, tried, batches, arrived, loss, labels)
    return total


def at_gradients(
    network: Network,
    names: Iterable[str],
    batches: Sequence[Batch],
    arrived: Callable[[str, Tensor, Tensor], None],
    loss: str = "squares",
    labels: Sequence[np.ndarray] = (),
    by_value: bool = False,
) -> None:
    """For each batch, one random projection of the outputs, and its gradient by each of these quantizers' inputs.

    arrived   called with a name, the quantizer's input and the gradient as soon as that is computed; it is let go at
              once, so memory holds one batch's activations
    by_value  the name is that of the value quantized, not the one given: several values may share a quantizer
    """
    generator = torch.Generator().manual_seed(0)
    quantizers = {name: q for name in names if isinstance(q := network.quantizers[name], Quantizer)}
    calls = _calls(network)

    def told(name: str, x: Tensor, gradient: Tensor) -> None:
        with torch.no_grad():
            arrived(name, x, gradient)

    def estimate(batch: Batch, known: np.ndarray | None) -> None:
        with network.mode("probe", quantizers.values()):
            outputs = {n: y for n, y in network.module(*tensors(network, batch)).items() if y.requires_grad}
        probes = [
            (value if by_value else name, x)
            for name, q in quantizers.items()
            for x, (value, again) in zip(q.take_probes(), calls[q], strict=False)
            if not again
        ]
        for name, x in probes:
            x.register_hook(partial(told, name, x.detach()))  # type: ignore[no-untyped-call]
        leaves = [x for _, x in probes if x.is_leaf]
        if outputs:
            drawn = projections(outputs, generator, loss, known)
            torch.autograd.backward(list(outputs.values()), list(drawn.values()), inputs=leaves)

    with _frozen(network.module):
        for batch, known in zip_longest(batches, labels):
            estimate(batch, known)


def _squared_projections(
    quantizer: Quantizer, x: Tensor, gradient: Tensor, tried: Sequence[Candidate], samples: int
) -> Tensor:
    """Σ over samples of (vᵀ J δ)² for each candidate's δ; tried: none is as the quantizer is set now."""
    rows, along = (as_stored(t, x).reshape(samples, -1).contiguous() for t in (x, gradient))

    def dots(rounded: Tensor) -> Tensor:
        dot: Tensor = torch.linalg.vecdot(along, as_stored(rounded - x, x).reshape(samples, -1))
        return dot.double()[:, None]

    found = [] if tried else [dots(quantizer.rounded(x))]
    for kind, together in groupby(tried, lambda candidate: None if isinstance(candidate, Tensor) else candidate[0]):
        if kind is None:
            found += [dots(values) for values in together if isinstance(values, Tensor)]
            continue
        _, scales, zeros = zip(*together, strict=True)
        if isinstance(kind.grid, Int) and kind.rounding == "nearest" and all(s.numel() == 1 for s in scales):
            flat = [torch.stack([p.reshape(()) for p in parameters]) for parameters in (scales, zeros)]
            found.append(kernels(x).error_along(rows, along, flat[0], flat[1], kind.grid))
        else:
            found += [dots(fake_quantize(x, kind, *p)) for p in zip(scales, zeros, strict=True)]
    return torch.cat(found, 1).square().sum(0)


def _calls(network: Network) -> dict[nn.Module, list[tuple[str, bool]]]:
    """For each call of a quantizer: the value, and whether it was only moved since the same one rounded it.

    Rounding it again (behind a MaxPool, a Concat) changes nothing, so such a call adds no error of its own.
    """
    found: dict[nn.Module, list[tuple[str, bool]]] = {}
    for node in network.module.graph.nodes:
        if node.op == "call_module" and "quantized_value" in node.meta:
            (source,) = node.all_input_nodes
            again = any(n.op == "call_module" and n.target == node.target for n in source.all_input_nodes)
            called = found.setdefault(network.module.get_submodule(str(node.target)), [])
            called.append((str(node.meta["quantized_value"]), again))
    return found


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
