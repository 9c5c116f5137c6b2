"""Equalization by what it does to the outputs: factors for all channels at once, from a few backward passes.

A channel divided by s before its quantizer is rounded s times as finely where the others stay; the weights that read it
grow by s, and their rounding with them. Both errors follow from squared gradients of the outputs and from the largest
values, channel by channel. The factors are those with the least sum, found by gradient descent. Smoothing (Xiao et al.
2022) and cross-layer equalization (Nagel et al. 2019) balance the same two errors by a fixed rule.
"""

from collections import defaultdict
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from lowbit.graph.channels import Channels, channels_of
from lowbit.graph.homogeneous import relu_ceiling
from lowbit.graph.layer import Layer
from lowbit.network.calibrate import observe
from lowbit.network.network import Network
from lowbit.network.place import place
from lowbit.network.quantizers import FakeQuant
from lowbit.numerics import Int
from lowbit.repair.prove import Calibration, fit
from lowbit.repair.sensitivity import at_gradients

STEPS = 200  # of descent, at a rate that falls from RATE to 0
RATE = 0.05
LEAST_GAIN = 0.02  # of the predicted error: below it the network is left as it is


def equalize(network: Network, calibration: Calibration) -> list[str]:
    """Move factors between the layers of the program, exactly on the samples seen, and calibrate again."""
    return _equalized(network, calibration, lifted=False)


def equalize_without_ceilings(network: Network, calibration: Calibration) -> list[str]:
    """The same where ReLU6 is in the way: its ceiling rises to what the channel that needs most needs.

    The other channels are clipped later than in float. Nagel et al. 2019 make it a ReLU throughout.
    """
    return _equalized(network, calibration, lifted=True) if channels_of(network.program).ceilings else []


def _equalized(network: Network, calibration: Calibration, *, lifted: bool) -> list[str]:
    calibration.stage("equalizing channels")
    recipe, program = network.placement.recipe, network.program.clone()
    channels = channels_of(program)
    if not channels.free.any():
        return []
    seen = _Seen.of(network, channels, calibration)
    factors, gain = _descend(_Predicted(network, channels, seen, lifted))
    if gain < LEAST_GAIN:
        return []
    done = channels.divide(factors)
    if lifted:
        channels.lift_ceilings(factors)
    renewed = Network(program, place(program, recipe))
    observe(renewed, calibration.observed())
    vars(network).update(vars(renewed))
    network.keep_before_steps()
    what = f"equalized the output channels of {len(done)} layers"
    return [what + (", and raised their ceilings" if lifted else ""), *fit(network, calibration)]


@dataclass
class _Seen:
    """What the samples tell of each quantized tensor, before anything moves.

    high, low   value → (channels,) largest value of each channel and of its negative, at least 0
    slopes      value → (channels,) squared gradients summed over samples and positions where the value is not 0
    moments     value → (channels, 3) count, sum, sum of squares
    weights     weight → squared gradients of each element
    """

    high: dict[str, Tensor] = field(default_factory=dict)
    low: dict[str, Tensor] = field(default_factory=dict)
    slopes: dict[str, Tensor] = field(default_factory=dict)
    moments: dict[str, Tensor] = field(default_factory=dict)
    weights: dict[str, Tensor] = field(default_factory=dict)

    @staticmethod
    def of(network: Network, channels: Channels, calibration: Calibration) -> "_Seen":
        seen, constants = _Seen(), network.constants()

        def arrived(name: str, x: Tensor, gradient: Tensor) -> None:
            if name in constants:
                seen.weights[name] = seen.weights.get(name, 0) + gradient.double().square()
                return
            axis = channels.values[name][0] if name in channels.values else None
            rows, along = (t.reshape(1, -1) if axis is None else t.movedim(axis, 0).flatten(1) for t in (x, gradient))
            count = torch.full((len(rows),), float(rows.shape[1]), dtype=torch.float64)
            sums = [rows.double().sum(1), rows.double().square().sum(1)]
            high, low = rows.amax(1).clamp_min(0).double(), (-rows).amax(1).clamp_min(0).double()
            seen.high[name] = torch.maximum(seen.high.get(name, high), high)
            seen.low[name] = torch.maximum(seen.low.get(name, low), low)
            seen.slopes[name] = seen.slopes.get(name, 0) + (along * (rows != 0)).double().square().sum(1)
            seen.moments[name] = seen.moments.get(name, 0) + torch.stack([count, *sums], 1)

        names = [*network.activations(), *constants]
        at_gradients(network, names, calibration.fitting, arrived, by_value=True)
        return seen


