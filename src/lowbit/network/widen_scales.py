"""Widen weight scales under which a bias would not fit its int32.

A channel that training switched off has weights of 1e-12 and a bias of order 1: at scale S_x · S_w its bias needs more
than 31 bits and saturates. Its weights may as well round to 0.
"""

from collections.abc import Container
from dataclasses import replace

import torch

from lowbit.network.network import Network
from lowbit.network.stored import FakeBias
from lowbit.numerics import QuantTensor, quantize
from lowbit.numerics.grids import grid_table, is_whole
from lowbit.numerics.rows import expand_tiles

LARGEST_BIAS = 2.0**30  # steps: half of int32, the other half is for the sum that it is added to


def widen_scales_for_biases(simulation: Network, weights: Container[str] | None = None) -> list[str]:
    """Raise each weight scale S_w until |bias| ≤ 2^30 steps of S_x · S_w. What was done, in words.

    weights   whose scales; None: all
    """
    done = []
    for name, site in simulation.placement.sites.items():
        if weights is not None and (site.product is None or site.product[1] not in weights):
            continue
        quantizer = simulation.quantizers[name]
        if not isinstance(quantizer, FakeBias) or site.product is None:
            continue
        activation, weight = quantizer.sources
        if not activation.ready:
            continue
        bias = simulation.parameter(name).detach()
        least = (bias.abs() / (activation.scale.reshape(()) * LARGEST_BIAS)).reshape(-1)
        scale = weight.scale.reshape(-1)
        short = scale < least if scale.numel() > 1 else scale < least.max()
        if bool(short.any()) and is_whole(weight.format.grid):
            top = weight.format.reach or grid_table(weight.format.grid).maximum
            bound = (torch.maximum(scale, least if scale.numel() > 1 else least.max()) * top).reshape(-1, 1)
            wider = quantize(simulation.parameter(site.product[1]).detach(), weight.format, (-bound, bound))
            weight.store(_keep_codes(weight.stored, wider))
            done.append(f"'{name}': {int(short.sum())} channel(s) with weights near 0 got a scale that their bias fits")
    return done


def _keep_codes(before: QuantTensor | None, wider: QuantTensor) -> QuantTensor:
    """The wider tensor with the codes from before where scale and zero stayed: a solver chose them."""
    assert before is not None
    same = (before.scale_values() == wider.scale_values()) & (before.zero_values() == wider.zero_values())
    stayed = expand_tiles(torch.as_tensor(same), wider.shape, wider.tile)
    return replace(wider, codes=torch.where(stayed, torch.as_tensor(before.codes), torch.as_tensor(wider.codes)))
