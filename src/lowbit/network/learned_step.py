"""Rounding to integers at a step, and the gradients by which the step learns: one pass forward, one backward.

Source: Esser et al. 2020 (LSQ, arXiv 1902.08153), eq. 3. The gradient of the step s is round(x / s) − x / s inside the
range, and the end of the range outside; that of x is 1 inside and 0 outside.

What learns is a multiple p of the step that training began with, s = unit · p, and its gradient is that of s over unit:
then a step of SGD moves s as in the paper, and one of Adam moves it by its rate in parts of s.
"""

from typing import Any

import torch
from torch import Tensor

from lowbit.numerics import Grid, Int
from lowbit.numerics.grids import grid_table
from lowbit.numerics.kernels import kernels

Weights = tuple[float, float, float]


class _Rounded(torch.autograd.Function):
    """Saves x alone: what is in front of it in the network mostly holds it anyway."""

    @staticmethod
    def forward(
        context: Any,
        x: Tensor,
        learned: Tensor | None,
        offset: Tensor | None,
        scale: Tensor,
        unit: Tensor | None,
        ends: tuple[float, float],
        weights: Weights,
    ) -> Tensor:
        context.save_for_backward(x, learned, offset, scale, unit)
        context.ends, context.weights = ends, weights
        return kernels(x).round_to_step(x, scale, *ends)

    @staticmethod
    def backward(context: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x, learned, offset, scale, unit = context.saved_tensors
        passed, sums = kernels(x).step_gradient(x, gradients[0], scale, *context.ends)
        of_learned = of_offset = None
        if learned is not None:
            of_learned = (sums * sums.new_tensor(context.weights)).sum(1).reshape(learned.shape) * learned.sign() / unit
        if offset is not None:
            of_offset = sums[:, 1:].sum().reshape(offset.shape) / unit
        return passed, of_learned, of_offset, None, None, None, None


def round_to_step(
    x: Tensor,
    scale: Tensor,
    low: float,
    high: float,
    learned: Tensor | None = None,
    unit: Tensor | None = None,
    weights: Weights = (0.0, 0.0, 0.0),
    offset: Tensor | None = None,
) -> Tensor:
    """x / scale rounded to the integers low … high, times scale.

    x        any shape with one scale, or rows with scale (n_blocks, 1); float32, or bfloat16 with one scale
    learned  the parameter of scale's size whose magnitude, times `unit`, scale was made of. Its gradient is three sums
             with these weights over unit: of what flows back, times round(x / s) − x / s inside the range; below; above
    offset   a parameter: the lower end of the range in units; its gradient is 1 / unit outside the range
    """
    if not (torch.is_grad_enabled() and (x.requires_grad or learned is not None)):
        return kernels(x).round_to_step(x.detach(), scale, low, high)
    y: Tensor = _Rounded.apply(x, learned, offset, scale, unit, (low, high), weights)  # type: ignore[no-untyped-call]
    return y


class _OnTable(torch.autograd.Function):
    """The same on any grid: only weights come here, which are few."""

    @staticmethod
    def forward(
        context: Any,
        x: Tensor,
        learned: Tensor | None,
        scale: Tensor,
        unit: Tensor | None,
        grid: Grid,
        weights: Weights,
    ) -> Tensor:
        y = kernels(x).fake_quantize(x, scale, torch.zeros_like(scale), grid)
        context.save_for_backward(x, learned, scale, unit, y)
        context.grid, context.weights = grid, weights
        return y

    @staticmethod
    def backward(context: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x, learned, scale, unit, y = context.saved_tensors
        table, (along,), steps = grid_table(context.grid), gradients, x / scale
        below, above = steps < table.minimum, steps > table.maximum
        passed = torch.where(below | above, 0, along)
        if learned is None:
            return passed, None, None, None, None, None
        parts = (passed * (y / scale - steps), along * below, along * above)
        of_learned = sum(w * part.sum(1, keepdim=True) for w, part in zip(context.weights, parts, strict=True))
        return passed, of_learned * learned.sign() / unit, None, None, None, None


def round_to_grid(
    rows: Tensor, scale: Tensor, grid: Grid, learned: Tensor | None, unit: Tensor, weights: Weights
) -> Tensor:
    """`round_to_step` for rows on any grid."""
    if isinstance(grid, Int):
        return round_to_step(rows, scale, float(grid.minimum), float(grid.maximum), learned, unit, weights)
    y: Tensor = _OnTable.apply(rows, learned, scale, unit, grid, weights)  # type: ignore[no-untyped-call]
    return y
