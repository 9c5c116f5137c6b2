"""Pruning: once, or with masks that follow the weights while these train: sparsity rises, then the masks stay.

Source: sparsity rises by a cubic (Zhu and Gupta 2017); pruned weights may come back (Guo et al. 2016).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import onnx_ir as ir
import torch

from lowbit.engines.compile import Batch
from lowbit.errors import InputError
from lowbit.graph.layer import Layer, layer_names, layers_of
from lowbit.network.network import Network
from lowbit.recipe import Recipe
from lowbit.repair.sensitivity import squared_gradients
from lowbit.solve.prune import Pruning, cubic_sparsity

SMALLEST = 256
"""Weights of fewer elements stay as they are. Of 256, codes of 4 bits save 781 bytes of a packed file."""


def compressible(program: ir.Model) -> dict[str, Layer]:
    """Initialisers that are weights of some layer and large enough → that layer."""
    found: dict[str, Layer] = {}
    for layer in (layer for node in program.graph for layer in layers_of(node)):
        value = layer.value
        if not value.is_graph_output() and layer.weight.dtype == np.float32 and layer.weight.size >= SMALLEST:
            found[str(value.name)] = layer
    return found


def prune_once(program: ir.Model, recipe: Recipe) -> list[str]:
    """Set weights to zero, in place, as the recipe's rules say; what was done, in words.

    InputError for a rule that goes by sensitivity, which is measured on a network.
    """
    layers, told = compressible(program), []
    for pruning, names in recipe.prunings({name: layer_names(layer.node) for name, layer in layers.items()}):
        if pruning.scope == "sensitivity":
            raise InputError("weights that are pruned once go by their size: scope 'global' or 'layer'.")
        weights = {
            name: torch.from_numpy(layers[name].weight.copy()).movedim(layers[name].output_axis, 0) for name in names
        }
        for name, mask in pruning.masks(weights).items():
            kept = (weights[name] * mask).movedim(0, layers[name].output_axis).contiguous().numpy()
            layers[name].value.const_value = ir.tensor(kept, name=name)
        told.append(f"{pruning.sparsity:.0%} of the weights of {len(names)} layers pruned")
    return told


@dataclass(frozen=True)
class Masks:
    """The masks of a network's weights.

    groups       how weights are pruned, and those that are compared with each other: weight → axis of its outputs
    sensitivity  of each weight, where a pruning goes by it
    """

    network: Network
    groups: Sequence[tuple[Pruning, Mapping[str, int]]]
    sensitivity: Mapping[str, float] = field(default_factory=dict)

    @staticmethod
    def of(network: Network, recipe: Recipe, batches: Sequence[Batch] = ()) -> "Masks":
        """As the rules of a recipe say. batches: what sensitivities are measured on, where a rule goes by them"""
        weights = {name for name, (site, _) in network.constants().items() if site.role == "weight"}
        layers = [(node, layer) for node in network.program.graph for layer in layers_of(node)]
        found = {str(layer.value.name): (node, layer.output_axis) for node, layer in layers}
        prunings = recipe.prunings({name: layer_names(found[name][0]) for name in found if name in weights})
        groups = [(pruning, {name: found[name][1] for name in names}) for pruning, names in prunings]
        asking = [name for pruning, names in groups if pruning.scope == "sensitivity" for name in names]
        quantizers = {name: network.constants()[name][1] for name in asking}
        return Masks(network, groups, squared_gradients(network, quantizers, batches) if asking else {})

    def update(self, step: int, total: int) -> None:
        """Sparsity rises over the first half of the steps; masks may change until four fifths, then they stay.

        They change every 16 steps or less often; in a run of fewer than 32 at each, so that it gets there.
        """
        weights = self.network.constants()
        every, last = max(16, total // 200) if total >= 32 else 1, int(0.8 * total)
        known = any(weight.mask is not None for _, weight in weights.values())
        if not self.groups or (step % every and step != total) or (step > last and known):
            return
        reached = 1.0 if step == total else cubic_sparsity(step, total // 2, 1.0)
        for pruning, axes in self.groups:
            dense = {name: self.network.parameter(name).detach().movedim(axis, 0) for name, axis in axes.items()}
            for name, mask in pruning.masks(dense, pruning.sparsity * reached, self.sensitivity).items():
                weights[name][1].mask = mask.movedim(0, axes[name]).contiguous()

    def prune(self) -> None:
        """Pruned weights become zero, also underneath."""
        with torch.no_grad():
            for name, (_, weight) in self.network.constants().items():
                if weight.mask is not None:
                    self.network.parameter(name).mul_(weight.mask)
