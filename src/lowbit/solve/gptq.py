"""Rounding with feedback: the error of one weight is made up for by those that are still to be rounded.

Source: Frantar et al. 2022 (arXiv 2210.17323), section 3: optimal brain surgery, one input after another, with the
Cholesky factor of the inverse of the inputs' second moments. Inputs go by falling power here ("act-order"). Where the
inputs already carry errors of layers before, weights first move to where the exact outputs are nearest (Li et al. 2025,
arXiv 2504.02692, has the same aim).
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

DAMPING = 0.02  # share of the mean power of the inputs that is added to each of them
SCARCITY = 0.5  # more of it for every input there is to a row: what few rows have in common may be chance
PART = 64  # inputs whose errors reach the rest together, as one product of matrices


@dataclass(frozen=True)
class Feedback:
    """How the error of one input's weights is handed on to the inputs after it.

    order   (inputs,) the turn in which inputs are rounded
    factor  (inputs, inputs) float64, upper: U with UᵀU = H⁻¹, H the damped second moments in that order
    moved   (inputs, inputs) float64: weights times this give the exact outputs from the rough inputs, by least squares
    gain    squared error of the outputs that is left, relative to rounding without feedback, where rounding errors are
            alike for all inputs; at most 1, and 1 where inputs are independent
    """

    order: Tensor
    factor: Tensor
    moved: Tensor
    gain: float

    @staticmethod
    def of(
        moments: Tensor, cross: Tensor | None = None, rows: float = math.inf, damping: float = DAMPING
    ) -> "Feedback":
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


def gptq(rows: Tensor, feedback: Feedback, nearest: Callable[[Tensor], Tensor]) -> Tensor:
    """Weights that, rounded, change the outputs least.

    rows     (outputs, inputs) float
    nearest  (outputs,) of one input's weights → the numbers that they are rounded to
    return   (outputs, inputs) float64: each weight with the errors that it makes up for; still to be rounded
    """
    left = (rows.detach().double() @ feedback.moved)[:, feedback.order]
    factor = feedback.factor
    for start in range(0, left.shape[1], PART):
        end = min(start + PART, left.shape[1])
        errors = torch.empty(len(left), end - start, dtype=torch.float64)
        for i in range(start, end):
            errors[:, i - start] = (left[:, i] - nearest(left[:, i])) / factor[i, i]
            left[:, i + 1 : end] -= errors[:, i - start, None] * factor[i, i + 1 : end]
        left[:, end:] -= errors @ factor[start:end, end:]
    fed = torch.empty_like(left)
    fed[:, feedback.order] = left
    return fed
