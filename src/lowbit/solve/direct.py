"""The plain solver: clip to the range, round to the nearest code."""

import torch
from torch import Tensor

from lowbit.numerics import QuantTensor, quantize, to_rows
from lowbit.ranges import RawRows
from lowbit.recipe import TensorSpec


def direct(weight: Tensor, spec: TensorSpec) -> QuantTensor:
    """Codes of a weight: each tile's range by the spec's estimator, each value to its nearest code."""
    assert spec.format is not None
    if spec.format.block is None:
        return quantize(weight, spec.format)
    with torch.no_grad():
        rows = to_rows(weight.detach().float(), spec.format.block)
        return quantize(weight.detach(), spec.format, spec.range.bounds(RawRows(rows), spec.format))
