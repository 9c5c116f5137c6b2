"""Weight sharing: few values for many weights, zero among them; which weight gets which.

Source: Han et al. 2016 (arXiv 1510.00149), section 3. The values are found by exact one-dimensional k-means on the
weights that pruning left; zero keeps a code of its own, so a pruned weight stays zero.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from lowbit.errors import InputError
from lowbit.numerics import KMeans
from lowbit.numerics.fitted import fit_table


@dataclass(frozen=True)
class Shared:
    """A weight as codes into tables of shared values.

    codes   uint8, the weight's shape; code 0 is a zero weight where anything was pruned
    tables  (groups, n) float32, rising order after the leading zero; group g serves the g-th part of axis 0
    zero    whether code 0 means exactly 0 and stays so
    """

    codes: Tensor
    tables: Tensor
    zero: bool

    def positions(self) -> Tensor:
        """(elements,) where in the flattened tables each weight's value is."""
        flat = self.codes.reshape(len(self.tables), -1).long()
        offsets = torch.arange(len(self.tables)).reshape(-1, 1) * self.tables.shape[1]
        return (flat + offsets).reshape(-1)

    def dense(self) -> Tensor:
        """The weight that is meant."""
        return self.tables.reshape(-1)[self.positions()].reshape(self.codes.shape)


def share(
    weight: Tensor, mask: Tensor | None, bits: int, *, groups: int = 1, start: str = "linear", rate: float = 0.0
) -> Shared:
    """Codes of at most `bits` bits for a weight, and the values that they mean.

    mask     False where the weight is pruned: these get code 0, value 0
    groups   parts of axis 0 that have a table of their own; must divide it
    start    of k-means: "linear" as in the paper, "optimal", "density", "random"
    rate     > 0: entropy-constrained: a code may lie further from its weight if its symbol is cheaper; the price of a
             bit in units of the weights' mean square. Source: Chou, Lookabaugh and Gray 1989
    """
    if not 1 <= bits <= 8:
        raise InputError(f"a codebook has 1 to 8 bits, not {bits}.")
    if len(weight) % groups:
        raise InputError(f"{groups} tables do not fit an axis of {len(weight)}: the number must divide it.")
    pruned = mask is not None and not bool(mask.all())
    values = (1 << bits) - pruned
    rows = weight.detach().float().reshape(groups, -1)
    kept = torch.ones_like(rows, dtype=torch.bool) if mask is None else mask.reshape(groups, -1)
    codes = torch.zeros(rows.shape, dtype=torch.uint8)
    tables = torch.zeros(groups, 1 << bits)
    for group in range(groups):
        points = rows[group][kept[group]]
        if not points.numel():
            continue
        table, chosen = _fit(points, values, bits, start, rate)
        tables[group, pruned : pruned + len(table)] = table
        codes[group][kept[group]] = (chosen + pruned).to(torch.uint8)
    used = int(codes.max()) + 1
    return Shared(codes.reshape(weight.shape), tables[:, :used].contiguous(), pruned)


def nearest_codes(weight: Tensor, mask: Tensor | None, tables: Tensor, zero: bool) -> Tensor:
    """Codes (uint8, the weight's shape) of the nearest value in each group's table; pruned weights get code 0.

    tables   as in Shared; the values after the leading zero, if there is one, in rising order
    """
    rows = weight.detach().reshape(len(tables), -1)
    codes = torch.empty(rows.shape, dtype=torch.uint8)
    for group, table in enumerate(tables):
        values = table[int(zero) :]
        codes[group] = (_nearest(rows[group], values) + int(zero)).to(torch.uint8) if len(values) else 0
    codes = codes.reshape(weight.shape)
    return codes if mask is None or not zero else codes * mask


def refit(weight: Tensor, shared: "Shared") -> "Shared":
    """The same codes, each value moved to the mean of its weights; a value without weights, and zero, stay."""
    flat, count = shared.positions(), shared.tables.numel()
    sums = torch.bincount(flat, weight.detach().reshape(-1).double(), minlength=count)
    counts = torch.bincount(flat, minlength=count)
    means = torch.where(counts > 0, sums / counts.clamp_min(1), shared.tables.reshape(-1).double())
    tables = means.float().reshape(shared.tables.shape)
    if shared.zero:
        tables[:, 0] = 0
        tables[:, 1:] = torch.sort(tables[:, 1:]).values
    return Shared(shared.codes, tables if shared.zero else torch.sort(tables).values, shared.zero)


def _fit(points: Tensor, values: int, bits: int, start: str, rate: float) -> tuple[Tensor, Tensor]:
    """At most `values` shared values for the points, and which point gets which."""
    distinct = torch.unique(points)
    if len(distinct) <= values:
        return distinct, torch.searchsorted(distinct, points)
    table = fit_table(KMeans(bits, start), points.reshape(1, -1))[0]
    if values < len(table):  # one code is taken by zero: drop the two-values merge that costs least, then settle
        table = _settle(points, _merged(points, table))
    codes = _nearest(points, table)
    return _entropy_constrained(points, table, codes, rate) if rate > 0 else _compact(table, codes)


def _nearest(points: Tensor, table: Tensor) -> Tensor:
    return torch.searchsorted((table[1:] + table[:-1]) / 2, points)


def _means(points: Tensor, table: Tensor, codes: Tensor) -> Tensor:
    counts = torch.bincount(codes, minlength=len(table))
    sums = torch.bincount(codes, points.double(), minlength=len(table))
    return torch.where(counts > 0, sums / counts.clamp_min(1), table.double()).float()


def _merged(points: Tensor, table: Tensor) -> Tensor:
    """The table with its cheapest pair of neighbours made one."""
    counts = torch.bincount(_nearest(points, table), minlength=len(table)).double()
    a, b = counts[:-1], counts[1:]
    cost = a * b / (a + b).clamp_min(1) * (table[1:] - table[:-1]).double().square()
    at = int(cost.argmin())
    mean = (a[at] * table[at] + b[at] * table[at + 1]) / (a[at] + b[at]).clamp_min(1)
    return torch.cat([table[:at], mean.float().reshape(1), table[at + 2 :]])


def _settle(points: Tensor, table: Tensor, steps: int = 100) -> Tensor:
    """Lloyd's steps until no value moves."""
    for _ in range(steps):
        moved = _means(points, table, _nearest(points, table))
        if torch.equal(moved, table):
            break
        table = torch.sort(moved).values
    return table


def _entropy_constrained(points: Tensor, table: Tensor, codes: Tensor, rate: float) -> tuple[Tensor, Tensor]:
    """Lloyd's steps on squared error + price · bits, a code's bits being −log2 of its share."""
    price = rate * float(points.double().square().mean())
    for _ in range(30):
        shares = np.bincount(codes.numpy(), minlength=len(table)) / len(codes)
        table, alive = table[torch.from_numpy(shares > 0)], shares[shares > 0]
        bits = torch.from_numpy(-np.log2(alive)).float()
        costs = (points[:, None] - table[None, :]).square() + price * bits
        chosen = costs.argmin(dim=1)
        if len(bits) == len(shares) and torch.equal(chosen, codes):
            break
        codes = chosen
        table = _means(points, table, codes)
    return _compact(table, codes)


def _compact(table: Tensor, codes: Tensor) -> tuple[Tensor, Tensor]:
    """Without the values that nobody uses."""
    used = torch.bincount(codes, minlength=len(table)) > 0
    places = torch.cumsum(used, 0) - 1
    return table[used], places[codes]
