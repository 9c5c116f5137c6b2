"""Second moments of what a weight is multiplied with: all that a solver knows of the data."""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Moments:
    """For each group of a linear operator; x is what the exact network multiplies, x̃ what the quantized one does.

    quantized    (groups, inputs, inputs) float64 Σ x̃ x̃ᵀ
    cross        (groups, inputs, inputs) float64 Σ x x̃ᵀ
    rows         how many x were summed
    output_axis  of the weight
    """

    quantized: Tensor
    cross: Tensor
    rows: int
    output_axis: int = 0
