"""Pruning: which weights stay. A mask is a bool tensor of the weight's shape, True where the weight stays.

A pattern says what is kept or dropped together, a score what matters, a schedule when. Scores compare weights of one
layer (magnitude) or of all layers: by their share of what is left of their layer (LAMP: Lee et al. 2021, arXiv
2010.07611), or by what their loss does to the outputs (as optimal brain damage: LeCun et al. 1990, with one second
derivative for a layer).
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lowbit.errors import InputError, ShapeError

SCOPES = ("layer", "global", "sensitivity")


@dataclass(frozen=True)
class Pruning:
    """How much is pruned, and in which pattern.

    sparsity   share of the weights that become zero, 0 … 1
    scope      "layer": every layer gets this sparsity; "global": all layers together do, by their LAMP scores;
               "sensitivity": all together, by the square of a weight times the sensitivity of its layer
    pattern    "any": single weights; "2:4": the n largest of every m along the summed axis stay, whatever the
               sparsity; "block:4x1": tiles of rows × columns; "channels": whole output channels
    """

    sparsity: float = 0.9
    scope: str = "global"
    pattern: str = "any"

    def __post_init__(self) -> None:
        if not isinstance(self.sparsity, (int, float)) or not 0 <= self.sparsity < 1:
            raise InputError(f"a sparsity is a share from 0 to below 1, not {self.sparsity!r}.")
        if self.scope not in SCOPES:
            raise InputError(f"pruning goes by {', '.join(SCOPES)}, not by '{self.scope}'.")
        if not re.fullmatch(r"any|channels|[1-9]\d*:[1-9]\d*|block:[1-9]\d*x[1-9]\d*", str(self.pattern)):
            raise InputError(f"no pattern '{self.pattern}'; there are any, channels, N:M (2:4), block:RxC (block:4x1).")

    def told(self) -> float | dict[str, Any]:
        """As a recipe has it: the share alone, or what differs from the defaults."""
        changed = {
            name: value for name in ("scope", "pattern") if (value := getattr(self, name)) != getattr(Pruning, name)
        }
        return {"sparsity": self.sparsity} | changed if changed else self.sparsity

    @property
    def n_of_m(self) -> tuple[int, int] | None:
        """(n, m) of an n:m pattern."""
        if ":" not in self.pattern or self.pattern.startswith("block"):
            return None
        n, m = map(int, self.pattern.split(":"))
        if n >= m:
            raise InputError(f"the pattern '{self.pattern}' keeps everything: n must be below m.")
        return n, m

    def masks(
        self,
        weights: Mapping[str, Tensor],
        sparsity: float | None = None,
        sensitivity: Mapping[str, float] | None = None,
    ) -> dict[str, Tensor]:
        """Name → mask, at this sparsity (by default the final one). Weights are (rows, columns…), rows their outputs.

        sensitivity   of each weight, which the scope of that name needs; see lowbit.repair.sensitivity

        ShapeError where an n:m pattern or a block does not fit a weight.
        """
        share = self.sparsity if sparsity is None else sparsity
        if self.n_of_m is not None:
            return {name: n_of_m_mask(weight, *self.n_of_m) for name, weight in weights.items()}
        units = {name: self._units(name, weight) for name, weight in weights.items()}
        if self.scope == "layer":
            kept = {name: keep_largest(e, e.numel() - round(share * e.numel())) for name, e in units.items()}
        else:
            sizes = {name: weight.numel() // units[name].numel() for name, weight in weights.items()}
            if self.scope == "sensitivity":
                units = {name: e * (sensitivity or {}).get(name, 1.0) for name, e in units.items()}
            kept = keep_globally(units, sizes, share, lamp_scores if self.scope == "global" else np.asarray)
        return {name: self._spread(kept[name], weight) for name, weight in weights.items()}

    def _units(self, name: str, weight: Tensor) -> Tensor:
        """Mean energy of what is kept or dropped together."""
        energy = weight.detach().float().square()
        if self.pattern == "any":
            return energy
        rows = energy.reshape(len(energy), -1)
        if self.pattern == "channels":
            return rows.mean(dim=1)
        height, width = map(int, self.pattern.removeprefix("block:").split("x"))
        if rows.shape[0] % height or rows.shape[1] % width:
            raise ShapeError(f"blocks of {height}×{width} do not fit '{name}' of {rows.shape[0]}×{rows.shape[1]}.")
        return rows.unfold(0, height, height).unfold(1, width, width).mean(dim=(2, 3))

    def _spread(self, kept: Tensor, weight: Tensor) -> Tensor:
        """A decision for each unit as a mask of the weight's shape."""
        if self.pattern == "any":
            return kept
        if self.pattern == "channels":
            return kept.reshape(-1, *[1] * (weight.dim() - 1)).expand(weight.shape).clone()
        height, width = map(int, self.pattern.removeprefix("block:").split("x"))
        return kept.repeat_interleave(height, 0).repeat_interleave(width, 1).reshape(weight.shape)


