"""Squared error of quantizing weighted points, per block: what every search minimizes."""

from typing import Any

import numba
import numpy as np
import torch
from torch import Tensor

from lowbit.numerics.grids import Grid, Int
from lowbit.numerics.quantize import fake_quantize_rows


def squared_error(values: Tensor, weights: Tensor, scale: Tensor, zero: Tensor, grid: Grid) -> Tensor:
    """Σ weight · (x - x̂)², rounding to nearest: (n_blocks, 1) float64.

    values   (n_blocks or 1, n)
    weights  (n_blocks, n)
    scale, zero  (n_blocks, 1)
    """
    blocks = max(weights.shape[0], scale.shape[0])
    if isinstance(grid, Int) and not values.is_cuda:
        out = np.empty((blocks, 1))
        _int_error(
            values.to(torch.float32).contiguous().numpy(),
            weights.to(torch.float32).contiguous().numpy(),
            scale.contiguous().numpy(),
            zero.contiguous().numpy(),
            np.float32(grid.minimum),
            np.float32(grid.maximum),
            out,
        )
        return torch.from_numpy(out)
    rows = values.to(torch.float32).expand(blocks, -1)
    difference = (fake_quantize_rows(rows, scale, zero, grid) - rows).to(torch.float64)
    return (difference**2 * weights).sum(1, keepdim=True)


@numba.njit(nogil=True, cache=True, fastmath={"reassoc", "contract", "nsz"})  # type: ignore[untyped-decorator]
def _int_error(values: Any, weights: Any, scale: Any, zero: Any, lowest: Any, highest: Any, out: Any) -> None:
    for block in range(out.shape[0]):
        x = values[min(block, values.shape[0] - 1)]
        w = weights[min(block, weights.shape[0] - 1)]
        s = scale[block, 0]
        inverse = np.float32(1) / s
        low, high = lowest - zero[block, 0], highest - zero[block, 0]
        total = 0.0
        for start in range(0, x.shape[0], 1024):
            part, share = x[start : start + 1024], w[start : start + 1024]
            noise = np.float32(0)
            for i in range(part.shape[0]):
                code = min(max(np.rint(part[i] * inverse), low), high)
                difference = part[i] - code * s
                noise += share[i] * difference * difference
            total += float(noise)
        out[block, 0] = total
