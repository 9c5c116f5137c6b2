"""Weight sharing: few values for many weights, found by one-dimensional k-means on the weights that pruning left.

Source: Han et al. 2016 (arXiv 1510.00149), section 3. Where weights are pruned, 0 is one of the values.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from lowbit.errors import InputError
from lowbit.numerics import Format, KMeans, QuantTensor
from lowbit.numerics.rows import from_rows, tiles_to_rows
from lowbit.numerics.sorted_points import SortedPoints
from lowbit.solve.moments import Moments

if TYPE_CHECKING:
    from lowbit.recipe import TensorSpec


def kmeans(weight: Tensor, format: Format, mask: Tensor | None = None) -> QuantTensor:
    """Codes of a weight, and the values that they mean: a table for each tile of a format whose grid is KMeans.

    mask   False where the weight is pruned: 0 is then one of the values

    The grid's Lagrange multiplier is the squared error, relative to the weights' mean square, that one more bit must
    save. Above 0, a frequent code, which is a short one, also gets weights that lie nearer to another value.
    Source: Chou, Lookabaugh and Gray 1989 (entropy-constrained vector quantization)
    """
    assert isinstance(format.grid, KMeans)
    assert format.block is not None
    shape = tuple(weight.shape)
    lengths = format.block.tile(shape)
    rows = tiles_to_rows(weight.detach().float(), lengths)
    kept = tiles_to_rows(torch.ones(shape, dtype=torch.bool) if mask is None else mask, lengths)
    pruned = not bool(kept.all())
    values = (1 << format.grid.bits) - pruned
    found = [_fit(row[keep], format.grid, values) for row, keep in zip(rows, kept, strict=True)]
    below = [int(torch.searchsorted(table, 0.0)) if pruned else 0 for table, _ in found]
    zero, above = max(below), max(len(table) - n for (table, _), n in zip(found, below, strict=True))
    codes = torch.full(rows.shape, zero, dtype=torch.uint8)  # the same code for 0 in all tiles: it is the most frequent
    tables = torch.zeros(len(rows), zero + pruned + above)
    for group, ((table, chosen), n) in enumerate(zip(found, below, strict=True)):
        codes[group][kept[group]] = (chosen + (zero - n) + pruned * (chosen >= n)).to(torch.uint8)
        # Values that a tile does not need lie so far out that no weight comes near them.
        far = 2 * rows[group].abs().max().clamp_min(1e-30)
        spare = far * torch.arange(1, tables.shape[1] + 1)
        parts = [-spare[: zero - n].flip(0), table[:n], torch.zeros(int(pruned)), table[n:]]
        tables[group] = torch.cat([*parts, spare[: above - (len(table) - n)]])
    return QuantTensor(from_rows(codes, shape, lengths), format, lengths, None, table=tables)


def codebook(weight: Tensor, spec: TensorSpec, moments: Moments | None = None) -> QuantTensor:
    """`kmeans` as a solver. A weight that is exactly 0 is pruned."""
    if spec.format is None or not isinstance(spec.format.grid, KMeans):
        raise InputError(f"k-means finds the values of a codebook: it does not serve {spec.format!r}.")
    kept = weight != 0
    return kmeans(weight, spec.format, kept if bool(kept.any()) and not bool(kept.all()) else None)


def refit(stored: QuantTensor, weight: Tensor) -> QuantTensor:
    """The same codes, each value moved to the mean of its weights; a value without weights stays, and so does 0."""
    old = torch.as_tensor(stored.table)
    places = stored.table_positions().reshape(-1)
    flat = tiles_to_rows(weight.detach(), stored.tile).reshape(-1).double()
    counts = torch.bincount(places, minlength=old.numel())
    means = torch.bincount(places, flat, minlength=old.numel()) / counts.clamp_min(1)
    moved = torch.where((counts > 0) & (old.reshape(-1) != 0), means.float(), old.reshape(-1))
    return replace(stored, table=torch.sort(moved.reshape(old.shape)).values)


def as_codebook(stored: QuantTensor) -> QuantTensor:
    """The same numbers as a table for the whole tensor, if it has none yet: a value for each code."""
    if stored.table is not None:
        return stored
    codes = torch.as_tensor(stored.codes)
    every = torch.arange(int(codes.max()) + 1, dtype=torch.uint8).reshape(-1, *[1] * (codes.dim() - 1))
    table = torch.as_tensor(replace(stored, codes=every, tile=tuple(every.shape)).dequantize()).reshape(1, -1)
    return QuantTensor(codes, Format(KMeans(stored.format.grid.bits)), stored.tile, None, table=table)


def _fit(points: Tensor, grid: KMeans, values: int) -> tuple[Tensor, Tensor]:
    """At most `values` shared values for the points, sorted, and which point gets which."""
    distinct = torch.unique(points)
    if len(distinct) <= values:
        return distinct, torch.searchsorted(distinct, points)
    fitted = grid.fit(SortedPoints.of_rows(points.reshape(1, -1)), values)[0]
    table = torch.from_numpy(np.sort(fitted).astype(np.float32))
    codes = torch.searchsorted((table[1:] + table[:-1]) / 2, points)
    if grid.multiplier > 0:
        table, codes = _entropy_constrained(points, table, codes, grid.multiplier)
    used = torch.bincount(codes, minlength=len(table)) > 0
    return table[used], (torch.cumsum(used, 0) - 1)[codes]


def _entropy_constrained(points: Tensor, table: Tensor, codes: Tensor, multiplier: float) -> tuple[Tensor, Tensor]:
    """Lloyd's steps on squared error + multiplier · bits, a code's bits being −log2 of its share."""
    multiplier *= float(points.double().square().mean())
    for _ in range(30):
        shares = np.bincount(codes.numpy(), minlength=len(table)) / len(codes)
        table, alive = table[torch.from_numpy(shares > 0)], shares[shares > 0]
        bits = torch.from_numpy(-np.log2(alive)).float()
        chosen = ((points[:, None] - table[None, :]).square() + multiplier * bits).argmin(dim=1)
        if len(bits) == len(shares) and torch.equal(chosen, codes):
            break
        codes = chosen
        counts = torch.bincount(codes, minlength=len(table))
        means = torch.bincount(codes, points.double(), minlength=len(table)) / counts.clamp_min(1)
        table = torch.where(counts > 0, means, table.double()).float()
    return table, codes