def keep_largest(energy: Tensor, count: int) -> Tensor:
    """True for the `count` largest, at least one. Ties: the earlier element stays."""
    flat = energy.detach().cpu().numpy().reshape(-1)
    count = min(max(1, count), flat.size)
    least = np.partition(flat, flat.size - count)[flat.size - count]
    mask = flat > least
    mask[np.flatnonzero(flat == least)[: count - int(mask.sum())]] = True
    return torch.from_numpy(mask.reshape(tuple(energy.shape))).to(energy.device)


def lamp_scores(energies: NDArray[np.float32]) -> NDArray[np.float64]:
    """Energies (n,) in falling order → each one's share of all that come up to it, itself included.

    Source: Lee et al. 2021, eq. 4. The largest of a layer scores 1, so no layer is ever emptied.
    """
    return np.asarray(energies / np.maximum(np.cumsum(energies, dtype=np.float64), 1e-300))


def keep_globally(
    units: Mapping[str, Tensor],
    sizes: Mapping[str, int],
    sparsity: float,
    score: Callable[[NDArray[np.float32]], NDArray[Any]] = lamp_scores,
) -> dict[str, Tensor]:
    """Masks over all layers by the scores of energies in falling order; `sizes` are the weights of one unit."""
    scores = {name: score(np.sort(energy.detach().cpu().numpy().reshape(-1))[::-1]) for name, energy in units.items()}
    every = np.concatenate(list(scores.values()))
    weight = np.concatenate([np.full(len(scores[name]), sizes[name]) for name in scores])
    falling = np.argsort(-every)
    last = int(np.searchsorted(np.cumsum(weight[falling]), (1 - sparsity) * weight.sum(), side="right"))
    least = every[falling[max(0, last - 1)]]
    return {name: keep_largest(units[name], int((score >= least).sum())) for name, score in scores.items()}


def n_of_m_mask(weight: Tensor, n: int, m: int) -> Tensor:
    """True for the n largest of every m weights along the inputs; the first of equals stays."""
    rows = weight.detach().abs().reshape(len(weight), -1)
    if rows.shape[1] % m:
        raise ShapeError(f"{n}:{m} does not fit a weight of {tuple(weight.shape)}: {rows.shape[1]} inputs.")
    groups = rows.reshape(-1, m)
    mask = torch.zeros_like(groups, dtype=torch.bool)
    mask.scatter_(1, torch.argsort(groups, dim=1, descending=True, stable=True)[:, :n], True)
    return mask.reshape(weight.shape)


def cubic_sparsity(step: int, steps: int, final: float) -> float:
    """Sparsity after `step` of `steps`: final · (1 − (1 − step/steps)³).

    Source: Zhu and Gupta 2017 (arXiv 1710.01878), eq. 1, from 0 on: fast while there is much to spare, slow at the end.
    """
    left = 1 - min(step, steps) / steps if steps else 0.0
    return final * (1 - left**3)
