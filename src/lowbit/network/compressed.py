"""A network whose weights are pruned or shared, as parameters that train: what is trained is what is written.

The network stays the fx module of `build`; at each step its weights are computed from the parameters and handed in.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, fx
from torch.func import functional_call

from lowbit.solve.share import Shared, nearest_codes


class _Lookup(torch.autograd.Function):
    """values[positions]; the gradient of a value is the sum of those of its places (Han et al. 2016, section 3.2)."""

    @staticmethod
    def forward(context: Any, values: Tensor, positions: Tensor) -> Tensor:
        context.save_for_backward(positions)
        context.count = values.numel()
        return values[positions]

    @staticmethod
    def backward(context: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (positions,) = context.saved_tensors
        gradient = gradients[0]
        return torch.zeros(context.count).index_add_(0, positions, gradient.float()).to(gradient.dtype), None


class _Masked(torch.autograd.Function):
    """weight · mask; the gradient also reaches pruned weights, so that they can come back (Guo et al. 2016)."""

    @staticmethod
    def forward(context: Any, weight: Tensor, mask: Tensor) -> Tensor:
        return weight * mask

    @staticmethod
    def backward(context: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0], None


class _Snapped(torch.autograd.Function):
    """The shared value nearest to each weight; the gradient reaches the weight as if nothing had been rounded."""

    @staticmethod
    def forward(context: Any, weight: Tensor, values: Tensor) -> Tensor:
        return values

    @staticmethod
    def backward(context: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0], None


class CompressedNetwork:
    """An fx module and what its weights are made of.

    parameters   key → trained tensor: dense weights and biases, or the tables of shared weights
    masks        key → bool: pruned weights; their parameters stay dense underneath
    settling     key → tables that weights are rounded to while they still train: codes may change
    shared       key → codes of weights whose tables are trained
    """

    def __init__(self, module: fx.GraphModule) -> None:
        self.module = module
        self.parameters: dict[str, Tensor] = {
            key: parameter.detach().clone() for key, parameter in module.named_parameters()
        }
        self.masks: dict[str, Tensor] = {}
        self.settling: dict[str, Shared] = {}
        self.shared: dict[str, Shared] = {}
        self.positions: dict[str, Tensor] = {}

    def snap(self, key: str) -> Shared:
        """The codes that a settling weight has now."""
        tables, zero = self.settling[key].tables, self.settling[key].zero
        return Shared(nearest_codes(self.parameters[key], self.masks.get(key), tables, zero), tables, zero)

    def share(self, key: str, shared: Shared) -> None:
        """From now on this weight is codes, which stay, and tables, which train."""
        self.settling.pop(key, None)
        self.shared[key] = shared
        self.positions[key] = shared.positions()
        self.masks.pop(key, None)
        self.parameters[key] = shared.tables.clone()

    def weights(self) -> dict[str, Tensor]:
        """key → the tensor that the network computes with, differentiable in the parameters."""
        found = dict(self.parameters)
        for key, shared in self.shared.items():
            tables = self.parameters[key]
            if shared.zero:
                tables = torch.cat([torch.zeros(len(tables), 1), tables[:, 1:]], dim=1)
            found[key] = _Lookup.apply(tables.reshape(-1), self.positions[key]).reshape(shared.codes.shape)  # type: ignore[no-untyped-call]
        for key in self.settling:
            found[key] = _Snapped.apply(found[key], self.snap(key).dense())  # type: ignore[no-untyped-call]
        for key, mask in self.masks.items():
            found[key] = _Masked.apply(found[key], mask)  # type: ignore[no-untyped-call]
        return found

    def __call__(self, *inputs: Tensor, weights: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
        """{output: tensor}"""
        chosen = self.weights() if weights is None else dict(weights)
        outputs: dict[str, Tensor] = functional_call(self.module, chosen, inputs)
        return outputs
