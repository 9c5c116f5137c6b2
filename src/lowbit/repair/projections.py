"""Random projections of a network's outputs: what a backward pass from one of them tells of a loss.

A change δ of the outputs costs the loss ½ δᵀ H δ to second order. For random v with covariance H, E (vᵀ δ)² = δᵀ H δ,
and the gradient of vᵀ y is one backward pass (Hutchinson 1990). A weighing makes v of random signs.
"""

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType

import torch
from torch import Tensor

# Output and random signs of its shape → v, whose covariance is the loss's second derivative by the output.
Weighing = Callable[[Tensor, Tensor], Tensor]


def squares(y: Tensor, signs: Tensor) -> Tensor:
    """Squared error relative to the power of the output, where that is finite."""
    finite = y.isfinite()
    return torch.where(finite, signs / y[finite].square().sum().sqrt().clamp(min=1e-12), 0.0)


def cross_entropy(y: Tensor, signs: Tensor) -> Tensor:
    """Cross-entropy of answers drawn from the float network's own probabilities: no labels are needed.

    y   logits, or probabilities: over the second axis of images (4 axes and more), else over the last; one logit is
        that of a yes
    """
    axis = 1 if y.dim() > 3 else -1
    if y.shape[axis] == 1:
        p = y.sigmoid()
        return (p * (1 - p)).sqrt() * signs
    total = y.sum(axis)
    if bool((y >= 0).all()) and torch.allclose(total, torch.ones_like(total), atol=1e-3):
        return signs / y.clamp(min=1e-4).sqrt()
    p = y.softmax(axis)
    rooted = p.sqrt() * signs
    return rooted - p * rooted.sum(axis, keepdim=True)


WEIGHINGS: Mapping[str, Weighing] = MappingProxyType({"squares": squares, "cross_entropy": cross_entropy})


def projections(outputs: Sequence[Tensor], generator: torch.Generator, loss: str = "squares") -> list[Tensor]:
    """v for each output, drawn anew at each call; a name of WEIGHINGS."""
    signs = [torch.randint(0, 2, y.shape, generator=generator).to(y).mul_(2).sub_(1) for y in outputs]
    return [WEIGHINGS[loss](y.detach(), s) for s, y in zip(signs, outputs, strict=True)]
