"""Weights whose scales learn, or are measured at each step.

Each method says what of a weight is rounded, at which step, and by which scale the codes are multiplied. The gradient
reaches the weight straight through the rounding (Bengio et al. 2013), 0 where it clips.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from math import sqrt
from types import MappingProxyType
from typing import NamedTuple

import torch
from torch import Tensor, nn

from lowbit.network.learned_step import round_to_grid
from lowbit.network.straight_through import straight_through
from lowbit.numerics import Grid, QuantTensor, decode_rows, encode_rows, fake_quantize_rows, is_fitted
from lowbit.numerics.grids import grid_table
from lowbit.numerics.rows import from_rows, tiles_to_rows

TINY = 2.0**-100  # a row of zeros has a scale, too
TERNARY_THRESHOLD = 0.7  # of the mean magnitude


class Rounding(NamedTuple):
    """What is rounded, (n_blocks, n), at which step, and the scale of its codes, (n_blocks, 1) each.

    scale   None: the step itself
    """

    rows: Tensor
    step: Tensor
    scale: Tensor | None = None


@dataclass(frozen=True)
class WeightMethod:
    """How a weight is rounded.

    rounding  (rows, step, grid) → Rounding; rows keep their gradient
    clips     no gradient reaches values beyond the ends of the grid
    learns    the step is a parameter
    """

    rounding: Callable[[Tensor, Tensor, Grid], Rounding]
    clips: bool = False
    learns: bool = False


def _as_they_are(rows: Tensor, step: Tensor, grid: Grid) -> Rounding:
    """LSQ (Esser et al. 2020, arXiv 1902.08153), eq. 1 to 3, and the straight-through estimator at a fixed step."""
    return Rounding(rows, step)


def _normalized(rows: Tensor, step: Tensor, grid: Grid) -> Rounding:
    """APoT (Li et al. 2020, arXiv 1909.13144), weight normalization and reparameterized clip: (w − μ) / σ is rounded,
    and the gradient of the clip α is that of a step.

    Multiplied by σ again, so that a trained network keeps its scale. What μ added a live batch norm takes up, within
    some steps.
    """
    center, spread = rows.mean(1, keepdim=True).detach(), rows.std(1, keepdim=True).clamp_min(TINY).detach()
    return Rounding((rows - center) / spread, step, step * spread)


def _through_tanh(rows: Tensor, step: Tensor, grid: Grid) -> Rounding:
    """DoReFa (Zhou et al. 2016, arXiv 1606.06160), eq. 9: tanh(w) / max |tanh(w)| is rounded to the grid on [−1, 1].

    The scale is that of the least squared error to w, so that a trained network begins as it is.
    """
    squeezed = torch.tanh(rows)
    squeezed = squeezed / squeezed.abs().amax(1, keepdim=True).clamp_min(TINY)
    full = torch.full_like(step, 1 / grid_table(grid).maximum)
    return _least_squares(squeezed, full, rows, grid)


def _least_squares(rounded: Tensor, step: Tensor, rows: Tensor, grid: Grid) -> Rounding:
    """With the scale under which the codes come closest to the weight."""
    codes = fake_quantize_rows(rounded.detach(), step, torch.zeros_like(step), grid) / step
    scale = (codes * rows.detach()).sum(1, keepdim=True) / codes.square().sum(1, keepdim=True).clamp_min(TINY)
    return Rounding(rounded, step, scale.clamp_min(TINY))


def _extremes(rows: Tensor, step: Tensor, grid: Grid) -> Rounding:
    """Jacob et al. 2018 (arXiv 1712.05877), section 3.1: the greatest magnitude lands on the end of the grid."""
    return Rounding(rows, rows.detach().abs().amax(1, keepdim=True).clamp_min(TINY) / grid_table(grid).maximum)


def _two_values(rows: Tensor, step: Tensor, grid: Grid) -> Rounding:
    """XNOR-Net and BWN (Rastegari et al. 2016, arXiv 1603.05279), eq. 6: sign(w) times the mean of |w|.

    What flows back reaches w as it is (Courbariaux et al. 2015, arXiv 1511.00363).
    """
    mean = rows.detach().abs().mean(1, keepdim=True).clamp_min(TINY)
    return Rounding(rows, mean)


def _three_values(rows: Tensor, step: Tensor, grid: Grid) -> Rounding:
    """TWN (Li et al. 2016, arXiv 1605.04711), eq. 5, 6: 0 up to Δ = 0.7 · mean |w|, beyond it the mean of |w| there."""
    size = rows.detach().abs()
    threshold = TERNARY_THRESHOLD * size.mean(1, keepdim=True)
    beyond = size > threshold
    scale = (size * beyond).sum(1, keepdim=True) / beyond.sum(1, keepdim=True).clamp_min(1)
    return Rounding(rows, (2 * threshold).clamp_min(TINY), scale.clamp_min(TINY))


WEIGHT_METHODS: Mapping[str, WeightMethod] = MappingProxyType(
    {
        "ste": WeightMethod(_as_they_are, clips=True),
        "lsq": WeightMethod(_as_they_are, clips=True, learns=True),
        "lsq+": WeightMethod(_as_they_are, clips=True, learns=True),
        "apot": WeightMethod(_normalized, clips=True, learns=True),
        "ema": WeightMethod(_extremes),
        "dorefa": WeightMethod(_through_tanh),
        "xnor": WeightMethod(_two_values),
        "twn": WeightMethod(_three_values),
    }
)


class WeightLearner(nn.Module):
    """A weight on the grid of a format, with a scale for each tile.

    template  the format, and the tiles
    unit      (n_blocks, 1) the step with which training begins
    step      (n_blocks, 1) the step in units: a parameter where it learns
    scale     of each tile, in the shape of the grid of tiles, at the last call
    """

    unit: Tensor
    step: Tensor
    scale: Tensor

    def __init__(self, method: WeightMethod, template: QuantTensor, weight: Tensor) -> None:
        super().__init__()
        assert isinstance(template.scale, Tensor)
        assert not is_fitted(template.format.grid)
        self.method, self.template, self.grid = method, template, template.format.grid
        start = template.scale.detach().clone().reshape(-1, 1)
        if method.rounding is _normalized:
            start = start / self._rows(weight.detach()).std(1, keepdim=True).clamp_min(TINY)
        self.register_buffer("unit", start)
        if method.learns:
            self.step = nn.Parameter(torch.ones_like(start))
        else:
            self.register_buffer("step", torch.ones_like(start))
        self.register_buffer("scale", torch.as_tensor(self.stored(weight).scale_values()), persistent=False)

    def _rows(self, weight: Tensor) -> Tensor:
        return tiles_to_rows(weight.float(), self.template.tile)

    def _rounding(self, weight: Tensor) -> Rounding:
        step = (self.unit * self.step.detach().abs()).clamp_min(TINY)
        return self.method.rounding(self._rows(weight), step, self.grid)

    def forward(self, weight: Tensor) -> Tensor:
        made = self._rounding(weight)
        rows = made.rows
        self.scale = (made.step if made.scale is None else made.scale).reshape(self.template.tiles)
        if self.method.clips:
            learned = self.step if self.method.learns else None
            table = grid_table(self.grid)
            # LSQ counts in steps. Of a grid whose values lie `apart` from each other the step is apart · s: its
            # gradient is that of s, divided by `apart`, and so is what it moves s by.
            apart = (table.maximum - table.minimum) / (len(table.values) - 1)
            g = 1 / sqrt(rows.shape[1] * max(1.0, table.maximum / apart)) / apart**2
            weights = g, g * table.minimum, g * table.maximum
            rows = round_to_grid(rows, made.step, self.grid, learned, self.unit, weights)
        if made.scale is not None:
            rows = straight_through(rows * (made.scale / made.step), self._stored(made)[0])
        elif not self.method.clips:
            rows = straight_through(rows, self._stored(made)[0])
        return from_rows(rows, tuple(weight.shape), self.template.tile).to(weight.dtype)

    def _stored(self, made: Rounding) -> tuple[Tensor, Tensor, Tensor]:
        """Rows as they are stored; their codes; their scales."""
        none = torch.zeros_like(made.step)
        codes = encode_rows(made.rows.detach(), made.step, none, self.grid)
        scale = made.step if made.scale is None else made.scale
        return decode_rows(codes, scale, none, self.grid), codes, scale

    @torch.no_grad()
    def stored(self, weight: Tensor) -> QuantTensor:
        """The codes and scales of a weight: decoded, they are what `forward` gives."""
        _, codes, scale = self._stored(self._rounding(weight))
        tiles, tile = self.template.tiles, self.template.tile
        return replace(self.template, codes=from_rows(codes, tuple(weight.shape), tile), scale=scale.reshape(tiles))

    def penalty(self) -> Tensor:
        return self.step.new_zeros(())
