"""ACIQ: the clip that is best if the data is exactly Gauss or Laplace distributed, in closed form.

Source: Banner et al. 2019 (arXiv 1810.05723), sections 4.1 and 4.2.
"""

from dataclasses import dataclass
from functools import lru_cache
from math import erf, exp, log, pi, sqrt

import torch
from torch import Tensor

from lowbit.errors import InputError
from lowbit.numerics.formats import Format
from lowbit.numerics.grids import grid_table, is_fitted
from lowbit.ranges.extremes import Bounds, clip_to
from lowbit.ranges.statistics import Statistics


@lru_cache
def laplace_clip(bits: int) -> float:
    """α / b that minimizes 2 b² exp(-α/b) + α² / (3 · 4^bits): Lambert's W(3 · 4^bits), by Newton's method."""
    x = log(3 * 4.0**bits)
    for _ in range(50):
        x -= (x - 3 * 4.0**bits * exp(-x)) / (1 + x)
    return x


@lru_cache
def gauss_clip(bits: int) -> float:
    """α / σ that minimizes clipping noise plus α² / (3 · 4^bits) for the normal distribution, by bisection.

    Half of the derivative is α (1 - erf(α/√2)) + α / (3 · 4^bits) - √(2/π) exp(-α²/2), negative below the optimum.
    """
    low, high = 0.1, 20.0
    for _ in range(100):
        a = (low + high) / 2
        slope = a * (1 - erf(a / sqrt(2))) + a / (3 * 4.0**bits) - sqrt(2 / pi) * exp(-a * a / 2)
        low, high = (a, high) if slope < 0 else (low, a)
    return (low + high) / 2


def is_one_sided(statistics: Statistics, format: Format) -> Tensor:
    """Where all codes of the grid can serve one side of zero, (n_blocks, 1) bool: one bit more for the same clip."""
    all_codes = is_fitted(format.grid) or format.zero_point or grid_table(format.grid).minimum >= 0
    return ((statistics.minimum >= 0) | (statistics.maximum <= 0)) & all_codes


@dataclass(frozen=True)
class ACIQ:
    """The best clip of a Gauss or Laplace distribution with the data's spread.

    distribution  "gauss", "laplace", or "auto": per block, the one under which the data is likelier
    Two-sided data is clipped to mean ± α. One-sided data (after a ReLU) is taken for one half of a symmetric
    distribution, its zeros left out, and has one bit more.
    """

    distribution: str = "auto"

    def __post_init__(self) -> None:
        if self.distribution not in ("gauss", "laplace", "auto"):
            raise InputError(f"{self!r}: distribution must be 'gauss', 'laplace' or 'auto'.")

    def bounds(self, statistics: Statistics, format: Format) -> Bounds:
        statistics.check()
        values, weights = statistics.points()
        values, weights = values.double(), weights.double()
        one_sided = (statistics.minimum >= 0) | (statistics.maximum <= 0)
        weights = torch.where(one_sided & (values == 0), 0.0, weights)
        total = weights.sum(1, keepdim=True).clamp(min=1)
        mean = torch.where(one_sided, 0.0, (values * weights).sum(1, keepdim=True) / total)
        b = ((values - mean).abs() * weights).sum(1, keepdim=True) / total
        sigma = (((values - mean) ** 2 * weights).sum(1, keepdim=True) / total).sqrt()
        bits = format.grid.bits + is_one_sided(statistics, format)
        lowest = int(bits.min()) if bits.numel() else 0
        laplace = b * torch.where(bits > lowest, laplace_clip(lowest + 1), laplace_clip(lowest))
        gauss = sigma * torch.where(bits > lowest, gauss_clip(lowest + 1), gauss_clip(lowest))
        alpha = {"laplace": laplace, "gauss": gauss}.get(self.distribution)
        if alpha is None:
            alpha = torch.where(fits_laplace(b, sigma), laplace, gauss)
        return clip_to(statistics, (mean - alpha).float(), (mean + alpha).float())


def fits_laplace(b: Tensor, sigma: Tensor) -> Tensor:
    """Whether data with mean |x - μ| = b and standard deviation σ is likelier under Laplace than under Gauss.

    Mean log-likelihoods at the best parameters: -log(2b) - 1 against -log(2πe σ²) / 2; so where b/σ < √(πe/2)/e.
    """
    return b < sigma * sqrt(pi * exp(1) / 2) / exp(1)
