"""Rounding to integers at a step, and the gradients by which the step learns: one pass forward, one backward.

Source: Esser et al. 2020 (LSQ, arXiv 1902.08153), eq. 3. The gradient of the step s is round(x / s) − x / s inside the
range, and the end of the range outside; that of x is 1 inside and 0 outside.

What learns is a multiple p of the step that training began with, s = unit · p, and its gradient is that of s over unit:
then a step of SGD moves s as in the paper, and one of Adam moves it by its rate in parts of s.
"""

from typing import Any

import torch
from torch import Tensor

from lowbit.numerics import Grid
from lowbit.numerics.grids import grid_table
from lowbit.numerics.kernels import kernels

Weights = tuple["Tensor | float", "Tensor | float", "Tensor | float"]


class _Rounded(torch.autograd.Function):
    """Saves marks in the place of x: where x lies, and how far from its integer. See `Kernels`.

    Marks have half of x's width: of float32 the distance is known to 2⁻¹⁷ steps, of bfloat16, which itself has 8 bits,
    to 2⁻⁹. One byte serves where nothing learns.
    """

    @staticmethod
    def forward(
        context: Any,
        x: Tensor,
        learned: Tensor | None,
        offset: Tensor | None,
        scale: Tensor,
        unit: Tensor | None,
        ends: tuple[Tensor, Tensor, bool],
        weights: Weights,
    ) -> Tensor:
        wide = learned is not None and x.dtype == torch.float32
        y, marks = kernels(x).round_to_step(x, scale, *ends, torch.int16 if wide else torch.int8)
        context.save_for_backward(marks, learned, offset, unit)
        context.weights = weights
        return y

    @staticmethod
    def backward(context: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        marks, learned, offset, unit = context.saved_tensors
        passed, sums = kernels(marks).step_gradient(marks, gradients[0])
        of_learned = of_offset = None
        if learned is not None:
            total = sum(weight * part for weight, part in zip(context.weights, sums, strict=True))
            of_learned = total.reshape(learned.shape) * learned.sign() / unit
        if offset is not None:
            of_offset = sums[1:].sum().reshape(offset.shape) / unit
        return passed, of_learned, of_offset, None, None, None, None


def round_to_step(
    x: Tensor,
    scale: Tensor,
    low: Tensor,
    high: Tensor,
    past_low: bool = False,
    learned: Tensor | None = None,
    unit: Tensor | None = None,
    weights: Weights = (0.0, 0.0, 0.0),
    offset: Tensor | None = None,
) -> Tensor:
    """x / scale rounded to the integers low … high, times scale.

    x         any shape, float32 or bfloat16
    scale     one number, as low and high
    past_low  x at the lower end has no gradient
    learned   the parameter whose magnitude, times `unit`, scale was made of. Its gradient is three sums with these
              weights over unit: of what flows back, times round(x / s) − x / s inside the range; below; above
    offset    a parameter: the lower end of the range in units; its gradient is 1 / unit outside the range
    """
    if not (torch.is_grad_enabled() and (x.requires_grad or learned is not None)):
        return kernels(x).round_to_step(x.detach(), scale, low, high, past_low, torch.int8)[0]
    ends = low, high, past_low
    y: Tensor = _Rounded.apply(x, learned, offset, scale, unit, ends, weights)  # type: ignore[no-untyped-call]
    return y


class _OnTable(torch.autograd.Function):
    """Rows on any grid, with a scale each: weights, which are few."""

    @staticmethod
    def forward(
        context: Any,
        x: Tensor,
        learned: Tensor | None,
        scale: Tensor,
        unit: Tensor | None,
        grid: Grid,
        weights: tuple[float, float, float],
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
    rows: Tensor, scale: Tensor, grid: Grid, learned: Tensor | None, unit: Tensor, weights: tuple[float, float, float]
) -> Tensor:
    """`round_to_step` for rows on any grid with scales (n_blocks, 1), whose gradients need all of the rows."""
    y: Tensor = _OnTable.apply(rows, learned, scale, unit, grid, weights)  # type: ignore[no-untyped-call]
    return y
