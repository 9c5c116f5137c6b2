"""Pruning: which weights stay. A mask is a bool tensor of the weight's shape, True where the weight stays.

A pattern says what is kept or dropped together, a score what matters, a schedule when. Scores compare weights of one
layer (magnitude) or of all layers (LAMP: Lee et al. 2021, arXiv 2010.07611).
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from lowbit.errors import InputError, ShapeError

SCOPES = ("layer", "global")


@dataclass(frozen=True)
class Pruning:
    """How much is pruned, and in which pattern.

    sparsity   share of the weights that become zero, 0 … 1
    scope      "layer": every layer gets this sparsity; "global": all layers together do, by their LAMP scores
    pattern    "any": single weights; "2:4": the n largest of every m along the summed axis stay, whatever the
               sparsity; "block:4x1": tiles of rows × columns; "channels": whole output channels
    """

    sparsity: float = 0.9
    scope: str = "global"
    pattern: str = "any"

    def __post_init__(self) -> None:
        if not 0 <= self.sparsity < 1:
            raise InputError(f"a sparsity is a share from 0 to below 1, not {self.sparsity}.")
        if self.scope not in SCOPES:
            raise InputError(f"pruning goes by {' or '.join(SCOPES)}, not by '{self.scope}'.")
        if not re.fullmatch(r"any|channels|[1-9]\d*:[1-9]\d*|block:[1-9]\d*x[1-9]\d*", self.pattern):
            raise InputError(f"no pattern '{self.pattern}'; there are any, channels, N:M (2:4), block:RxC (block:4x1).")

    @property
    def n_of_m(self) -> tuple[int, int] | None:
        """(n, m) of an n:m pattern."""
        if ":" not in self.pattern or self.pattern.startswith("block"):
            return None
        n, m = map(int, self.pattern.split(":"))
        if n >= m:
            raise InputError(f"the pattern '{self.pattern}' keeps everything: n must be below m.")
        return n, m

    def masks(self, weights: Mapping[str, Tensor], sparsity: float | None = None) -> dict[str, Tensor]:
        """Name → mask, at this sparsity (by default the final one). Weights are (rows, columns…), rows their outputs.

        ShapeError where an n:m pattern or a block does not fit a weight.
        """
        share = self.sparsity if sparsity is None else sparsity
        if self.n_of_m is not None:
            return {name: n_of_m_mask(weight, *self.n_of_m) for name, weight in weights.items()}
        units = {name: self._units(name, weight) for name, weight in weights.items()}
        if self.scope == "layer":
            kept = {name: keep_largest(energy, share) for name, energy in units.items()}
        else:
            sizes = {name: weight.numel() // units[name].numel() for name, weight in weights.items()}
            kept = keep_globally(units, sizes, share)
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


def keep_largest(energy: Tensor, sparsity: float) -> Tensor:
    """True for the largest of `energy`; at least one stays. Ties: the earlier element stays."""
    count = max(1, energy.numel() - round(sparsity * energy.numel()))
    order = torch.argsort(energy.reshape(-1), descending=True, stable=True)
    mask = torch.zeros(energy.numel(), dtype=torch.bool, device=energy.device)
    mask[order[:count]] = True
    return mask.reshape(energy.shape)


def lamp_scores(energy: Tensor) -> Tensor:
    """Each unit's energy over that of all units of its layer that are at least as large, itself included.

    Source: Lee et al. 2021, eq. 4. The largest of a layer scores 1, so no layer is ever emptied.
    """
    flat = energy.reshape(-1)
    order = torch.argsort(flat, descending=True, stable=True)
    running = torch.cumsum(flat[order].double(), 0)
    scores = torch.empty_like(running)
    scores[order] = flat[order].double() / running.clamp_min(1e-300)
    return scores.reshape(energy.shape)


def keep_globally(units: Mapping[str, Tensor], sizes: Mapping[str, int], sparsity: float) -> dict[str, Tensor]:
    """Masks over all layers by LAMP scores; `sizes` are the weights of one unit of each layer."""
    scores = {name: lamp_scores(energy) for name, energy in units.items()}
    every = torch.cat([score.reshape(-1) for score in scores.values()])
    weight = torch.cat([torch.full((units[name].numel(),), float(sizes[name])) for name in scores])
    order = torch.argsort(every, descending=True, stable=True)
    budget = (1 - sparsity) * float(weight.sum())
    kept = torch.zeros(len(every), dtype=torch.bool)
    kept[order[torch.cumsum(weight[order.cpu()], 0) <= max(budget, 1.0)]] = True
    masks = {}
    position = 0
    for name, score in scores.items():
        mask = kept[position : position + score.numel()].reshape(score.shape)
        masks[name] = mask if mask.any() else score == score.max()
        position += score.numel()
    return masks


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
