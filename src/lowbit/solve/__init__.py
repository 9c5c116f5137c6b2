"""Which codes a weight gets. A solver is a function (weight, spec, moments) → QuantTensor; moments may be None."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING

from torch import Tensor

from lowbit.numerics import QuantTensor
from lowbit.solve.adaround import adaround
from lowbit.solve.gptq import gptq
from lowbit.solve.kmeans import codebook
from lowbit.solve.moments import Moments
from lowbit.solve.nearest import nearest

if TYPE_CHECKING:  # recipes check the names of solvers
    from lowbit.recipe import TensorSpec

Solver = Callable[[Tensor, "TensorSpec", "Moments | None"], QuantTensor]

SOLVERS: Mapping[str, Solver] = MappingProxyType(
    {"nearest": nearest, "gptq": gptq, "adaround": adaround, "kmeans": codebook}
)
NEED_MOMENTS = frozenset({"gptq", "adaround"})  # without moments they round to nearest

__all__ = ["NEED_MOMENTS", "SOLVERS", "Moments", "Solver", "adaround", "gptq", "nearest"]
