"""Quantizers that learn, one table: the method of a `Learned` range → what it does to an activation and to a weight.

A learner is a module. Called, it gives the fake-quantized values with a gradient to what it was given and to its own
parameters. `penalty()` is what a method adds to the loss. What is stored afterwards is bit for bit what it gave.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

import torch
from torch import Tensor, nn

from lowbit import processes
from lowbit.errors import UnsupportedError
from lowbit.network.learned_bases import LearnedBases
from lowbit.network.learned_step import round_to_step
from lowbit.network.learned_weights import WEIGHT_METHODS, WeightLearner
from lowbit.network.memory_order import as_stored
from lowbit.numerics import Format, Int, QuantTensor, describe_format, is_fitted, scale_and_zero
from lowbit.ranges import Learned

MOMENTUM = 0.9  # of the moving average of extremes, as of the range `moving_average`
DECAY = 1e-4  # λ of PACT's penalty; its paper takes that of the weight decay


@dataclass(frozen=True)
class ActivationMethod:
    """How the range of an activation learns.

    step     the step learns
    offset   the zero learns as well
    clip     the upper end of the range learns, and has a penalty
    """

    step: bool = False
    offset: bool = False
    clip: bool = False


class LearnedRange(nn.Module):
    """An activation rounded to integers at a step that learns.

    LSQ    x̂ = s · clip(round(x / s)), gradient of s: Esser et al. 2020 (arXiv 1902.08153), eq. 3, times 1 / √(N · Qp)
           for N values of one sample
    LSQ+   beside it a lower end β that learns: Bhalgat et al. 2020 (arXiv 2004.09576); the zero is round(−β / s)
    PACT   upper end α = s · Qp, gradient 1 above it and 0 elsewhere, penalty λ α²: Choi et al. 2018 (arXiv 1805.06085)
    DoReFa, straight-through    nothing of the range learns; x has gradient 1 inside it: Zhou et al. 2016 (arXiv
           1606.06160), Bengio et al. 2013

    unit   the step, or α, with which training begins
    end    the same in units: a parameter where it learns. So the penalty is λ · end²
    behind_relu   only ReLUs give x: its gradient at 0 is 0, as theirs
    """

    behind_relu = False

    def __init__(self, grid: Int, method: ActivationMethod, scale: Tensor, zero: Tensor) -> None:
        super().__init__()
        self.grid, self.method, self.decay = grid, method, DECAY
        self.register_buffer("zero", zero.detach().clone().reshape(()))
        start = scale.detach().clone().reshape(())
        self.end: Tensor
        self.offset: Tensor | None
        self.register_buffer("unit", start * self._high() if method.clip else start)
        if method.step or method.clip:
            self.end = nn.Parameter(torch.ones_like(start))
        else:
            self.register_buffer("end", torch.ones_like(start))
        self.register_parameter("offset", nn.Parameter(-self.zero) if method.offset else None)

    zero: Tensor
    unit: Tensor

    def _high(self) -> Tensor:
        return self.grid.maximum - self.zero

    def scale_and_zero(self) -> tuple[Tensor, Tensor]:
        """What is rounded with now. A step below 0 counts as its magnitude."""
        with torch.no_grad():
            zero = self.zero
            scale = self.unit * self.end.abs()
            scale = scale / self._high() if self.method.clip else scale
            scale = scale.clamp_min(torch.finfo(torch.float32).tiny)
            if self.offset is not None:
                zero = (-self.offset * self.unit / scale).round().clamp(self.grid.minimum, self.grid.maximum)
            return scale, zero

    def penalty(self) -> Tensor:
        return self.decay * self.end.square() if self.method.clip else self.end.new_zeros(())

    def stops_at_zero(self) -> bool:
        """Whether no gradient passes at 0 and below."""
        return self.behind_relu and self.offset is None and float(self.zero) == self.grid.minimum

    def forward(self, x: Tensor) -> Tensor:
        scale, zero = self.scale_and_zero()
        low, high = self.grid.minimum - zero, self.grid.maximum - zero
        past_low = self.behind_relu and self.offset is None
        if self.method.clip:
            return round_to_step(x, scale, low, high, past_low, self.end, self.unit, (0.0, 0.0, 1.0))
        if not self.method.step:
            return round_to_step(x, scale, low, high, past_low)
        g = torch.rsqrt(max(1, x[:1].numel()) * high.clamp_min(1.0))
        # With an offset β = −zero · s the ends of the range are β + s · minimum and β + s · maximum.
        below, above = (low, high) if self.offset is None else (self.grid.minimum, self.grid.maximum)
        weights = g, g * below, g * above
        return round_to_step(x, scale, low, high, past_low, self.end, self.unit, weights, self.offset)


class MovingExtremes(nn.Module):
    """An activation rounded in the range of a moving average of its extremes, which follows while training.

    Source: Jacob et al. 2018 (arXiv 1712.05877), section 3.1.

    behind_relu   only ReLUs give x: its gradient at 0 is 0, as theirs
    """

    behind_relu = False
    low: Tensor
    high: Tensor

    def __init__(self, format: Format, scale: Tensor, zero: Tensor) -> None:
        super().__init__()
        assert isinstance(format.grid, Int)
        self.format, self.grid = format, format.grid
        ends = [(end - zero) * scale for end in (format.grid.minimum, format.grid.maximum)]
        self.register_buffer("low", ends[0].detach().clone().reshape(1, 1))
        self.register_buffer("high", ends[1].detach().clone().reshape(1, 1))

    def scale_and_zero(self) -> tuple[Tensor, Tensor]:
        scale, zero = scale_and_zero(self.low, self.high, self.format)
        return scale.reshape(()), zero.reshape(())

    def penalty(self) -> Tensor:
        return self.low.new_zeros(())

    def stops_at_zero(self) -> bool:
        """Whether no gradient passes at 0 and below, if nothing below 0 comes now."""
        return self.behind_relu and float(self.low) >= 0

    def forward(self, x: Tensor) -> Tensor:
        if self.training and torch.is_grad_enabled() and x.numel():
            low, high = torch.aminmax(as_stored(x.detach()))
            least = processes.least(torch.stack([low, -high]).float())  # of the batch of all processes
            self.low.lerp_(least[0], 1 - MOMENTUM)
            self.high.lerp_(-least[1], 1 - MOMENTUM)
        scale, zero = self.scale_and_zero()
        return round_to_step(x, scale, self.grid.minimum - zero, self.grid.maximum - zero, self.behind_relu)


ACTIVATIONS: Mapping[str, ActivationMethod | None] = MappingProxyType(
    {
        "ste": ActivationMethod(),
        "lsq": ActivationMethod(step=True),
        "lsq+": ActivationMethod(step=True, offset=True),
        "pact": ActivationMethod(clip=True),
        "dorefa": ActivationMethod(),
        "ema": None,
    }
)


def activation_learner(range: Learned, format: Format, scale: Tensor, zero: Tensor) -> "LearnedRange | MovingExtremes":
    """The learner of an activation that begins with this scale and zero; UnsupportedError where there is none."""
    if range.method not in ACTIVATIONS:
        raise UnsupportedError(
            f"range '{range.method}' serves weights only. Give activations one of: {', '.join(ACTIVATIONS)}."
        )
    if not isinstance(format.grid, Int) or scale.numel() != 1:
        raise UnsupportedError(
            f"format '{describe_format(format)}' of an activation cannot learn its range: that takes integers with one "
            "scale for all, as 'uint4'. Choose another format, or a range that does not learn."
        )
    method = ACTIVATIONS[range.method]
    if method is None:
        return MovingExtremes(format, scale, zero)
    return LearnedRange(format.grid, method, scale, zero)


def weight_learner(range: Learned, stored: QuantTensor, weight: Tensor) -> "WeightLearner | LearnedBases":
    """The learner of a weight that begins with these scales or tables; UnsupportedError where there is none."""
    words = describe_format(stored.format)
    if range.method == "lqnets":
        return LearnedBases(stored, weight)
    if range.method not in WEIGHT_METHODS:
        able = ", ".join((*WEIGHT_METHODS, "lqnets"))
        raise UnsupportedError(f"range '{range.method}' serves activations only. Give weights one of: {able}.")
    if is_fitted(stored.format.grid) or not isinstance(stored.scale, Tensor) or stored.zero is not None:
        raise UnsupportedError(
            f"range '{range.method}' learns scales in float32 without a zero, and a weight in '{words}' has none. "
            "Choose another format, as 'int4 channel:0', or a range that does not learn."
        )
    return WeightLearner(WEIGHT_METHODS[range.method], stored, weight)
