"""Which option for each layer: the least of one amount under limits on others, as an integer program.

    minimise    Σ_l Σ_f a(l, f) x(l, f) + Σ_v a(v) z(v)          a: the amount to be minimised
    subject to  Σ_f x(l, f) = 1                                 one option f for each layer l
                z(v) ≥ 1 − Σ_{f in float} x(l, f)               a value v is quantized while a layer l around it is
                Σ_l Σ_f b(l, f) x(l, f) + Σ_v b(v) z(v) ≤ B     b: each amount that has a limit B
                x binary, 0 ≤ z ≤ 1

Solved by HiGHS through `scipy.optimize.milp`. Source of the idea: HAWQ-V3 (Yao et al. 2021, arXiv 2011.10680), eq. 7.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import coo_array

Amounts = Mapping[str, float]  # as error, bytes, seconds; what is not named is 0
GAP = 1e-3  # of the least amount: how far above it a solution may be
SECONDS = 20.0  # after which the best solution so far counts


@dataclass(frozen=True)
class Option:
    """What may become of a layer, and what that takes."""

    amounts: Amounts
    in_float: bool = False


@dataclass(frozen=True)
class Between:
    """A value between layers: its amounts fall away where all layers around it, at least one, are in float."""

    amounts: Amounts
    layers: Sequence[str]


@dataclass(frozen=True)
class Program:
    """Layer → its options, and the values between layers."""

    options: Mapping[str, Sequence[Option]]
    values: Sequence[Between] = ()

    def least(self, minimise: str, limits: Amounts | None = None) -> dict[str, int] | None:
        """Layer → index of its option; None where no choice keeps the limits."""
        flat = [(layer, option) for layer, several in self.options.items() for option in several]
        columns = [*(option.amounts for _, option in flat), *(value.amounts for value in self.values)]
        places = {layer: [i for i, (owner, _) in enumerate(flat) if owner == layer] for layer in self.options}
        in_float = {layer: [i for i in places[layer] if flat[i][1].in_float] for layer in self.options}

        def one_each() -> Iterator[list[int]]:
            yield from places.values()

        def around() -> Iterator[list[int]]:
            for number, value in enumerate(self.values, start=len(flat)):
                yield from ([number, *in_float[layer]] for layer in value.layers)
                if not value.layers:
                    yield [number]

        constraints = [LinearConstraint(_ones(list(one_each()), len(columns)), 1, 1)]
        if rows := list(around()):
            constraints.append(LinearConstraint(_ones(rows, len(columns)), 1, np.inf))
        for name, limit in (limits or {}).items():
            taken = np.array([amounts.get(name, 0.0) for amounts in columns])
            scale = max(abs(limit), 1e-30)  # HiGHS keeps constraints to 1e-6 whatever the unit
            constraints.append(LinearConstraint(taken / scale, -np.inf, limit / scale))
        costs = np.array([amounts.get(minimise, 0.0) for amounts in columns])
        whole = np.arange(len(columns)) < len(flat)
        found = milp(
            costs / max(np.abs(costs).max(initial=0), 1e-30),
            integrality=whole.astype(int),
            bounds=Bounds(0, 1),
            constraints=constraints,
            # With presolve HiGHS (1.12) prints lines of its own to stdout.
            options={"mip_rel_gap": GAP, "time_limit": SECONDS, "presolve": False},
        )
        if found.x is None:
            return None
        return {layer: int(np.argmax(found.x[own])) for layer, own in places.items()}

    def total(self, chosen: Mapping[str, int]) -> dict[str, float]:
        """All amounts of a choice."""
        taken = {layer: self.options[layer][index] for layer, index in chosen.items()}
        kept = [v.amounts for v in self.values if not v.layers or any(not taken[x].in_float for x in v.layers)]
        found: dict[str, float] = {}
        for amounts in (*(option.amounts for option in taken.values()), *kept):
            for name, amount in amounts.items():
                found[name] = found.get(name, 0.0) + amount
        return found


def _ones(rows: Sequence[Sequence[int]], columns: int) -> coo_array:
    """A matrix with ones at these columns of each row."""
    at = [(row, column) for row, several in enumerate(rows) for column in several]
    return coo_array((np.ones(len(at)), tuple(np.array(at).T)), shape=(len(rows), columns))
