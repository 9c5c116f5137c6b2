"""Rounding errors seen along a direction: Σ g · (x̂ − x) for several scales at once, one pass over x and g.

What a gradient g tells of every candidate range of a tensor, without one of its errors being kept in memory.
"""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from lowbit.machine_code import machine_code
from lowbit.numerics.grids import Int

_PART = 1024  # elements that stay in cache while every scale has its turn


def error_along(rows: Tensor, along: Tensor, scales: Tensor, zeros: Tensor, grid: Int) -> Tensor:
    """Σ along · (x̂ − x) over each row, rounding to nearest under each scale.

    rows, along    (n_rows, n) float32 on the CPU, contiguous
    scales, zeros  (n_scales,)
    return         (n_rows, n_scales) float64
    """
    out = np.empty((len(rows), len(scales)))
    s, z = (t.detach().numpy().astype(np.float32) for t in (scales, zeros))
    _error_along(rows.numpy(), along.numpy(), s, z, np.float32(grid.minimum), np.float32(grid.maximum), out)
    return torch.from_numpy(out)


@machine_code(error_model="numpy", fastmath={"reassoc", "contract", "nsz"})
def _error_along(rows: Any, along: Any, scales: Any, zeros: Any, lowest: Any, highest: Any, out: Any) -> None:
    out[:] = 0
    for row in range(rows.shape[0]):
        for start in range(0, rows.shape[1], _PART):
            x, g = rows[row, start : start + _PART], along[row, start : start + _PART]
            for k in range(scales.shape[0]):
                s = scales[k]
                inverse = np.float32(1) / s if s != 0 else np.float32(0)
                low, high = lowest - zeros[k], highest - zeros[k]
                total = np.float32(0)
                for i in range(x.shape[0]):
                    code = min(max(np.rint(x[i] * inverse), low), high)
                    total += g[i] * (code * s - x[i])
                out[row, k] += float(total)
