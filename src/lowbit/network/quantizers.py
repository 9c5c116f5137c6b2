"""Quantizers: modules that stand on the edges of a network.

A quantizer that is off passes its input on; observing it also folds it into statistics, probing it keeps it for a
gradient, quantizing it rounds to the format (straight-through gradient).
"""

from abc import ABC, abstractmethod
from typing import Literal

import torch
from torch import Tensor, nn

from lowbit.errors import UnsupportedError
from lowbit.network.learners import LearnedRange, MovingExtremes, activation_learner
from lowbit.network.memory_order import as_stored
from lowbit.network.straight_through import straight_through
from lowbit.numerics import (
    TENSOR,
    Format,
    Grid,
    Int,
    fake_quantize_rows,
    from_rows,
    is_fitted,
    quantize,
    scale_and_zero,
    spell_format,
    to_rows,
)
from lowbit.ranges import Histogram, Learned, RawRows
from lowbit.recipe import TensorSpec

Mode = Literal["off", "observe", "probe", "quantize"]


def fake_quantize(x: Tensor, format: Format, scale: Tensor, zero: Tensor) -> Tensor:
    """x rounded to a format. The gradient is 1 inside the range and 0 outside (straight-through estimator).

    scale, zero   one per tile, in the shape of the grid of tiles or a scalar for a single tile
    """
    grid = fixed_grid(format)
    if isinstance(grid, Int) and scale.numel() == 1 and format.rounding == "nearest":
        scale, zero = scale.reshape(()), zero.reshape(())
        if x.requires_grad and torch.is_grad_enabled():
            return torch.fake_quantize_per_tensor_affine(x, scale, zero.to(torch.int32), grid.minimum, grid.maximum)
        # 0.13 ns an element on two cores, where torch's fused function takes 1.6; a scale of 0 makes exact zeros
        low, high = grid.minimum - float(zero), grid.maximum - float(zero)
        return x.div(torch.where(scale != 0, scale, torch.inf)).round_().clamp_(low, high).mul_(scale)
    assert format.block is not None
    tile = format.block.tile(tuple(x.shape))
    scale, zero = scale.reshape(-1, 1), zero.reshape(-1, 1)
    with torch.no_grad():
        rows = to_rows(x, format.block)
        rounded = fake_quantize_rows(rows, scale, zero, grid, format.rounding)
        half = scale / 2
        low, high = grid.values()[0], grid.values()[-1]
        inside = (rows >= (low - zero) * scale - half) & (rows <= (high - zero) * scale + half)
        y = from_rows(rounded, tuple(x.shape), tile).to(x.dtype)
        passes = from_rows(inside, tuple(x.shape), tile)
    return y + (x - x.detach()) * passes


def fixed_grid(format: Format) -> Grid:
    """The format's grid; UnsupportedError where it has to be fitted to each tensor, which only weights can be."""
    if is_fitted(format.grid):
        raise UnsupportedError(
            f"format '{spell_format(format)}' is fitted to the values of one tensor: it serves weights only."
        )
    return format.grid


class Quantizer(nn.Module, ABC):
    """What all quantizers of a format have: a mode, and what passed through while probing."""

    def __init__(self, spec: TensorSpec) -> None:
        super().__init__()
        self.spec = spec
        self.mode: Mode = "off"
        self.probes: list[Tensor] = []

    @property
    def format(self) -> Format:
        assert self.spec.format is not None
        return self.spec.format

    def take_probes(self) -> list[Tensor]:
        """What passed through in probe mode since the last call, as leaves or links of one autograd graph."""
        found, self.probes = self.probes, []
        return found

    @abstractmethod
    def rounded(self, x: Tensor) -> Tensor:
        """What quantizing makes of x."""

    def forward(self, x: Tensor) -> Tensor:
        if self.mode == "quantize":
            return self.rounded(x)
        if self.mode == "probe" and x.is_floating_point():
            # Its own link of the graph: the gradient is that of who reads the quantized value, not of other readers.
            # Not view_as: of one sample it gives strides that torch's kernels take for channels first; copying between
            # the two orders took a fifth of the time in which DeepLab's ranges are chosen.
            x = x[...] if x.requires_grad else x.detach().requires_grad_()
            self.probes.append(x)
        return x

    def extra_repr(self) -> str:
        return f"{self.spec!r}, mode={self.mode!r}"


