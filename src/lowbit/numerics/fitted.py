"""Grids whose values are fitted to the data, one table for each block: k-means, binary bases, two slopes.

A fitted grid says how many bits a code has and how to find a table of 2**bits values; the tensor that comes of it holds
its table, and is then like any other.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lowbit.errors import InputError
from lowbit.machine_code import kernel
from lowbit.numerics.grids import Fitted
from lowbit.numerics.sorted_points import Doubles, SortedPoints, first_at_least

STARTS = ("optimal", "linear")


def fit_table(grid: Fitted, rows: Tensor) -> Tensor:
    """The table of each row, (n_blocks, 2**bits) float32, sorted."""
    if rows.numel() == 0:
        return torch.zeros(rows.shape[0], 1 << grid.bits)
    largest = np.finfo(np.float32).max  # a sum of bases may exceed it
    table = np.clip(grid.fit(SortedPoints.of_rows(rows)), -largest, largest)
    return torch.from_numpy(np.sort(table.astype(np.float32), axis=1)).to(rows.device)


@dataclass(frozen=True)
class KMeans:
    """A codebook with the least squared error: k-means in one dimension, 2**bits values. Also Lloyd–Max for the data.

    start  "optimal": the best partition of a fine summary of the data, by dynamic programming
           "linear":  equally spaced from the least to the greatest value, the best start of Han et al. 2016
                      (arXiv 1510.00149), section 3.2
    multiplier  Lagrange multiplier of the solver "kmeans": see lowbit.solve.kmeans
    Each start is followed by exact Lloyd steps on all of the data, until no value changes its cluster.
    Source: Lloyd 1982; Max 1960.
    """

    bits: int
    start: str = "optimal"
    multiplier: float = 0.0

    def __post_init__(self) -> None:
        if not 1 <= self.bits <= 8:
            raise InputError(f"{self!r}: bits must be 1 to 8.")
        if self.multiplier < 0:
            raise InputError(f"{self!r}: the multiplier is 0 or more.")
        if self.start not in STARTS:
            raise InputError(f"{self!r}: start must be one of {', '.join(STARTS)}.")

    def fit(self, points: SortedPoints, values: int | None = None) -> Doubles:
        """values   how many: 2**bits, or fewer"""
        codes = values or 1 << self.bits
        lo, hi = points.extremes
        equally_spaced = lo + (hi - lo) * (np.arange(codes) / max(1, codes - 1))
        table = _optimal_start(points, codes) if self.start == "optimal" else equally_spaced
        table = np.ascontiguousarray(table, np.float64)
        _lloyd(points.values, points.sums, table)
        return table


def _optimal_start(points: SortedPoints, codes: int) -> Doubles:
    """Means of the best partition of up to 1024 groups of neighbours (192 where there are many blocks).

    Half of the groups have equal weight, half equal width."""
    table = np.empty((points.blocks, codes))
    cuts = 512 if points.blocks <= 16 else 96
    for block in range(points.blocks):
        line, sums = points.values[min(block, len(points.values) - 1)], points.sums[block]
        count = len(line)
        if count > 2 * cuts:
            by_weight = np.searchsorted(sums[1:, 0], np.linspace(0, sums[-1, 0], cuts + 1))
            by_width = np.searchsorted(line, np.linspace(line[0], line[-1], cuts + 1))
            ends = np.unique(np.concatenate([[0, count], by_weight, by_width]))
        else:
            ends = np.arange(count + 1)
        table[block] = _best_partition(np.ascontiguousarray(sums[ends]), codes, float(line[-1]))
    return table


@kernel
def _cost(sums: Any, start: Any, end: Any) -> Any:
    count, total = sums[end, 0] - sums[start, 0], sums[end, 1] - sums[start, 1]
    return max(0.0, sums[end, 2] - sums[start, 2] - total * total / count) if count > 0 else 0.0


@kernel
def _best_partition(sums: Any, codes: Any, top: Any) -> Any:
    """Means of the parts of the partition with the least squared error; spare means take the last value, `top`.

    best[j] is the least error of the first j groups in so many parts. Its last cut moves right as j grows, so each
    layer is filled by halving: the middle first, its cut bounds both sides.
    """
    groups = sums.shape[0] - 1
    parts = min(codes, groups)
    best, following = np.empty(groups + 1), np.empty(groups + 1)
    cuts = np.zeros((parts + 1, groups + 1), np.int32)
    for j in range(groups + 1):
        best[j] = _cost(sums, 0, j)
    stack = np.empty((64, 4), np.int64)
    for part in range(2, parts + 1):
        following[:part] = 0.0
        depth = 1
        stack[0, 0], stack[0, 1], stack[0, 2], stack[0, 3] = part, groups, part - 1, groups
        while depth:
            depth -= 1
            low, high, cut_low, cut_high = stack[depth]
            middle = (low + high) // 2
            least, cut_at = np.inf, cut_low
            for cut in range(cut_low, min(middle - 1, cut_high) + 1):
                error = best[cut] + _cost(sums, cut, middle)
                if error < least:
                    least, cut_at = error, cut
            following[middle], cuts[part, middle] = least, cut_at
            if low < middle:
                stack[depth, 0], stack[depth, 1], stack[depth, 2], stack[depth, 3] = low, middle - 1, cut_low, cut_at
                depth += 1
            if middle < high:
                stack[depth, 0], stack[depth, 1], stack[depth, 2], stack[depth, 3] = middle + 1, high, cut_at, cut_high
                depth += 1
        best, following = following, best
    table = np.full(codes, top)
    end = groups
    for part in range(parts, 0, -1):
        start = cuts[part, end] if part > 1 else 0
        count = sums[end, 0] - sums[start, 0]
        table[part - 1] = (sums[end, 1] - sums[start, 1]) / count if count > 0 else top
        end = start
    return table


@kernel
def _lloyd(values: Any, sums: Any, table: Any) -> None:
    """Lloyd's steps in place, until no point changes its cluster. An empty cluster keeps its value: order is kept."""
    codes = table.shape[1]
    ends = np.empty(codes, np.int64)
    for block in range(sums.shape[0]):
        line = values[block if values.shape[0] > 1 else 0]
        row = table[block]
        ends[:] = -1
        for _ in range(10000):
            moved, start = False, 0
            for code in range(codes):
                end = line.shape[0]
                if code + 1 < codes:
                    end = first_at_least(line, (row[code] + row[code + 1]) / 2, start)
                moved |= ends[code] != end
                ends[code] = end
                start = end
            if not moved:
                break
            start = 0
            for code in range(codes):
                count = sums[block, ends[code], 0] - sums[block, start, 0]
                if count > 0:
                    row[code] = (sums[block, ends[code], 1] - sums[block, start, 1]) / count
                start = ends[code]


