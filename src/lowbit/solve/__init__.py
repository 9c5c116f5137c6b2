"""Which codes a weight gets. A solver is a function (weight, spec) → QuantTensor."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING

from torch import Tensor

from lowbit.numerics import QuantTensor
from lowbit.solve.direct import direct

if TYPE_CHECKING:  # recipes check the names of solvers
    from lowbit.recipe import TensorSpec

Solver = Callable[[Tensor, "TensorSpec"], QuantTensor]

SOLVERS: Mapping[str, Solver] = MappingProxyType({"direct": direct})

__all__ = ["SOLVERS", "Solver", "direct"]
