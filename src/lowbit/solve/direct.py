"""The plain solver: clip to the range, round to the nearest code."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lowbit.numerics import QuantTensor, measure, quantize, to_rows
from lowbit.ranges import RawRows

if TYPE_CHECKING:
    from lowbit.recipe import TensorSpec


def direct(weight: Tensor, spec: TensorSpec) -> QuantTensor:
    """Codes of a weight: each tile's range by the spec's estimator, each value to its nearest code.

    Where scales share a second scale no tile can be searched for itself; the extremes then stay if they are better.
    """
    assert spec.format is not None
    if spec.format.block is None:
        return quantize(weight, spec.format)
    with torch.no_grad():
        rows = to_rows(weight.detach().float(), spec.format.block)
        stored = quantize(weight.detach(), spec.format, spec.range.bounds(RawRows(rows), spec.format))
        if not spec.format.shares_scale:
            return stored
        whole = quantize(weight.detach(), spec.format)
        return min(stored, whole, key=lambda q: measure(weight, q).mse)
