"""Masks of pruned weights that follow the weights while these train: sparsity rises, then the masks stay.

Source: sparsity rises by a cubic (Zhu and Gupta 2017); pruned weights may come back (Guo et al. 2016).
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch

from lowbit.network.network import Network
from lowbit.solve.prune import Pruning, cubic_sparsity


@dataclass(frozen=True)
class Masks:
    """The masks of a network's weights.

    axes         of the outputs, for every weight that may be pruned
    alone        weight → a sparsity of its own
    sensitivity  of each weight, where the pruning goes by it
    """

    network: Network
    axes: Mapping[str, int]
    pruning: Pruning
    alone: Mapping[str, float] = field(default_factory=dict)
    sensitivity: Mapping[str, float] = field(default_factory=dict)

    @property
    def prunes(self) -> bool:
        return self.pruning.sparsity > 0 or any(self.alone.values())

    def update(self, step: int, total: int) -> None:
        """Sparsity rises over the first half of the steps; masks may change until four fifths, then they stay."""
        pruning, weights = self.pruning, self.network.constants()
        every, last = max(16, total // 200), int(0.8 * total)
        known = any(weight.mask is not None for _, weight in weights.values())
        if not self.prunes or (step % every and step != total) or (step > last and known):
            return
        reached = 1.0 if step == total else cubic_sparsity(step, max(1, total // 2), 1.0)
        dense = {name: self.network.parameter(name).detach().movedim(axis, 0) for name, axis in self.axes.items()}
        alone = {name: dense.pop(name) for name in self.alone}
        masks = pruning.masks(dense, pruning.sparsity * reached, self.sensitivity) if dense and pruning.sparsity else {}
        for name, weight in alone.items():
            masks |= replace(pruning, scope="layer").masks({name: weight}, self.alone[name] * reached)
        for name, mask in masks.items():
            weights[name][1].mask = mask.movedim(0, self.axes[name]).contiguous()

    def settle(self) -> None:
        """Pruned weights become zero, also underneath."""
        with torch.no_grad():
            for name, (_, weight) in self.network.constants().items():
                if weight.mask is not None:
                    self.network.parameter(name).mul_(weight.mask)