@dataclass(frozen=True)
class Bases:
    """A sum of ±a₁ ± a₂ … ± a_count: as many binary tensors, each with a factor, fitted to the data.

    Alternates nearest codes with the factors' least squares, from several starts: residual means (greedy), and powers
    of two scaled to multiples of the data's spread and to its extremes; the best is kept.
    Source: Zhang et al. 2018 (LQ-Nets, arXiv 1807.10029), algorithm 1; Lin et al. 2017 (ABC-Net, arXiv 1711.11294).
    """

    count: int
    steps: int = 50

    def __post_init__(self) -> None:
        if not 1 <= self.count <= 8:
            raise InputError(f"{self!r}: count must be 1 to 8.")

    @property
    def bits(self) -> int:
        return self.count

    def fit(self, points: SortedPoints) -> Doubles:
        signs = 1.0 - 2.0 * ((np.arange(1 << self.count)[:, None] >> np.arange(self.count)) & 1)
        best_table = np.zeros((points.blocks, len(signs)))
        best_error = np.full((points.blocks, 1), np.inf)
        for factors in self._starts(points):
            for _ in range(self.steps):
                table, error, solved = _solve_bases(points, factors, signs)
                best_table = np.where(error < best_error, table, best_table)
                best_error = np.minimum(error, best_error)
                if np.allclose(solved, factors, rtol=1e-7, atol=0):
                    break
                factors = solved
        return best_table

    def _starts(self, points: SortedPoints) -> list[Doubles]:
        lo, hi = points.extremes
        total = np.maximum(points.sums[:, -1:, 0], 1e-30)
        spread = np.sqrt(points.sums[:, -1:, 2] / total)
        powers: Doubles = np.ldexp(1.0, -np.arange(1, self.count + 1))
        greedy: list[Doubles] = []
        for _ in range(self.count):
            # Mean |residual|: the residual's sign alternates between the values that the earlier bases make.
            signs = 1.0 - 2.0 * ((np.arange(1 << len(greedy))[:, None] >> np.arange(max(1, len(greedy)))) & 1)
            table = sum((a * signs[:, k] for k, a in enumerate(greedy)), np.zeros((points.blocks, len(signs))))
            greedy.append(_mean_distance(points, np.sort(table, axis=1)))
        uniform = [reach * spread * powers for reach in (2.0, 2.7, 3.5, 4.5, 6.5)]
        return [np.concatenate(greedy, axis=1), *uniform, np.maximum(abs(lo), abs(hi)) * powers]


