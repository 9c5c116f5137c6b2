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
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from lowbit.errors import InputError
from lowbit.flows.train import Samples
from lowbit.simulate.compressed import CompressedNetwork
from lowbit.simulate.moments import second_moments, weight_of_rows, weight_rows
from lowbit.solve.gptq import Feedback, gptq
from lowbit.solve.share import Shared

MOMENT_SAMPLES = 256
GRADIENT_SAMPLES = 64
PASS_SAMPLES = 32
MULTIPLES = 252  # of a step, from least to greatest: feedback adds one on each side, a mask one, and a byte holds 256
NEAR = 0.005  # how far below the wanted size the bytes may be
TRIES = 12


@dataclass(frozen=True)
class Weight:
    """One weight tensor and what rounding it costs.

    value        as it is now, pruned weights zero
    mask         False where pruned, or None
    axis         of its outputs
    feedback     of each group, () where its inputs are not known
    sensitivity  squared error of the outputs for each unit of squared step
    """

    value: Tensor
    mask: Tensor | None
    axis: int
    feedback: tuple[Feedback, ...]
    sensitivity: float

    def step(self, price: float) -> float:
        """At least what a byte can count, at most one at which all weights round to 0."""
        widest = float(self.value.max() - self.value.min())
        largest = float(self.value.abs().max())
        return min(max(math.sqrt(price / self.sensitivity), widest / MULTIPLES), max(4 * largest, 1e-30))

    def rounded(self, step: float) -> Tensor:
        """Each weight the nearest multiple, without feedback, as multiples."""
        return torch.round(self.value / step)

    def fitted(self, step: float) -> "Fitted":
        """Multiples of the step, each weight making up for the errors before it; pruned weights stay zero."""
        fed = self.value
        if self.feedback:
            multiples = self.rounded(step)
            lowest, highest = float(multiples.min()) - 1, float(multiples.max()) + 1

            def nearest(column: Tensor) -> Tensor:
                return torch.round(column / step).clamp(lowest, highest) * step

            rows = weight_rows(len(self.feedback), self.value, self.axis)
            parts = [gptq(r, f, nearest) for r, f in zip(rows, self.feedback, strict=True)]
            fed = weight_of_rows(torch.stack(parts), self.value.shape, self.axis).clamp(lowest * step, highest * step)
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
    samples: Samples,
    size_bytes: float,
    measure: Callable[[Mapping[str, Shared]], int],
    progress: Callable[[int, int], None],
) -> dict[str, Fitted]:
    """Key of each weight → its codes and values, so that `measure` says `size_bytes`, or up to NEAR less.

    axes     of the outputs, for every weight that gets codes
    measure  bytes of the packed file with these codes and values in it
    InputError where the coarsest steps still need more.
    """
    weights = _prepare(network, axes, samples)
    count = sum(weight.value.numel() for weight in weights.values())
    price = _first_price(weights, 8 * size_bytes / count)
    aim = (1 - NEAR / 2) * size_bytes
    tried: list[tuple[float, int]] = []
    best: dict[str, Fitted] = {}
    for turn in range(TRIES):
        found = {key: weight.fitted(weight.step(price)) for key, weight in weights.items()}
        size = measure({key: fitted.shared for key, fitted in found.items()})
        progress(turn + 1, TRIES)
        if size <= size_bytes and size >= max((s for _, s in tried if s <= size_bytes), default=0):
            best = found
        tried.append((math.log2(price), size))
        if (1 - NEAR) * size_bytes <= size <= size_bytes:
            break
        price = 2 ** _next(tried, aim, count)
    progress(TRIES, TRIES)
    if not best:
        raise InputError(
            f"the file cannot be made as small as {size_bytes:,.0f} bytes; the smallest that was found takes "
            f"{min(size for _, size in tried):,}. Ask for a lower ratio."
        )
    return best


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


def _first_price(weights: Mapping[str, Weight], budget: float) -> float:
    """The price at which weights rounded without feedback cost the budget of bits a weight, by bisection."""
    count = sum(weight.value.numel() for weight in weights.values())
    low, high = -80.0, 80.0  # log2
    for _ in range(40):
        middle = (low + high) / 2
        bits = sum(entropy_bits(w.rounded(w.step(2**middle))) for w in weights.values()) / count
        low, high = (middle, high) if bits > budget else (low, middle)
    return float(2**high)


def _prepare(network: CompressedNetwork, axes: Mapping[str, int], samples: Samples) -> dict[str, Weight]:
    with torch.no_grad():
        values = network.weights()
    few = samples.take(torch.arange(min(MOMENT_SAMPLES, len(samples))))
    moments = second_moments(network.module, values, axes, _parts(few))
    squared = _squared_gradients(network, values, list(axes), samples)
    known = [g for g in squared.values() if g > 0]
    found = {}
    for key, axis in axes.items():
        feedback = tuple(Feedback.of(moment) for moment in moments.get(key, ()))
        gain = sum(f.gain for f in feedback) / len(feedback) if feedback else 1.0
        # Where no gradient came through, a weight counts as much as the most sensitive.
        sensitivity = gain * (squared[key] or max(known, default=1.0))
        found[key] = Weight(values[key], network.masks.get(key), axis, feedback, sensitivity)
    return found


def _squared_gradients(
    network: CompressedNetwork, values: Mapping[str, Tensor], keys: list[str], samples: Samples
) -> dict[str, float]:
    """Mean square of the outputs' derivatives by one weight, summed over outputs, relative to their power.

    Random signs on all outputs of all samples: the square of the sum's gradient is the sum of squares on average
    (Hutchinson 1990).
    """
    generator = torch.Generator().manual_seed(0)
    total = dict.fromkeys(keys, 0.0)
    weights = {key: value.detach().clone().requires_grad_(key in total) for key, value in values.items()}
    few = samples.take(torch.arange(min(GRADIENT_SAMPLES, len(samples))))
    for inputs in _parts(few, size=8):
        outputs = [y for y in network(*inputs, weights=weights).values() if y.requires_grad]
        if not outputs:
            continue
        signs = [torch.randint(0, 2, y.shape, generator=generator).to(y).mul_(2).sub_(1) for y in outputs]
        scales = [s / y.detach().square().mean().sqrt().clamp_min(1e-12) for s, y in zip(signs, outputs, strict=True)]
        gradients = torch.autograd.grad(outputs, [weights[key] for key in keys], scales, allow_unused=True)
        for key, gradient in zip(keys, gradients, strict=True):
            total[key] += 0.0 if gradient is None else float(gradient.square().mean())
    return total


def _parts(samples: Samples, size: int = PASS_SAMPLES) -> list[tuple[Tensor, ...]]:
    return [samples.take(torch.arange(len(samples))[i : i + size]).inputs for i in range(0, len(samples), size)]
