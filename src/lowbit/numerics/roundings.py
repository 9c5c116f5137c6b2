"""Roundings: which of two neighbouring grid values a number becomes.

A rounding is a function of where the number lies between its neighbours, so it works on every grid:
    fraction  0 … 1, distance from the lower neighbour in parts of the gap
    odd       whether the lower neighbour's position, counted from zero, is odd
    negative  whether the gap lies below zero
    return    whether to take the upper neighbour
"""

from collections.abc import Callable
from functools import lru_cache

import torch
from torch import Tensor

from lowbit.errors import InputError
from lowbit.numerics.grids import Fitted, Grid, grid_table

Rounding = Callable[[Tensor, Tensor, Tensor], Tensor]


def nearest(fraction: Tensor, odd: Tensor, negative: Tensor) -> Tensor:
    """To the nearest neighbour; a tie goes to the even one, as in IEEE 754."""
    return (fraction > 0.5) | ((fraction == 0.5) & odd)


def up(fraction: Tensor, odd: Tensor, negative: Tensor) -> Tensor:
    """Towards plus infinity."""
    return fraction > 0


def down(fraction: Tensor, odd: Tensor, negative: Tensor) -> Tensor:
    """Towards minus infinity."""
    return fraction >= 1


def toward_zero(fraction: Tensor, odd: Tensor, negative: Tensor) -> Tensor:
    """Towards zero: truncation."""
    return torch.where(negative, fraction > 0, fraction >= 1)


def stochastic(seed: int | None = None) -> Rounding:
    """To the upper neighbour with probability `fraction`, so that the expected value is the number itself.

    Successive calls go on in the sequence of the seed, which is the same on the same kind of device. Without a seed
    they draw from torch's own sequence, which `torch.manual_seed` sets.
    """
    generators: dict[torch.device, torch.Generator | None] = {}

    def draw(fraction: Tensor, odd: Tensor, negative: Tensor) -> Tensor:
        device = fraction.device
        if device not in generators:
            generators[device] = None if seed is None else torch.Generator(device).manual_seed(seed)
        # float32 whatever the data: in bfloat16 a draw has 8 bits and the expected value is biased.
        chance = torch.rand(fraction.shape, generator=generators[device], device=device, dtype=torch.float32)
        return chance < fraction

    return draw


ROUNDINGS: dict[str, Rounding] = {"nearest": nearest, "up": up, "down": down, "toward_zero": toward_zero}


def parse_rounding(name: str) -> Rounding:
    """A rounding by name: one of ROUNDINGS, "stochastic", or "stochastic:7", which starts its sequence anew."""
    if name in ROUNDINGS:
        return ROUNDINGS[name]
    kind, _, seed = name.partition(":")
    if kind == "stochastic" and (seed.isdigit() or not seed):
        return stochastic(int(seed) if seed else None)
    raise InputError(
        f"rounding '{name}' is unknown. Roundings are: {', '.join(ROUNDINGS)}, stochastic, stochastic:SEED."
    )


def grid_thresholds(grid: Grid | Fitted, rounding: Rounding, table: Tensor | None = None) -> Tensor:
    """For each value but the lowest, the smallest float32 that rounds to it or beyond: (n_blocks or 1, n_codes - 1).

    rounding  one of ROUNDINGS
    table     the sorted values of a fitted grid, (n_blocks, n_codes)
    """
    return _own_thresholds(grid, rounding) if table is None else _thresholds(table, 0, rounding)


@lru_cache(maxsize=256)
def _own_thresholds(grid: Grid | Fitted, rounding: Rounding) -> Tensor:
    table = grid_table(grid)
    return _thresholds(torch.from_numpy(table.values)[None], table.zero_position, rounding)


def _thresholds(values: Tensor, zero_position: int, rounding: Rounding) -> Tensor:
    """The rounding is asked about a gap's middle and its ends, so any monotone function of the fraction will do."""
    low, high = values[..., :-1].to(torch.float64), values[..., 1:].to(torch.float64)
    odd = ((torch.arange(low.shape[-1], device=values.device) - zero_position) % 2 != 0).expand(low.shape)
    negative = low < 0
    below, above = low.to(torch.float32), high.to(torch.float32)
    middle = (low + high) / 2
    # The smallest float32 at or above the middle, and the smallest above it.
    at = middle.to(torch.float32)
    beyond = torch.nextafter(at, torch.full_like(at, float("inf")))
    from_middle = torch.where(at.to(torch.float64) >= middle, at, beyond)
    past_middle = torch.where(at.to(torch.float64) > middle, at, beyond)
    result = above
    for fraction, limit in (
        (0.5 + 1e-6, past_middle),
        (0.5, from_middle),
        (1e-6, torch.nextafter(below, torch.full_like(below, float("inf")))),
    ):
        chosen = rounding(torch.full_like(at, fraction), odd, negative)
        result = torch.where(chosen, limit, result)
    # Between equal values (fitted tables) any threshold does; it must not fall below the one before it.
    return torch.where(high > low, result, above)
