"""Which codes a weight gets. A solver is a function (weight, spec) → QuantTensor."""

from collections.abc import Callable, Mapping
from types import MappingProxyType

from torch import Tensor

from lowbit.numerics import QuantTensor
from lowbit.recipe import TensorSpec
from lowbit.solve.direct import direct

Solver = Callable[[Tensor, TensorSpec], QuantTensor]

SOLVERS: Mapping[str, Solver] = MappingProxyType({"direct": direct})

__all__ = ["SOLVERS", "Solver", "direct"]
