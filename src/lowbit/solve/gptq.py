"""GPTQ: the rounding error of one weight is made up for by those that are still to be rounded.

Source: Frantar et al. 2022 (arXiv 2210.17323), section 3: optimal brain surgery, one input after another, with the
Cholesky factor of the inverse of the inputs' second moments. Inputs go by falling power here ("act-order"). Where the
inputs already carry errors of layers before, weights first move to where the exact outputs are nearest (Li et al. 2025,
arXiv 2504.02692, has the same aim).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lowbit.graph.layer import by_group, of_groups
from lowbit.numerics import QuantTensor, from_rows
from lowbit.numerics.encode import decode_rows, encode_rows
from lowbit.numerics.qtensor import as_torch
from lowbit.numerics.rows import expand_tiles, tiles_to_rows
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
    if moments is None:
        return start
    groups, shape, axis = len(moments.quantized), weight.shape, moments.output_axis
    scale, zero = (as_torch(t).reshape(-1, 1) for t in (start.scale_values(), start.zero_values()))
    table, grid = None if start.table is None else as_torch(start.table), start.format.grid

    def in_rows(x: Tensor) -> Tensor:
        return torch.as_tensor(by_group(x, groups, axis)).flatten(2)

    numbers = torch.arange(math.prod(start.tiles)).reshape(start.tiles)
    own_tile = in_rows(expand_tiles(numbers, tuple(shape), start.tile))  # (groups, outputs, inputs)

    def rounded(column: Tensor, tile_of: Tensor) -> Tensor:
        values = None if table is None else table[tile_of]
        codes = encode_rows(column.float().reshape(-1, 1), scale[tile_of], zero[tile_of], grid, table=values)
        return decode_rows(codes, scale[tile_of], zero[tile_of], grid, values).reshape(-1).double()

    parts = []
    for group, (rows, tiles) in enumerate(zip(in_rows(weight.detach()), own_tile, strict=True)):
        feedback = Feedback.of(moments.quantized[group], moments.cross[group], moments.rows)
        parts.append(feed_back(rows, feedback, lambda column, i, tiles=tiles: rounded(column, tiles[:, i])))  # type: ignore[misc]
    fed = of_groups(torch.stack(parts).float(), tuple(shape), axis)
    codes = encode_rows(tiles_to_rows(fed.contiguous(), start.tile), scale, zero, grid, table=table)
    return replace(start, codes=from_rows(codes, tuple(shape), start.tile))


@dataclass(frozen=True)
class Feedback:
    """How the error of one input's weights is handed on to the inputs after it.

    order   (inputs,) the turn in which inputs are rounded
    factor  (inputs, inputs) float64, upper: U with UᵀU = H⁻¹, H the damped second moments in that order
    moved   (inputs, inputs) float64: weights times this give the exact outputs from the quantized inputs, by least
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

        moments  (inputs, inputs) Σ x̃ x̃ᵀ
        cross    (inputs, inputs) Σ x x̃ᵀ with the inputs x of the exact network; None: they are the same
        rows     how many x there were: few do not tell how all of the weights should move
        """
        power = moments.diagonal().double().mean().clamp_min(1e-30)
        one = torch.eye(len(moments), dtype=torch.float64)
        damping += SCARCITY * len(one) / rows
        damped = moments.double() / power + damping * one
        moved = one
        if cross is not None:
            best = torch.linalg.solve(damped, cross.double() / power + damping * one, left=False)
            moved = one + (best - one) / (1 + len(one) / rows)
        order = torch.argsort(damped.diagonal(), descending=True, stable=True)
        lower = torch.linalg.cholesky(damped[order][:, order])
        factor = torch.linalg.cholesky(torch.cholesky_inverse(lower), upper=True)
        return Feedback(order, factor, moved, float(factor.diagonal().pow(-2).mean()) / (1 + damping))


def feed_back(rows: Tensor, feedback: Feedback, rounded: Callable[[Tensor, int], Tensor]) -> Tensor:
    """Weights that, rounded, change the outputs least.

    rows     (outputs, inputs) float
    rounded  (outputs,) weights of one input, and which input → the numbers that they are rounded to
    return   (outputs, inputs) float64: each weight with the errors that it makes up for; still to be rounded
    """
    left = (rows.detach().double() @ feedback.moved)[:, feedback.order]
    factor, inputs = feedback.factor, feedback.order.tolist()
    for start in range(0, left.shape[1], PART):
        end = min(start + PART, left.shape[1])
        errors = torch.empty(len(left), end - start, dtype=torch.float64)
        for i in range(start, end):
            errors[:, i - start] = (left[:, i] - rounded(left[:, i], inputs[i])) / factor[i, i]
            left[:, i + 1 : end] -= errors[:, i - start, None] * factor[i, i + 1 : end]
        left[:, end:] -= errors @ factor[start:end, end:]
    fed = torch.empty_like(left)
    fed[:, feedback.order] = left
    return fed
