"""AdaRound: each weight goes to one of its two neighbours on the grid, learned so that the outputs change least.

Source: Nagel et al. 2020 (arXiv 2004.10568), section 3. The squared error of a layer's outputs is a quadratic of its
weights, tr((W̃ − W*) H (W̃ − W*)ᵀ), so the second moments H of the inputs stand for all samples. As in `gptq`, W* is the
weight whose outputs from the quantized inputs are nearest to the exact outputs.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from lowbit.graph.layer import by_group, of_groups
from lowbit.numerics import QuantTensor
from lowbit.numerics.roundings import down, up
from lowbit.solve.gptq import damped, make_up
from lowbit.solve.moments import Moments
from lowbit.solve.nearest import nearest

if TYPE_CHECKING:
    from lowbit.recipe import TensorSpec

STRETCH = (-0.1, 1.1)  # γ, ζ: a sigmoid stretched to these reaches 0 and 1 itself (eq. 23)
STEPS = 1000
RATE = 0.1
REGULARISER = 3.0  # λ, for errors in steps of the grid and inputs of mean power 1
WARM_UP = 0.2  # share of the steps before the regulariser begins
SHARPNESS = (20.0, 2.0)  # β, from the first step to the last


class LearnedRounding(nn.Module):
    """A weight between its two neighbours on the grid: below + h(v) · (above − below), with a rectified sigmoid h.

    down, up  the codes of both neighbours
    v         a Parameter in the shape of the weight; it starts where the values are the weight's own
    """

    below: Tensor
    gap: Tensor

    def __init__(self, stored: QuantTensor, weight: Tensor) -> None:
        """Between the neighbours of `weight` under the scales, zeros and tables of `stored`."""
        super().__init__()
        self.down, self.up = stored.encode(weight, down), stored.encode(weight, up)
        below = torch.as_tensor(self.down.dequantize())
        gap = torch.as_tensor(self.up.dequantize()) - below
        share = torch.where(gap > 0, (weight.detach() - below) / gap, 0.0).clamp(0, 1)
        low, high = STRETCH
        self.register_buffer("below", below)
        self.register_buffer("gap", gap)
        self.v = nn.Parameter(-torch.log((high - low) / (share - low) - 1))

    def share(self) -> Tensor:
        """h(v) of eq. 23: how far each weight is on its way from the lower neighbour to the upper."""
        low, high = STRETCH
        return (torch.sigmoid(self.v) * (high - low) + low).clamp(0, 1)

    def values(self) -> Tensor:
        """The weights as they are now, between their neighbours."""
        return torch.addcmul(self.below, self.gap, self.share())

    def undecided(self, progress: float) -> Tensor:
        """Σ 1 − |2 h(v) − 1|^β, eq. 24: how many weights lie between; β falls as `progress` goes from 0 to 1."""
        first, last = SHARPNESS
        beta = last + (first - last) * (1 - progress)
        return (1 - (2 * self.share() - 1).abs().pow(beta)).sum()

    def settled(self) -> QuantTensor:
        """Each weight at the neighbour to which it is nearer."""
        return self.at(self.v.detach() > 0)

    def at(self, upper: Tensor) -> QuantTensor:
        """Each weight at its upper or lower neighbour."""
        codes = torch.where(upper, torch.as_tensor(self.up.codes), torch.as_tensor(self.down.codes))
        return replace(self.down, codes=codes)


def adaround(weight: Tensor, spec: TensorSpec, moments: Moments | None = None) -> QuantTensor:
    """Codes that change the layer's outputs least, under the scales, zeros and tables that `nearest` chooses.

    Learned between the neighbours of what GPTQ would round, and between those of W*; each output takes its best.
    Without moments the codes are the nearest.
    """
    start = nearest(weight, spec)
    if moments is None:
        return start
    error = LayerError(weight, moments)
    found = [start]
    for begin in (make_up(weight, start, moments), of_groups(error.wanted, start.shape, error.axis)):
        rounding = LearnedRounding(start, begin)
        found.append(descend(rounding, error))
        learn(rounding, error)
        found.append(descend(rounding, error))
    best = torch.stack([error.of_outputs(stored) for stored in found]).argmin(0)[..., None]
    codes = torch.stack([error.in_rows(torch.as_tensor(stored.codes)) for stored in found])
    chosen = codes.gather(0, best.expand(error.wanted.shape)[None])[0]
    return replace(start, codes=of_groups(chosen, start.shape, error.axis).contiguous())


def learn(rounding: LearnedRounding, error: LayerError) -> None:
    """Descend on the error of all outputs, each in units of its own steps, and then towards a decision (eq. 25)."""
    unit = error.in_rows(rounding.gap).square().mean(-1, keepdim=True).clamp_min(1e-30)
    adam = torch.optim.Adam([rounding.v], lr=RATE)
    for step in range(STEPS):
        off, along = error.slope(rounding.values())
        loss = (off * (along / unit)).sum() * 2  # its gradient is that of the squared error: one product less
        progress = (step / STEPS - WARM_UP) / (1 - WARM_UP)
        if progress >= 0:
            loss = loss + REGULARISER * rounding.undecided(progress)
        (rounding.v.grad,) = torch.autograd.grad(loss, rounding.v)
        adam.step()


@torch.no_grad()
def descend(rounding: LearnedRounding, error: LayerError) -> QuantTensor:
    """Each weight at its nearer neighbour; then, in each output, the weight whose other neighbour is best moves there.

    Until no single move helps, at most as often as there are inputs. Source: coordinate descent, as in Behdin et al.
    2023 (QuantEase, arXiv 2309.01885).
    """
    upper, gap = error.in_rows(rounding.v) > 0, error.in_rows(rounding.gap)
    power = error.moments.diagonal(dim1=-2, dim2=-1)[:, None]
    _, along = error.slope(torch.as_tensor(rounding.settled().dequantize()).float())
    for _ in range(gap.shape[-1]):
        move = torch.where(upper, -gap, gap)
        gain, chosen = (-move * (2 * along + move * power)).max(-1, keepdim=True)
        helps = gain > 0
        if not bool(helps.any()):
            break
        moved = torch.where(helps, move.gather(-1, chosen), 0.0)
        along += moved * error.moments.gather(1, chosen.expand(-1, -1, gap.shape[-1]))
        upper.scatter_(-1, chosen, upper.gather(-1, chosen) ^ helps)
    return rounding.at(of_groups(upper, tuple(rounding.v.shape), error.axis))


class LayerError:
    """The squared error of a layer's outputs, as a quadratic of its weight.

    wanted   (groups, outputs, inputs) the weight without error, W*
    moments  (groups, inputs, inputs) of what it multiplies, damped, of mean power 1
    """

    def __init__(self, weight: Tensor, moments: Moments) -> None:
        self.groups, self.axis = len(moments.quantized), moments.output_axis
        hessian, moved, _ = damped(moments.quantized, moments.cross, moments.rows)
        self.moments = hessian.float()
        self.wanted = (self.in_rows(weight.detach()).double() @ moved).float()

    def in_rows(self, x: Tensor) -> Tensor:
        """A tensor like the weight as (groups, outputs, inputs)."""
        return torch.as_tensor(by_group(x, self.groups, self.axis)).flatten(2)

    def slope(self, values: Tensor) -> tuple[Tensor, Tensor]:
        """The error of these values and the product with the moments: half its gradient."""
        error = self.in_rows(values) - self.wanted
        return error, error.detach() @ self.moments

    def of_outputs(self, stored: QuantTensor) -> Tensor:
        """(groups, outputs) the error of each output."""
        error, along = self.slope(torch.as_tensor(stored.dequantize()).float())
        return (error.double() * along).sum(-1)
