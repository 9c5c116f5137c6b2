"""Sorted weighted points with running sums: the error of any table of values in time that does not grow with the data.

In one dimension, the points that round to a value are neighbours once they are sorted. Their count, sum and sum of
squares are differences of running sums, so a step of k-means or one more bound costs a few binary searches.
"""

from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from lowbit.machine_code import kernel

Doubles = npt.NDArray[np.float64]


class SortedPoints:
    """Points of each block in ascending order, with running sums.

    values  (n_blocks or 1, n) float32
    sums    (n_blocks, n + 1, 3) float64: running count, sum and sum of squares
    """

    def __init__(self, values: npt.NDArray[np.float32], weights: Doubles | None = None) -> None:
        self.values = values
        blocks = len(values) if weights is None else len(weights)
        self.sums = np.zeros((blocks, values.shape[1] + 1, 3))
        _running_sums(values, np.ones((1, 1)) if weights is None else weights, self.sums)

    @classmethod
    def of_rows(cls, rows: Tensor) -> "SortedPoints":
        """Rows (n_blocks, n) of a tensor, every value with weight one."""
        return cls(np.sort(rows.detach().to("cpu", torch.float32).numpy(), axis=1))

    @property
    def blocks(self) -> int:
        return len(self.sums)

    @property
    def extremes(self) -> tuple[Doubles, Doubles]:
        """Least and greatest value of each block, (n_blocks, 1)."""
        shape = (self.blocks, 1)
        return (
            np.broadcast_to(self.values[:, :1], shape).astype(np.float64),
            np.broadcast_to(self.values[:, -1:], shape).astype(np.float64),
        )

    def cells(self, table: npt.NDArray[np.floating[Any]]) -> Doubles:
        """Count, sum and sum of squares of what is nearest to each value: (n_blocks, n_codes, 3).

        table  sorted, (n_blocks or 1, n_codes)
        """
        out = np.empty((self.blocks, table.shape[1], 3))
        _cells(self.values, self.sums, np.ascontiguousarray(table, np.float64), out)
        return out

    def squared_error(self, table: npt.NDArray[np.floating[Any]]) -> Doubles:
        """Σ weight · (x - nearest value)², (n_blocks, 1)."""
        count, total, squares = np.moveaxis(self.cells(table), 2, 0)
        error: Doubles = (squares - 2 * table * total + table**2 * count).sum(1, keepdims=True)
        return np.maximum(error, 0.0)


@kernel
def _running_sums(values: Any, weights: Any, sums: Any) -> None:
    for block in range(sums.shape[0]):
        line = values[block if values.shape[0] > 1 else 0]
        share = weights[block if weights.shape[0] > 1 else 0]
        one = weights.shape[1] == 1
        count, total, squares = 0.0, 0.0, 0.0
        for i in range(line.shape[0]):
            w, x = share[0] if one else share[i], np.float64(line[i])
            count += w
            total += w * x
            squares += w * x * x
            sums[block, i + 1, 0], sums[block, i + 1, 1], sums[block, i + 1, 2] = count, total, squares


@kernel
def first_at_least(line: Any, limit: Any, low: Any) -> Any:
    """Position of the first value ≥ limit in a sorted line, searched from `low` on."""
    high = line.shape[0]
    while low < high:
        middle = (low + high) // 2
        if line[middle] < limit:
            low = middle + 1
        else:
            high = middle
    return low


@kernel
def _cells(values: Any, sums: Any, table: Any, out: Any) -> None:
    codes = table.shape[1]
    for block in range(sums.shape[0]):
        line = values[block if values.shape[0] > 1 else 0]
        row = table[block if table.shape[0] > 1 else 0]
        start = 0
        for code in range(codes):
            end = line.shape[0]
            if code + 1 < codes:
                end = first_at_least(line, (row[code] + row[code + 1]) / 2, start)
            for k in range(3):
                out[block, code, k] = sums[block, end, k] - sums[block, start, k]
            start = end