class FakeQuant(Quantizer):
    """The quantizer of an activation.

    scale, zero    per tile, in the shape of the grid of tiles; a scalar for one tile; empty until `set_parameters`
    statistics     what observing has seen
    behind_relu    whether only ReLUs give what it reads
    learner        while the range learns: what rounds instead of them
    """

    scale: Tensor
    zero: Tensor

    def __init__(self, spec: TensorSpec, values: tuple[str, ...]) -> None:
        super().__init__(spec)
        self.values = values
        self.statistics = Histogram()
        self.register_buffer("scale", torch.empty(0))
        self.register_buffer("zero", torch.empty(0))
        self.behind_relu = False
        self.learner: LearnedRange | MovingExtremes | None = None

    @property
    def dynamic(self) -> bool:
        """Whether ranges are measured on each input: asked for, or because blocks have no range known beforehand."""
        kind = self.format
        return self.spec.dynamic or kind.block != TENSOR or kind.shares_scale or is_fitted(kind.grid)

    @property
    def grid(self) -> Grid:
        """A grid that is known before the data."""
        return fixed_grid(self.format)

    @property
    def ready(self) -> bool:
        return self.scale.numel() > 0

    def set_parameters(self, scale: Tensor, zero: Tensor) -> None:
        self.scale, self.zero = scale.to(self.scale.device), zero.to(self.scale.device)

    def learn(self) -> "LearnedRange | MovingExtremes":
        """Let the range learn, until `settle`: by the method of the spec's range, or LSQ where it names none."""
        method = self.spec.range if isinstance(self.spec.range, Learned) else Learned("lsq")
        self.learner = activation_learner(method, self.format, self.scale, self.zero)
        self.learner.behind_relu = self.behind_relu
        return self.learner

    def settle(self) -> None:
        """Keep the range that was learned."""
        (scale, zero), self.learner = self.held(), None
        self.set_parameters(scale.reshape(self.scale.shape), zero.reshape(self.zero.shape))

    def held(self) -> tuple[Tensor, Tensor]:
        """Scale and zero as they are now."""
        return (self.scale, self.zero) if self.learner is None else self.learner.scale_and_zero()

    def stops_at_zero(self) -> bool:
        """Whether no gradient passes at 0 and below."""
        return self.mode == "quantize" and self.learner is not None and self.learner.stops_at_zero()

    def limits(self) -> tuple[float, float]:
        """Smallest and largest number that a per-tensor quantizer can give."""
        values, (scale, zero) = self.grid.values(), self.held()
        return tuple(float((end - zero) * scale) for end in (values[0], values[-1]))  # type: ignore[return-value]

    def rounded(self, x: Tensor) -> Tensor:
        """x in the format, with a straight-through gradient; as it is where no range is known yet."""
        if self.dynamic:
            return straight_through(x, self._measured(x)) if x.numel() else x
        if self.learner is not None:
            learned: Tensor = self.learner(x)
            return learned
        return fake_quantize(x, self.format, self.scale, self.zero) if self.ready else x

    def _measured(self, x: Tensor) -> Tensor:
        """x in the format, its range measured on x itself."""
        kind, held = self.format, x.detach()
        if kind.block == TENSOR and not (kind.shares_scale or is_fitted(kind.grid)):
            return fake_quantize(held, kind, *self.scale_and_zero(held))
        if kind.block is None or kind.shares_scale:
            return torch.as_tensor(quantize(held, kind).dequantize())
        bounds = self.spec.range.bounds(RawRows(to_rows(held, kind.block)), kind)
        return torch.as_tensor(quantize(held, kind, bounds).dequantize())

    def scale_and_zero(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Scale and zero of a single tile under which x is rounded: those that are held, or measured on x."""
        if not self.dynamic:
            return self.held()
        return scale_and_zero(*self.spec.range.bounds(RawRows(x.reshape(1, -1)), self.format), self.format)

    def forward(self, x: Tensor) -> Tensor:
        if self.mode == "observe":
            self.statistics.add(as_stored(x))
        return super().forward(x)
