"""Class labels beside outputs: which output has a number for each class, on which axis, and whether it is a share."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from lowbit.errors import DataError

if TYPE_CHECKING:
    from torch import Tensor


def class_axes(output: Sequence[int], labels: Sequence[int]) -> list[int]:
    """Axes of an output of this shape that can have a number for each class: the last, then the second."""
    axes = (len(output) - 1, 1) if len(output) == len(labels) + 1 > 1 else ()
    return [axis for axis in dict.fromkeys(axes) if (*output[:axis], *output[axis + 1 :]) == tuple(labels)]


def output_of_classes(
    labels: np.ndarray, outputs: Mapping[str, Sequence[int]], instead: str, ignored: int | None = None
) -> tuple[str, int]:
    """The first output that has a number for the class of each label, and its axis of classes; DataError without one.

    outputs   name → shape
    instead   what can be done without labels, in a sentence
    ignored   the label of what has no class
    """
    counted = labels if ignored is None else labels[labels != ignored]
    found = [(name, axis) for name, shape in outputs.items() for axis in class_axes(shape, labels.shape)]
    found = [(name, axis) for name, axis in found if labels.dtype.kind in "iu" and outputs[name][axis] > 1]
    for name, axis in found:
        if not counted.size or 0 <= counted.min() <= counted.max() < outputs[name][axis]:
            return name, axis
    if found:
        name, axis = found[0]
        classes = outputs[name][axis]
        worst = counted.max() if counted.max() >= classes else counted.min()
        raise DataError(f"label {worst} has no class: '{name}' has {classes} classes.")
    shapes = ", ".join(f"'{name}' {list(shape)}" for name, shape in outputs.items())
    one_hot = any(labels.shape == tuple(shape) for shape in outputs.values())
    raise DataError(
        f"labels of shape {list(labels.shape)} are not classes of an output; outputs are {shapes}. "
        f"{'They look one-hot: give labels.argmax(-1). ' if one_hot else ''}Labels are integers, in the shape of an "
        f"output without its axis of classes; these are {labels.dtype}. {instead}"
    )


def are_probabilities(scores: "Tensor", axis: int = -1) -> bool:
    """Whether the numbers of the classes are shares of 1, not logits."""
    return bool((scores >= 0).all()) and bool(((scores.sum(axis) - 1).abs() < 1e-3).all())
