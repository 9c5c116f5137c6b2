"""The plain solver: clip to the range, round to the nearest code."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from lowbit.numerics import QuantTensor, quantize
from lowbit.ranges import quantize_tensor
from lowbit.solve.moments import Moments

if TYPE_CHECKING:
    from lowbit.recipe import TensorSpec


def nearest(weight: Tensor, spec: TensorSpec, moments: Moments | None = None) -> QuantTensor:
    """Codes of a weight: each tile's range by the spec's estimator, each value to its nearest code."""
    assert spec.format is not None
    if spec.format.block is None:
        return quantize(weight.detach(), spec.format)
    return quantize_tensor(weight.detach(), spec.format, range=spec.range)
