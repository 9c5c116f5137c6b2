"""Shared values as fine as a size allows: one step for each weight, from one price of a bit.

An entropy-coded weight that is rounded to multiples of a step s costs log2(1/s) bits and a constant, whatever its
distribution, and adds s²/12 to the squared error of each weight. So at the least error for a size s² times what one
weight's error does to the outputs is alike in all layers: s = √(price / sensitivity). Uniform steps and an entropy
coder stay within 0.25 bit of any quantizer (Gish and Pierce 1968), where k-means minimises error for the number of
values, not for the bits that they cost.

What a weight's error does to the outputs is its gradient, squared (as in Choi et al. 2017, arXiv 1612.01543); feedback
(`solve.gptq`) takes away a share of it that differs from layer to layer, and steps follow.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from lowbit.errors import TooSmallError
from lowbit.flows.compression import Progress
from lowbit.graph.layer import by_group, of_groups
from lowbit.network.compressed import CompressedNetwork
from lowbit.network.footprint import footprint
from lowbit.network.moments import Inputs, moments_in_turn
from lowbit.repair.sensitivity import squared_gradients
from lowbit.solve.gptq import Feedback, feed_back
from lowbit.solve.share import Shared

BATCH = 8
MOST_SAMPLES = 1024
MEMORY = 1 << 30  # bytes that all samples are at the widest place of the network, twice: exact and quantized
MULTIPLES = 252  # of a step, from least to greatest: feedback adds one on each side, a mask one, and a byte holds 256
NEAR = 0.005  # how far below the wanted size the bytes may be
TRIES = 12


@dataclass(frozen=True)
class Priced:
    """One weight tensor and what rounding it costs.

    value        as it is now, pruned weights zero
    mask         False where pruned, or None
    axis         of its outputs
    sensitivity  squared error of the outputs for each unit of squared step
    """

    value: Tensor
    mask: Tensor | None
    axis: int
    sensitivity: float

    @property
    def steps(self) -> tuple[float, float]:
        """The finest, of which a byte can count the multiples, and the coarsest, at which all weights round to 0."""
        widest, largest = float(self.value.max() - self.value.min()), float(self.value.abs().max())
        return max(widest / MULTIPLES, largest / 2**16, 1e-30), max(4 * largest, 1e-30)

    def step(self, price: float) -> float:
        """What this weight pays for a bit less."""
        finest, coarsest = self.steps
        return min(max(math.sqrt(price / self.sensitivity), finest), coarsest)

    def fitted(self, step: float, feedback: Sequence[Feedback] = ()) -> "Fitted":
        """Multiples of the step; with feedback, each weight makes up for errors before it. Pruned weights stay zero."""
        fed = self.value.double()
        lowest, highest = float(torch.round(fed.min() / step)) - 1, float(torch.round(fed.max() / step)) + 1
        if feedback:

            def nearest(column: Tensor, _: Tensor) -> Tensor:
                return torch.round(column / step).clamp(lowest, highest) * step

            rows = by_group(self.value, len(feedback), self.axis).flatten(2)
            parts = [feed_back(r, f, nearest) for r, f in zip(rows, feedback, strict=True)]
            fed = of_groups(torch.stack(parts), self.value.shape, self.axis).clamp(lowest * step, highest * step)
        multiples = torch.round(fed / step)
        first = int(multiples.min())
        table = (torch.arange(first, int(multiples.max()) + 1) * step).float()
        codes = (multiples - first).to(torch.uint8)
        if self.mask is None:
            return Fitted(fed.float(), Shared(codes, table.reshape(1, -1), False))
        table = torch.cat([torch.zeros(1), table])
        return Fitted(fed.float(), Shared((codes + 1) * self.mask, table.reshape(1, -1), True))


@dataclass(frozen=True)
class Fitted:
    """A weight with the errors that it makes up for, and the codes and values that it rounds to."""

    weight: Tensor
    shared: Shared


def fit_size(
    network: CompressedNetwork,
    axes: Mapping[str, int],
    batches: Inputs,
    ratio: float,
    measure: Callable[[Mapping[str, Shared]], int],
    progress: Progress,
) -> dict[str, Fitted]:
    """Key of each weight → its codes and values, for a file `ratio` times smaller than the parameters, or NEAR more.

    axes     of the outputs, for every weight that gets codes
    batches  inputs of the network, BATCH samples or fewer each; as many are used as fit into MEMORY
    measure  bytes of the packed file with these codes and values in it
    TooSmallError where no try was that small.
    """
    size_bytes = 4 * sum(parameter.numel() for parameter in network.parameters.values()) / ratio
    with torch.no_grad():
        values = network.weights()
    alive = footprint(network.module, batches[0]).alive * sum(x.nbytes for x in batches[0])
    batches = batches[: max(1, int(MEMORY // alive))]
    weights = _prepare(network, axes, values, batches)
    count = sum(weight.value.numel() for weight in weights.values())
    price = _first_price(weights, 8 * size_bytes / count)
    finest = min(weight.sensitivity * weight.steps[0] ** 2 for weight in weights.values())
    found = Search(size_bytes, count, finest, measure)
    found.run(price, lambda price: {key: weight.fitted(weight.step(price)) for key, weight in weights.items()})
    # Feedback changes the size by a percent or two, and takes a pass over the samples.
    fed = Search(size_bytes, count, finest, measure, lambda: progress("fit", len(fed.tried), TRIES))
    fed.run(found.price, lambda price: _fit(network, weights, values, price, batches))
    progress("fit", TRIES, TRIES)
    return fed.best


@dataclass
class Search:
    """The price at which a file comes out as large as wanted.

    size_bytes   wanted
    count        weights
    finest       price below which no step is finer, as no weight has more than MULTIPLES values
    measure      bytes of the file with these codes and values
    tried        (log2 of the price, bytes) so far
    best         what came nearest from below
    """

    size_bytes: float
    count: int
    finest: float
    measure: Callable[[Mapping[str, Shared]], int]
    told: Callable[[], None] = lambda: None  # after each try
    tried: list[tuple[float, int]] = field(default_factory=list)
    best: dict[str, Fitted] = field(default_factory=dict)
    price: float = 0.0

    def run(self, price: float, fit: Callable[[float], dict[str, Fitted]]) -> None:
        """TooSmallError where no try is small enough."""
        for _ in range(TRIES):
            found = fit(price)
            size = self.measure({key: fitted.shared for key, fitted in found.items()})
            if size <= self.size_bytes and size >= max((s for _, s in self.tried if s <= self.size_bytes), default=0):
                self.best, self.price = found, price
            self.tried.append((math.log2(price), size))
            self.told()
            if size <= self.size_bytes and (size >= (1 - NEAR) * self.size_bytes or price <= 1.001 * self.finest):
                break
            price = max(self.finest, 2 ** _next(self.tried, (1 - NEAR / 2) * self.size_bytes, self.count))
        if not self.best:
            raise TooSmallError(
                f"the file cannot be made as small as {self.size_bytes:,.0f} bytes; the smallest that was found takes "
                f"{min(size for _, size in self.tried):,}. Ask for a lower ratio."
            )


def _fit(
    network: CompressedNetwork,
    weights: Mapping[str, Priced],
    values: Mapping[str, Tensor],
    price: float,
    batches: Inputs,
) -> dict[str, Fitted]:
    """Every weight at the step of this price, one layer after the other, each knowing what those before left it."""
    found = {key: weight.fitted(weight.step(price)) for key, weight in weights.items()}
    quantized = dict(values) | {key: fitted.shared.dense() for key, fitted in found.items()}
    for key, moments in moments_in_turn(network.module, values, quantized, weights, batches):
        feedback = [Feedback.of(r, c, moments.rows) for r, c in zip(moments.quantized, moments.cross, strict=True)]
        found[key] = weights[key].fitted(weights[key].step(price), feedback)
        quantized[key] = found[key].shared.dense()
    return found


def _next(tried: list[tuple[float, int]], aim: float, count: int) -> float:
    """log2 of the price to try next: by the secant through what was tried closest below and above, or by theory.

    Doubling the price takes half a bit from each weight, less where most are zero already.
    """
    larger = max(((price, size) for price, size in tried if size > aim), default=None)
    smaller = min(((price, size) for price, size in tried if size <= aim), default=None)
    if larger and smaller and larger[0] < smaller[0]:
        part = (larger[1] - aim) / (larger[1] - smaller[1])
        return larger[0] + min(0.9, max(0.1, part)) * (smaller[0] - larger[0])
    price, size = tried[-1]
    least = 0.25 if len(tried) < 3 else 2.0
    ahead = 16 * (size - aim) / count
    return price + (max(ahead, least) if size > aim else min(ahead, -least))


def entropy_bits(codes: Tensor) -> float:
    """Bits of all codes at their zero-order entropy. codes: whole numbers."""
    counts = torch.bincount((codes - codes.min()).long().reshape(-1)).double()
    counts = counts[counts > 0]
    return float(-(counts * (counts / codes.numel()).log2()).sum())


def _first_price(weights: Mapping[str, Priced], budget: float) -> float:
    """The price at which weights rounded to nearest cost the budget of bits a weight, by bisection."""
    count = sum(weight.value.numel() for weight in weights.values())
    prices = [w.sensitivity * step**2 for w in weights.values() for step in w.steps]
    low, high = math.log2(min(prices)), math.log2(max(prices))
    for _ in range(30):
        middle = (low + high) / 2
        bits = sum(entropy_bits(torch.round(w.value / w.step(2**middle))) for w in weights.values()) / count
        low, high = (middle, high) if bits > budget else (low, middle)
    return float(2**high)


def _prepare(
    network: CompressedNetwork,
    axes: Mapping[str, int],
    values: Mapping[str, Tensor],
    batches: Inputs,
) -> dict[str, Priced]:
    """Every weight with its sensitivity: its squared gradient, times what feedback leaves of its error."""
    gains = dict.fromkeys(axes, 1.0)
    for key, moments in moments_in_turn(network.module, values, values, axes, batches[:64]):
        feedback = [Feedback.of(moment, rows=moments.rows) for moment in moments.quantized]
        gains[key] = sum(f.gain for f in feedback) / len(feedback)
    squared = squared_gradients(network, values, list(axes), batches)
    # Where no gradient came through, a weight counts as much as the most sensitive.
    highest = max((g for g in squared.values() if g > 0), default=1.0)
    return {
        key: Priced(values[key], network.masks.get(key), axis, gains[key] * (squared[key] or highest))
        for key, axis in axes.items()
    }
