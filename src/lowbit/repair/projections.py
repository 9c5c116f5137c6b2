"""Random projections of a network's outputs: what a backward pass from one of them tells of a loss.

A change δ of the outputs costs the loss ½ δᵀ H δ to second order. For random v with covariance H, E (vᵀ δ)² = δᵀ H δ,
and the gradient of vᵀ y is one backward pass (Hutchinson 1990). A weighing makes v of random signs.
"""

from collections.abc import Callable, Mapping
from types import MappingProxyType

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from lowbit.classes import are_probabilities, output_of_classes

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
    if are_probabilities(y, axis):
        return signs / y.clamp(min=1e-4).sqrt()
    p = y.softmax(axis)
    rooted = p.sqrt() * signs
    return rooted - p * rooted.sum(axis, keepdim=True)


WEIGHINGS: Mapping[str, Weighing] = MappingProxyType({"squares": squares, "cross_entropy": cross_entropy})


def projections(
    outputs: Mapping[str, Tensor],
    generator: torch.Generator,
    loss: str = "squares",
    labels: np.ndarray | None = None,
) -> dict[str, Tensor]:
    """v for each output, drawn anew at each call.

    loss   a name of WEIGHINGS, or "labels": of the labels' cross-entropy, which these are
    """
    if loss == "labels":
        return _of_labels({name: y.detach() for name, y in outputs.items()}, np.asarray(labels), generator)
    return {name: WEIGHINGS[loss](y.detach(), _signs(y, generator)) for name, y in outputs.items()}


def _of_labels(outputs: Mapping[str, Tensor], labels: np.ndarray, generator: torch.Generator) -> dict[str, Tensor]:
    """The gradient of each label's cross-entropy, with a random sign: empirical Fisher information.

    It is of the first output that has scores or probabilities of classes for each label; labels of −100 do not count.
    """
    shapes = {name: tuple(y.shape) for name, y in outputs.items()}
    instead = "Take loss='squares', which needs no labels."
    chosen, axis = output_of_classes(labels, shapes, instead, ignored=-100)
    known, scores = torch.from_numpy(labels.astype(np.int64)), outputs[chosen].movedim(axis, -1)
    right = functional.one_hot(known.clamp(min=0), scores.shape[-1])
    slope = -right / scores.clamp(min=1e-4) if are_probabilities(scores) else scores.softmax(-1) - right
    slope *= (_signs(scores[..., 0], generator) * (known != -100))[..., None]
    return {name: slope.movedim(-1, axis) if name == chosen else torch.zeros_like(y) for name, y in outputs.items()}


def _signs(y: Tensor, generator: torch.Generator) -> Tensor:
    return torch.randint(0, 2, y.shape, generator=generator).to(y).mul_(2).sub_(1)
