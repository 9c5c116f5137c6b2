"""Codes as fine as a size allows: one step for each weight, from one Lagrange multiplier for all.

An entropy-coded weight that is rounded to multiples of a step s costs log2(1/s) bits and a constant, whatever its
distribution, and adds s²/12 to the squared error of each weight. At the least error for a size, one more bit saves the
same error in every layer: the Lagrange multiplier λ. So s = √(λ / sensitivity). Uniform steps and an entropy coder
stay within 0.25 bit of any quantizer (Gish and Pierce 1968); k-means minimises error for the number of values, not for
the bits that they cost.

The sensitivity of a weight is its squared gradient (as in Choi et al. 2017, arXiv 1612.01543), times the share of its
error that feedback (`solve.gptq`) leaves.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor

from lowbit.engines.compile import Batch
from lowbit.errors import TooSmallError
from lowbit.flows.compression import Progress
from lowbit.network.calibrate import both_walks, tensors
from lowbit.network.footprint import footprint
from lowbit.network.moments import moments_in_step
from lowbit.network.network import Network
from lowbit.numerics import QuantTensor
from lowbit.numerics.formats import UINT4, UINT8
from lowbit.repair.sensitivity import squared_gradients
from lowbit.solve import Moments
from lowbit.solve.gptq import Feedback, make_up
from lowbit.storage.tables import entropy_bits

BATCH = 8
MOST_SAMPLES = 1024
MEMORY = 1 << 30  # bytes that all samples are at the widest place of the network, twice: exact and quantized
MULTIPLES = 252  # of a step, from least to greatest: feedback adds one on each side, and a byte holds 256
NEAR = 0.005  # how far below the wanted size the bytes may be
TRIES = 12


@dataclass(frozen=True)
class Weight:
    """One weight tensor and what rounding it costs.

    value        as it is now, pruned weights zero
    mask         False where pruned, or None
    sensitivity  squared error of the outputs for each unit of squared step
    """

    value: Tensor
    mask: Tensor | None
    sensitivity: float

    @property
    def finest(self) -> float:
        """The step of which a byte can count the multiples."""
        widest = float(self.value.max().clamp(min=0) - self.value.min().clamp(max=0))
        return max(widest / MULTIPLES, 1e-30)

    @property
    def coarsest(self) -> float:
        """The step at which all weights round to 0."""
        return max(4 * float(self.value.abs().max()), 1e-30)

    def rounded(self, multiplier: float, moments: Moments | None = None) -> QuantTensor:
        """At the step of a Lagrange multiplier; with moments, each weight makes up for the errors before it."""
        step = min(max(math.sqrt(multiplier / self.sensitivity), self.finest), self.coarsest)
        stored = multiples(self.value, step)
        if moments is not None:
            made_up = make_up(self.value, stored, moments)
            stored = stored.encode(made_up if self.mask is None else made_up * self.mask)
        return in_few_bits(stored)


def multiples(weight: Tensor, step: float) -> QuantTensor:
    """The nearest multiples of a step, as bytes; there is room for one multiple more on each side."""
    zero, one = 1 - round(min(0.0, float(weight.min())) / step), (1,) * weight.dim()
    scales, zeros = torch.full(one, step), torch.full(one, zero, dtype=torch.uint8)
    codes = torch.zeros_like(weight, dtype=torch.uint8)
    return QuantTensor(codes, UINT8, tuple(weight.shape), scales, zeros).encode(weight)


def in_few_bits(stored: QuantTensor) -> QuantTensor:
    """The same multiples in codes of 4 bits, where they fit."""
    codes, zero = (torch.as_tensor(x) for x in (stored.codes, stored.zero))
    least = torch.minimum(codes.min(), zero.min())
    if int(torch.maximum(codes.max(), zero.max()) - least) >= 16:
        return stored
    return replace(stored, codes=codes - least, zero=zero - least, format=UINT4)


def fit_size(
    network: Network,
    batches: Sequence[Batch],
    ratio: float,
    measure: Callable[[], int],
    progress: Progress,
) -> None:
    """Store codes for a file `ratio` times smaller than the parameters, or NEAR more.

    batches  BATCH samples or fewer each; as many are used as fit into MEMORY
    measure  bytes of the packed file of what the network holds
    TooSmallError where no try was that small.
    """
    wanted = 4 * sum(parameter.numel() for parameter in network.module.parameters()) / ratio
    inputs = tensors(network, batches[0])
    alive = footprint(network.module, inputs).alive * sum(x.nbytes for x in inputs)
    batches = batches[: max(1, int(MEMORY // alive))]
    search = MultiplierSearch(_weights(network, batches), wanted, measure)
    multiplier = search.run(search.by_entropy(), lambda tried: _store(network, search.weights, tried, ()))
    # Feedback changes the size by a percent or two, and takes a pass over the samples.
    fed = replace(search, tried=[], told=lambda tries: progress("fit", tries, TRIES))
    multiplier = fed.run(multiplier, lambda tried: _store(network, search.weights, tried, batches))
    progress("fit", TRIES, TRIES)
    if fed.tried[-1][0] != multiplier:
        _store(network, search.weights, multiplier, batches)


def _weights(network: Network, batches: Sequence[Batch]) -> dict[str, Weight]:
    """Every weight with its sensitivity."""
    weights = {name: quantizer for name, (_, quantizer) in network.constants().items()}
    gains = dict.fromkeys(weights, 1.0)
    for name, moments in moments_in_step(*both_walks(network, batches[:64]), weights):
        gains[name] = Feedback.of(moments.quantized, rows=moments.rows).gain
    squared = squared_gradients(network, weights, batches)
    # Where no gradient came through, a weight counts as much as the most sensitive.
    highest = max((g for g in squared.values() if g > 0), default=1.0)
    return {
        name: Weight(network.parameter(name).detach(), quantizer.mask, gains[name] * (squared[name] or highest))
        for name, quantizer in weights.items()
    }


def _store(network: Network, weights: Mapping[str, Weight], multiplier: float, batches: Sequence[Batch]) -> None:
    """Every weight at the step of a multiplier; with feedback, layer after layer, where there are batches."""
    quantizers = {name: quantizer for name, (_, quantizer) in network.constants().items()}
    for name, weight in weights.items():
        quantizers[name].store(weight.rounded(multiplier))
    with network.mode("quantize"):
        for name, moments in moments_in_step(*both_walks(network, batches), weights) if batches else ():
            quantizers[name].store(weights[name].rounded(multiplier, moments))


@dataclass
class MultiplierSearch:
    """The Lagrange multiplier at which a file comes out as large as wanted.

    wanted       bytes
    measure      bytes of the packed file of what the network holds
    told         called with the number of tries so far
    tried        (multiplier, bytes) so far
    """

    weights: Mapping[str, Weight]
    wanted: float
    measure: Callable[[], int]
    told: Callable[[int], None] = lambda tries: None
    tried: list[tuple[float, int]] = field(default_factory=list)

    def run(self, multiplier: float, store: Callable[[float], None]) -> float:
        """The multiplier that comes nearest from below; TooSmallError where no try is small enough."""
        # Below it no step is finer, as no weight has more than MULTIPLES values.
        finest = min(weight.sensitivity * weight.finest**2 for weight in self.weights.values())
        for _ in range(TRIES):
            store(multiplier)
            size = self.measure()
            self.tried.append((multiplier, size))
            self.told(len(self.tried))
            if size <= self.wanted and (size >= (1 - NEAR) * self.wanted or multiplier <= 1.001 * finest):
                break
            multiplier = max(finest, self._next((1 - NEAR / 2) * self.wanted))
        best = max(((size, multiplier) for multiplier, size in self.tried if size <= self.wanted), default=None)
        if best is None:
            raise TooSmallError(
                f"the file cannot be made as small as {self.wanted:,.0f} bytes; the smallest that was found takes "
                f"{min(size for _, size in self.tried):,}. Ask for a lower ratio."
            )
        return best[1]

    def by_entropy(self) -> float:
        """The multiplier at which weights rounded to nearest have the wanted size as their entropy, by bisection."""
        weights = self.weights.values()
        multipliers = [w.sensitivity * step**2 for w in weights for step in (w.finest, w.coarsest)]
        low, high = math.log2(min(multipliers)), math.log2(max(multipliers))
        for _ in range(30):
            middle = (low + high) / 2
            bits = sum(entropy_bits(np.bincount(np.ravel(w.rounded(2**middle).codes))) for w in weights)
            low, high = (middle, high) if bits > 8 * self.wanted else (low, middle)
        return float(2**high)

    def _next(self, aim: float) -> float:
        """The multiplier to try next: by the secant through the closest tries below and above, or by theory.

        Doubling the multiplier takes half a bit from each weight, less where most are zero already.
        """
        logs = [(math.log2(multiplier), size) for multiplier, size in self.tried]
        larger = max((pair for pair in logs if pair[1] > aim), default=None)
        smaller = min((pair for pair in logs if pair[1] <= aim), default=None)
        if larger and smaller and larger[0] < smaller[0]:
            part = (larger[1] - aim) / (larger[1] - smaller[1])
            return float(2 ** (larger[0] + min(0.9, max(0.1, part)) * (smaller[0] - larger[0])))
        log, size = logs[-1]
        least = 0.25 if len(logs) < 3 else 2.0
        ahead = 16 * (size - aim) / sum(weight.value.numel() for weight in self.weights.values())
        return float(2 ** (log + (max(ahead, least) if size > aim else min(ahead, -least))))
