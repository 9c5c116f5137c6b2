"""Squared error of quantizing weighted points, per block: what every search minimizes."""

from math import inf, log10
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lowbit.machine_code import ANY_ORDER, kernel
from lowbit.numerics.encode import fake_quantize_rows
from lowbit.numerics.grids import Grid, Int, grid_table
from lowbit.numerics.sorted_points import SortedPoints

_FEW = 4  # points for each of the grid's values


def decibels(noise: float, power: float = 1.0) -> float:
    """Signal-to-noise ratio, 10 log10(power / noise); infinite without noise."""
    if noise <= 0:
        return inf
    ratio = power / noise
    return 10 * log10(ratio) if ratio else -inf


class SquaredError:
    """Σ weight · (x - x̂)² under any scale and zero, rounding to nearest; made once, asked often.

    values   (n_blocks or 1, n); sorted where there are weights
    weights  (n_blocks, n), or None for ones

    `Int` goes over the points; a grid with a table goes over its cells, by running sums over the sorted points, unless
    a block has so few points that rounding them takes less time than its cells.
    """

    def __init__(self, values: Tensor, weights: Tensor | None, grid: Grid) -> None:
        self.grid = grid
        self.values = np.ascontiguousarray(values.detach().cpu().numpy(), np.float32)
        ones = np.ones((1, 1), np.float32)
        self.weights = ones if weights is None else np.ascontiguousarray(weights.cpu().numpy(), np.float32)
        self.device = values.device
        self.few = weights is None and self.values.shape[1] <= _FEW * len(grid_table(grid).values)
        if isinstance(grid, Int) or self.few:
            return
        if weights is None:
            self.points = SortedPoints(np.sort(self.values, axis=1))
        else:
            self.points = SortedPoints(self.values, self.weights.astype(np.float64))

    def __call__(self, scale: Tensor, zero: Tensor) -> Tensor:
        """scale, zero (n_blocks, 1) → (n_blocks, 1) float64."""
        s, z = (np.ascontiguousarray(t.detach().cpu().numpy(), np.float32) for t in (scale, zero))
        if self.few and not isinstance(self.grid, Int):
            out = np.empty((len(s), 1))
            x, scales, zeros = (torch.from_numpy(a) for a in (self.values, s, z))
            rounded = fake_quantize_rows(x, scales, zeros, self.grid)
            _squared_difference(self.values, rounded.numpy(), out)
            return torch.from_numpy(out).to(self.device)
        if not isinstance(self.grid, Int):
            table = (grid_table(self.grid).values[None] - z.astype(np.float64)) * s
            return torch.from_numpy(self.points.squared_error(table)).to(self.device)
        if (s == 0).any():  # exact zeros, as under a scale of more than twice the largest value
            largest = max(float(self.values.max()), -float(self.values.min()))
            s = np.where(s == 0, np.float32(min(4 * largest, 3e38) or 1), s)
        out = np.empty((len(s), 1))
        lowest, highest = np.float32(self.grid.minimum), np.float32(self.grid.maximum)
        _int_error(self.values, self.weights, s, z, lowest, highest, out)
        return torch.from_numpy(out).to(self.device)


@kernel(fastmath=ANY_ORDER)
def _int_error(values: Any, weights: Any, scale: Any, zero: Any, lowest: Any, highest: Any, out: Any) -> None:
    # In units of the step: the squares of numbers below 2**-63 or above 2**63 are no float32.
    for block in range(out.shape[0]):
        x = values[block if values.shape[0] > 1 else 0]
        w = weights[block if weights.shape[0] > 1 else 0]
        s = scale[block, 0]
        inverse = np.float32(1) / s
        low, high = lowest - zero[block, 0], highest - zero[block, 0]
        total = 0.0
        for start in range(0, x.shape[0], 1024):
            part = x[start : start + 1024]
            noise = np.float32(0)
            if w.shape[0] == 1:
                for i in range(part.shape[0]):
                    y = part[i] * inverse
                    difference = y - min(max(np.rint(y), low), high)
                    noise += difference * difference
            else:
                share = w[start : start + 1024]
                for i in range(part.shape[0]):
                    y = part[i] * inverse
                    difference = y - min(max(np.rint(y), low), high)
                    noise += share[i] * difference * difference
            total += float(noise)
        out[block, 0] = total * np.float64(s) * np.float64(s)


@kernel
def _squared_difference(values: Any, rounded: Any, out: Any) -> None:
    for block in range(out.shape[0]):
        total = 0.0
        for i in range(values.shape[1]):
            difference = np.float64(values[block, i]) - rounded[block, i]
            total += difference * difference
        out[block, 0] = total
