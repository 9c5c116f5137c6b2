"""Elementwise arithmetic, activations, comparisons and logic."""

from functools import reduce

import torch
import torch.nn.functional as F
from torch import Tensor

from lowbit.network.operators_types import Number, number


def divide(a: Tensor, b: Tensor) -> Tensor:
    return torch.div(a, b) if a.is_floating_point() else torch.div(a, b, rounding_mode="trunc")


def modulo(a: Tensor, b: Tensor, *, fmod: int = 0) -> Tensor:
    return torch.fmod(a, b) if fmod else torch.remainder(a, b)


def power(base: Tensor, exponent: Tensor) -> Tensor:
    return torch.pow(base, exponent).to(base.dtype)


def maximum(*tensors: Tensor) -> Tensor:
    return reduce(torch.maximum, tensors)


def minimum(*tensors: Tensor) -> Tensor:
    return reduce(torch.minimum, tensors)


def total(*tensors: Tensor) -> Tensor:
    return reduce(torch.add, tensors)


def mean_of(*tensors: Tensor) -> Tensor:
    return reduce(torch.add, tensors) / len(tensors)


def clip(x: Tensor, low: Number | None = None, high: Number | None = None) -> Tensor:
    if low is None and high is None:
        return x
    if isinstance(low, Tensor) != isinstance(high, Tensor):  # torch wants both tensors or both numbers
        low = torch.as_tensor(low, dtype=x.dtype, device=x.device) if low is not None else None
        high = torch.as_tensor(high, dtype=x.dtype, device=x.device) if high is not None else None
    return torch.clamp(x, low, high)  # type: ignore[arg-type]


def leaky_relu(x: Tensor, *, alpha: float = 0.01) -> Tensor:
    return F.leaky_relu(x, alpha)


def prelu(x: Tensor, slope: Tensor) -> Tensor:
    return torch.where(x < 0, x * slope, x)


def elu(x: Tensor, *, alpha: float = 1.0) -> Tensor:
    return F.elu(x, alpha)


def celu(x: Tensor, *, alpha: float = 1.0) -> Tensor:
    return F.celu(x, alpha)


def selu(x: Tensor, *, alpha: float = 1.6732632423543772, gamma: float = 1.0507009873554805) -> Tensor:
    return gamma * F.elu(x, alpha)


def hard_sigmoid(x: Tensor, *, alpha: float = 0.2, beta: float = 0.5) -> Tensor:
    if abs(alpha - 1 / 6) < 1e-7 and beta == 0.5:  # MobileNet v3's, which torch has as one kernel
        return F.hardsigmoid(x)
    return torch.clamp(alpha * x + beta, 0, 1)


def gelu(x: Tensor, *, approximate: str = "none") -> Tensor:
    return F.gelu(x, approximate=approximate)


def swish(x: Tensor, *, alpha: float = 1.0) -> Tensor:
    return F.silu(x) if alpha == 1.0 else x * torch.sigmoid(alpha * x)


def swiglu(gate: Tensor, x: Tensor, *, alpha: float = 1.0) -> Tensor:
    return swish(gate, alpha=alpha) * x


def softplus(x: Tensor) -> Tensor:
    return torch.logaddexp(x, torch.zeros_like(x))  # F.softplus turns linear above 20, which float64 would see


def shrink(x: Tensor, *, bias: float = 0.0, lambd: float = 0.5) -> Tensor:
    moved = torch.where(x < -lambd, x + bias, torch.where(x > lambd, x - bias, 0))
    return moved.to(x.dtype)


def thresholded_relu(x: Tensor, *, alpha: float = 1.0) -> Tensor:
    return torch.where(x > alpha, x, 0)


def dropout(
    x: Tensor, ratio: Number = 0.5, training_mode: Number = 0, *, seed: int | None = None, outputs: int = 1
) -> Tensor | tuple[Tensor, Tensor]:
    """The identity, unless the program itself asks for training_mode."""
    share = float(number(ratio)) if number(training_mode) else 0.0
    if share == 0:
        return x if outputs == 1 else (x, torch.ones_like(x, dtype=torch.bool))
    mask = torch.rand_like(x) >= share
    y = torch.where(mask, x / (1 - share), 0)
    return y if outputs == 1 else (y, mask)
