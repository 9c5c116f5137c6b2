"""The range that is best behind the function that reads it.

A convolution in front of a SiLU gives values down to −100 that the SiLU turns into 0. They must not stretch the range:
what counts is the error of f(x), not of x. The points of the statistics answer that as they answer everything else.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np
import torch
from torch import Tensor

from lowbit.numerics.fitted import Fitted
from lowbit.numerics.formats import Format
from lowbit.numerics.quantize import fake_quantize_rows, scale_and_zero
from lowbit.ranges.extremes import Bounds
from lowbit.ranges.statistics import Statistics

Function = Callable[[Tensor], Tensor]

FUNCTIONS: Mapping[str, Function] = MappingProxyType(
    {
        "silu": torch.nn.functional.silu,
        "sigmoid": torch.sigmoid,
        "hardswish": torch.nn.functional.hardswish,
        "hardsigmoid": torch.nn.functional.hardsigmoid,
        "gelu": torch.nn.functional.gelu,
        "tanh": torch.tanh,
    }
)
_SHARES = np.array([1.0, 0.85, 0.7, 0.55, 0.42, 0.32, 0.24, 0.18, 0.13, 0.09, 0.06, 0.04, 0.025])


@dataclass(frozen=True)
class Through:
    """The bounds with the least squared error of f(x̂) against f(x), by search over both ends.

    function   a name of FUNCTIONS
    """

    function: str

    def bounds(self, statistics: Statistics, format: Format) -> Bounds:
        statistics.check()
        if isinstance(format.grid, Fitted):
            return statistics.minimum, statistics.maximum  # the fit itself finds where its values go
        values, weights = statistics.points()
        x, f = values.float(), FUNCTIONS[self.function]
        exact = f(x).double()
        best = (statistics.minimum, statistics.maximum)
        least = torch.full_like(best[0], torch.inf, dtype=torch.float64)
        for low in _SHARES:
            for high in _SHARES:
                lo, hi = statistics.minimum * float(low), statistics.maximum * float(high)
                scale, zero = scale_and_zero(lo, hi, format)
                rounded = fake_quantize_rows(x.expand(weights.shape[0], -1), scale, zero, format.grid)
                error = ((f(rounded).double() - exact).square() * weights).sum(1, keepdim=True)
                better = error < least
                best = torch.where(better, lo, best[0]), torch.where(better, hi, best[1])
                least = torch.where(better, error, least)
        return best
