"""GPTQ: the rounding error of one weight is made up for by those that are still to be rounded.

Source: Frantar et al. 2022 (arXiv 2210.17323), section 3: optimal brain surgery, one input after another, with the
Cholesky factor of the inverse of the inputs' second moments. Inputs go by falling power here ("act-order"). Where the
inputs already carry errors of layers before, weights first move to where the exact outputs are nearest (Li et al. 2025,
arXiv 2504.02692, has the same aim).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lowbit.graph.layer import by_group, of_groups
from lowbit.numerics import QuantTensor
from lowbit.numerics.encode import decode_rows, encode_rows
from lowbit.numerics.qtensor import as_torch
from lowbit.numerics.rows import expand_tiles
from lowbit.solve.moments import Moments
from lowbit.solve.nearest import nearest

if TYPE_CHECKING:
    from lowbit.recipe import TensorSpec

DAMPING = 0.02  # share of the mean power of the inputs that is added to each of them
# Damping grows when there are few samples (inputs / rows), because sample correlations are noisy.
SCARCITY = 0.5
PART = 64  # inputs whose errors reach the rest together, as one product of matrices


def gptq(weight: Tensor, spec: TensorSpec, moments: Moments | None = None) -> QuantTensor:
    """Codes that change the layer's outputs least, under the scales, zeros and tables that `nearest` chooses.

    Without moments the codes are the nearest.
    """
    start = nearest(weight, spec)
    return start if moments is None else start.encode(make_up(weight, start, moments))


def make_up(weight: Tensor, start: QuantTensor, moments: Moments) -> Tensor:
    """The weight with the errors that it makes up for, when it is rounded under the scales and tables of `start`."""
    groups, shape, axis = len(moments.quantized), weight.shape, moments.output_axis
    scale, zero = (as_torch(t).reshape(-1, 1) for t in (start.scale_values(), start.zero_values()))
    table, grid = None if start.table is None else as_torch(start.table), start.format.grid

    def in_rows(x: Tensor) -> Tensor:
        return torch.as_tensor(by_group(x, groups, axis)).flatten(2)

    numbers = torch.arange(math.prod(start.tiles)).reshape(start.tiles)
    own_tile = in_rows(expand_tiles(numbers, tuple(shape), start.tile))  # (groups, outputs, inputs)

    def rounded(column: Tensor, inputs: Tensor) -> Tensor:
        tile_of = own_tile.gather(2, inputs.reshape(-1, 1, 1).expand(-1, column.shape[1], 1)).flatten()
        chosen, values = (scale[tile_of], zero[tile_of], grid), None if table is None else table[tile_of]
        codes = encode_rows(column.float().reshape(-1, 1), *chosen, table=values)
        return decode_rows(codes, *chosen, values).reshape(column.shape).double()

    feedback = Feedback.of(moments.quantized, moments.cross, moments.rows)
    fed: Tensor = of_groups(feed_back(in_rows(weight.detach()), feedback, rounded).float(), tuple(shape), axis)
    return fed.contiguous()


@dataclass(frozen=True)
class Feedback:
    """How the error of one input's weights is handed on to the inputs after it, in each group; axes before are groups.

    order   (…, inputs) the turn in which inputs are rounded
    factor  (…, inputs, inputs) float64, upper: U with UᵀU = H⁻¹, H the damped second moments in that order
    moved   (…, inputs, inputs) float64: weights times this give the exact outputs from the quantized inputs, by least
            squares
    gain    squared error of the outputs that is left, relative to rounding without feedback, where rounding errors are
            alike for all inputs; at most 1, and 1 where inputs are independent
    """

    order: Tensor
    factor: Tensor
    moved: Tensor
    gain: float

    @staticmethod
    def of(moments: Tensor, cross: Tensor | None = None, rows: float = math.inf, damping: float = DAMPING) -> Feedback:
        """From sums over samples of what the weights are multiplied with, in any unit.

        moments  (…, inputs, inputs) Σ x̃ x̃ᵀ
        cross    (…, inputs, inputs) Σ x x̃ᵀ with the inputs x of the exact network; None: they are the same
        rows     how many x there were: few do not tell how all of the weights should move
        """
        hessian, moved, damping = damped(moments, cross, rows, damping)
        order = torch.argsort(hessian.diagonal(dim1=-2, dim2=-1), dim=-1, descending=True, stable=True)
        turned = hessian.gather(-1, order[..., None, :].expand_as(hessian)).gather(
            -2, order[..., None].expand_as(hessian)
        )
        lower = torch.linalg.cholesky(turned)
        factor = torch.linalg.cholesky(torch.cholesky_inverse(lower), upper=True)
        return Feedback(order, factor, moved, float(factor.diagonal(dim1=-2, dim2=-1).pow(-2).mean()) / (1 + damping))


def damped(
    moments: Tensor, cross: Tensor | None, rows: float, damping: float = DAMPING
) -> tuple[Tensor, Tensor, float]:
    """The moments of `Feedback.of` with mean power 1 and damped; `moved` of Feedback; how much was added."""
    inputs = moments.shape[-1]
    damping += SCARCITY * inputs / rows
    power = moments.double().diagonal(dim1=-2, dim2=-1).mean(-1).clamp_min(1e-30)[..., None, None]
    one = torch.eye(inputs, dtype=torch.float64).expand(moments.shape)
    hessian = moments.double() / power + damping * one
    if cross is None:
        return hessian, one, damping
    best = torch.linalg.solve(hessian, cross.double() / power + damping * one, left=False)
    return hessian, one + (best - one) / (1 + inputs / rows), damping


def feed_back(rows: Tensor, feedback: Feedback, rounded: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """Weights that, rounded, change the outputs least.

    rows     (…, outputs, inputs) float
    rounded  (…, outputs) weights of one input of each group, and (…) which input → what they are rounded to
    return   (…, outputs, inputs) float64: each weight with the errors that it makes up for; still to be rounded
    """
    order, factor = feedback.order[..., None, :].expand(rows.shape), feedback.factor
    left = (rows.detach().double() @ feedback.moved).gather(-1, order)
    for start in range(0, left.shape[-1], PART):
        end = min(start + PART, left.shape[-1])
        errors = torch.empty_like(left[..., start:end])
        for i in range(start, end):
            error = (left[..., i] - rounded(left[..., i], feedback.order[..., i])) / factor[..., i, i, None]
            left[..., i + 1 : end] -= error[..., None] * factor[..., i, None, i + 1 : end]
            errors[..., i - start] = error
        left[..., end:] -= errors @ factor[..., start:end, end:]
    return torch.empty_like(left).scatter_(-1, order, left)