def _mean_distance(points: SortedPoints, table: Doubles) -> Doubles:
    """Mean distance of the points to their nearest table value, (n_blocks, 1)."""
    # From value to middle to value: the piece before and the piece after a value are both nearest to it.
    edges = np.empty((points.blocks, 2 * table.shape[1] - 1))
    edges[:, ::2], edges[:, 1::2] = table, (table[:, 1:] + table[:, :-1]) / 2
    owner = np.repeat(table, 2, axis=1)
    distance = np.zeros((points.blocks, 1))
    for block in range(points.blocks):
        line, sums = points.values[min(block, len(points.values) - 1)], points.sums[block]
        at = np.concatenate([[0], np.searchsorted(line, edges[block]), [len(line)]])
        pieces = sums[at[1:]] - sums[at[:-1]]
        distance[block] = np.abs(pieces[:, 1] - owner[block] * pieces[:, 0]).sum() / max(sums[-1, 0], 1e-30)
    return distance


def _solve_bases(points: SortedPoints, factors: Doubles, signs: Any) -> tuple[Doubles, Doubles, Doubles]:
    """Sorted table of the factors, its error, and the factors with least squares for its codes."""
    sums = factors @ signs.T
    order = np.argsort(sums, axis=1, kind="stable")
    table = np.take_along_axis(sums, order, axis=1)
    cells = points.cells(table)
    error = (cells[:, :, 2] - 2 * table * cells[:, :, 1] + table**2 * cells[:, :, 0]).sum(1, keepdims=True)
    chosen = signs[order]  # (n_blocks, n_codes, count)
    normal = np.einsum("bci,bcj,bc->bij", chosen, chosen, cells[:, :, 0])
    right = np.einsum("bci,bc->bi", chosen, cells[:, :, 1])
    # A small ridge: codes that are not used leave the equations singular.
    ridge = 1e-9 * np.maximum(cells[:, :, 0].sum(1), 1e-30)[:, None, None] * np.eye(factors.shape[1])
    return table, np.maximum(error, 0), np.linalg.solve(normal + ridge, right[:, :, None])[:, :, 0]


@dataclass(frozen=True)
class Piecewise:
    """Two uniform grids: half of the codes for a dense centre [-p, p], half for the tails up to ±m.

    The breakpoint p and the end m ≤ max |x| are fitted in turn, coarse to fine, for the least squared error.
    0 is exact, and takes two codes.
    Source: Fang et al. 2020 (PWLQ, arXiv 2002.00104), eq. 4; there m is the largest |x|.
    """

    bits: int

    def __post_init__(self) -> None:
        if not 3 <= self.bits <= 8:
            raise InputError(f"{self!r}: bits must be 3 to 8.")

    def fit(self, points: SortedPoints) -> Doubles:
        lo, hi = points.extremes
        p = m = np.maximum(abs(lo), abs(hi))
        least = np.full_like(m, np.inf)
        for p_factors, m_factors in _PIECEWISE_STEPS:
            start = p
            for factor in p_factors:
                tried = np.minimum(start * factor, m)
                error = points.squared_error(self.table(tried, m))
                p, least = np.where(error < least, tried, p), np.minimum(error, least)
            start = m
            for factor in m_factors:
                tried = np.maximum(start * factor, p)
                error = points.squared_error(self.table(p, tried))
                m, least = np.where(error < least, tried, m), np.minimum(error, least)
        return self.table(p, m)

    def table(self, p: Doubles, m: Doubles) -> Doubles:
        """2**bits sorted values for breakpoint p and end m, (n_blocks, 1) each; 0 stands twice, once for each sign."""
        side = 1 << (self.bits - 2)
        centre = p * np.arange(side) / (side - 1)
        tail = p + (m - p) * (np.arange(side) + 1.0) / side
        positive = np.concatenate([centre, tail], axis=1)
        return np.concatenate([-positive[:, ::-1], positive], axis=1)


# Factors on the breakpoint, then on the end, that each step of the search tries.
_PIECEWISE_STEPS = (
    ([0.97 - 0.05 * i for i in range(19)], [0.9**i for i in range(25)]),
    ([0.6, 0.7, 0.8, 0.9, 1.1, 1.2, 1.3, 1.45, 1.6], [0.85, 0.9, 0.95, 1.05, 1.1, 1.2]),
    ([0.92, 0.95, 0.975, 1.025, 1.05, 1.08], [0.95, 0.975, 1.025, 1.05]),
    ([0.985, 0.9925, 1.0075, 1.015], [0.985, 1.015]),
)
