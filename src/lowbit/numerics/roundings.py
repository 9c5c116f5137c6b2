"""Roundings: which of two neighbouring grid values a number becomes.

A rounding is a function of where the number lies between its neighbours, so it works on every grid:
    fraction  0 … 1, distance from the lower neighbour in parts of the gap
    odd       whether the lower neighbour's position, counted from zero, is odd
    negative  whether the gap lies below zero
    return    whether to take the upper neighbour
"""

from collections.abc import Callable

import torch
from torch import Tensor

from lowbit.errors import InputError

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