class _Predicted:
    """The squared error of the outputs that rounding is expected to make, as a function of the factors' logarithms.

    A rounding error is uniform in a step d: d²/12. Steps follow from the largest values, or weights, under one scale.
    """

    def __init__(self, network: Network, channels: Channels, seen: _Seen, lifted: bool) -> None:
        self.seen = seen
        self.free = torch.from_numpy(channels.free.copy())
        self.least = torch.full(self.free.shape, -torch.inf, dtype=torch.float64)
        for node, ids in [] if lifted else channels.ceilings:
            high, at = seen.high.get(str(node.outputs[0].name)), torch.from_numpy(ids)
            ceiling = relu_ceiling(node) or 0.0
            if high is None:
                self.free[at] = False
                continue
            self.free[at[high >= 0.9999 * ceiling]] = False  # what reaches the ceiling keeps it, others stay below it
            self.least[at] = torch.maximum(self.least[at], (high / ceiling).clamp_min(1e-9).log())
        self.ids = {name: torch.from_numpy(ids) for name, (_, ids) in channels.values.items()}
        self.groups: dict[FakeQuant, list[str]] = defaultdict(list)
        for site in network.placement.sites.values():
            quantizer = network.quantizers[site.value]
            if isinstance(quantizer, FakeQuant) and not quantizer.dynamic and site.value in seen.slopes:
                self.groups[quantizer].append(site.value)
        made = {str(layer.value.name): (layer, torch.from_numpy(ids)) for layer, ids in channels.makers}
        read = {str(layer.value.name): (layer, torch.from_numpy(ids)) for layer, ids in channels.readers}
        self.weights = [
            _Weight.of(network, name, squares, made.get(name), read.get(name), seen.moments)
            for name, squares in seen.weights.items()
            if name in made or name in read
        ]

    def logarithms(self, theta: Tensor) -> Tensor:
        """Of the factors: 0 where they are not free."""
        return torch.where(self.free, torch.maximum(theta, self.least), 0.0)

    def __call__(self, theta: Tensor) -> Tensor:
        logs, total = self.logarithms(theta), torch.zeros((), dtype=torch.float64)
        for quantizer, values in self.groups.items():
            factors = {v: logs[self.ids[v]].exp() if v in self.ids else torch.ones(1).double() for v in values}
            ends = [
                torch.stack([(m[v] / factors[v]).amax() for v in values]).amax()
                for m in (self.seen.high, self.seen.low)
            ]
            step = (ends[0] + ends[1]) / (2**quantizer.format.grid.bits - 1)
            total = total + step.square() / 12 * sum((self.seen.slopes[v] * factors[v].square()).sum() for v in values)
        return total + sum(weight.error(logs) for weight in self.weights)


@dataclass(frozen=True)
class _Weight:
    """A layer's weight: largest magnitudes and squared gradients, (groups, outputs of a group, inputs of a group)."""

    sizes: Tensor
    squares: Tensor
    outputs: Tensor | None
    inputs: Tensor | None
    steps: float
    per_output: bool

    @staticmethod
    def of(
        network: Network,
        name: str,
        squares: Tensor,
        made: tuple[Layer, Tensor] | None,
        read: tuple[Layer, Tensor] | None,
        moments: dict[str, Tensor],
    ) -> "_Weight":
        layer = (made or read)[0]  # type: ignore[index]
        quantizer = network.constants()[name][1]
        sizes = layer.grouped(network.parameter(name).detach().double().abs()).amax(3)
        summed = layer.grouped(squares).sum(3)
        seen = moments.get(str(layer.node.inputs[0].name))  # type: ignore[union-attr]
        if seen is not None and len(seen) == layer.inputs:
            # What all samples share of an input, the bias takes up again: only its variance counts.
            count, total, power = seen.T
            varying = 1 - (total.square() / count / power.clamp_min(1e-12)).clamp(0, 0.98)
            summed = summed * varying.reshape(layer.groups, 1, -1)
        grid = quantizer.format.grid
        steps = (2**grid.bits - 1) / 2 if isinstance(grid, Int) else 127.5
        whole = quantizer.scale.numel() == 1
        return _Weight(sizes, summed, made[1] if made else None, read[1] if read else None, steps, not whole)

    def error(self, logs: Tensor) -> Tensor:
        groups = len(self.sizes)
        inputs = 1.0 if self.inputs is None else logs[self.inputs].exp().reshape(groups, 1, -1)
        outputs = 1.0 if self.outputs is None else logs[self.outputs].exp().reshape(groups, -1, 1)
        moved = inputs / outputs * torch.ones(())
        sizes = self.sizes * moved
        step = (sizes.amax(2, keepdim=True) if self.per_output else sizes.amax()) / self.steps
        return (step.square() / 12 * self.squares / moved.square()).sum()


def _descend(predicted: _Predicted) -> tuple[np.ndarray, float]:
    """The factors with the least predicted error, and by which share it fell."""
    theta = torch.zeros(len(predicted.free), dtype=torch.float64, requires_grad=True)
    adam = torch.optim.Adam([theta], lr=RATE)
    rate = torch.optim.lr_scheduler.CosineAnnealingLR(adam, STEPS)
    start = least = float(predicted(theta.detach()))
    best = torch.zeros_like(theta)
    for _ in range(STEPS):
        error = predicted(theta)
        if float(error.detach()) < least:
            least, best = float(error.detach()), theta.detach().clone()
        adam.zero_grad()
        error.log().backward()  # type: ignore[no-untyped-call]
        adam.step()
        rate.step()
    return predicted.logarithms(best).exp().numpy(), 1 - least / max(start, 1e-300)
