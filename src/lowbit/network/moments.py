"""What each weight is multiplied with, as second moments: exactly, and as it comes out of layers quantized before."""

from collections.abc import Iterable, Iterator, Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor, fx

from lowbit.graph.layer import Layer
from lowbit.graph.pads import pads_of
from lowbit.network.in_step import Walk, in_step
from lowbit.network.operators_spatial import pad_sides
from lowbit.solve.moments import Moments

LARGEST = 8192  # inputs of a layer whose moments are kept: 8192² float64 numbers are 512 MiB
ROWS_AN_INPUT = 128  # positions summed for each input, about: neighbours are correlated, so a subsample will do


def moments_in_step(
    exact: Sequence[Walk], quantized: Sequence[Walk], names: Iterable[str], nodes: Iterable[fx.Node] | None = None
) -> Iterator[tuple[str, Moments]]:
    """(name, moments) for the weights of these names, in the order of the network.

    exact, quantized   the same batches; the weight, or the codes in its quantizer, may be replaced before the next is
                       asked for
    nodes              of the network that the batches go through; None: all

    Left out are weights of operators that do not sum channels or windows, of more than LARGEST inputs, those that
    several nodes read, and those that are multiplied with nothing or with what is not finite.
    """
    wanted = set(names)
    for node in in_step(*exact, *quantized, nodes=nodes):
        layer: Layer | None = node.meta.get("layer")
        if layer is None or len(layer.value.uses()) > 1 or layer.kind.reads == "scattered" or _inputs(layer) > LARGEST:
            continue
        name, data, weight = str(layer.value.name), node.args[0], node.args[layer.index]
        assert isinstance(data, fx.Node)
        assert isinstance(weight, fx.Node)
        if name not in wanted:
            continue
        found = _moments(node, [(a.env[data], b.env[data]) for a, b in zip(exact, quantized, strict=True)])
        if found.rows and bool(found.quantized.isfinite().all() and found.cross.isfinite().all()):
            yield name, found
            for walk in quantized:
                walk.renew(weight)


def multiplied(node: fx.Node, x: Tensor, every: int = 1) -> Tensor:
    """(groups, positions, inputs): what a linear layer multiplies with its weight, at every n-th position of x."""
    view, shape = _positions(node, x)
    # Indexed before it is reshaped: a convolution's windows as a matrix take kernel times the memory of x.
    rows = view[::every] if len(shape) == 1 else view[torch.unravel_index(torch.arange(0, prod(shape), every), shape)]
    layer: Layer = node.meta["layer"]
    return rows.reshape(len(rows), layer.groups, _inputs(layer)).swapaxes(0, 1)


def _positions(node: fx.Node, x: Tensor) -> tuple[Tensor, tuple[int, ...]]:
    """A view (positions …, inputs …) of what a linear layer multiplies at each position, and the positions' shape."""
    layer: Layer = node.meta["layer"]
    if layer.kind.reads == "channels":
        return x.reshape(-1, x.shape[-1]), (x.numel() // x.shape[-1],)
    how: dict[str, Any] = dict(node.kwargs)
    kernel = layer.weight.shape[2:]
    strides, dilations = how.get("strides") or (1,) * len(kernel), how.get("dilations") or (1,) * len(kernel)
    pads = pads_of(x.shape[2:], kernel, strides, dilations, how.get("auto_pad", "NOTSET"), how.get("pads"))
    x = pad_sides(x, *pads)
    for axis, (k, s, d) in enumerate(zip(kernel, strides, dilations, strict=True), start=2):
        x = x.unfold(axis, d * (k - 1) + 1, s)[..., ::d]
    x = x.movedim(1, len(kernel) + 1)
    return x, tuple(x.shape[: len(kernel) + 1])


def _inputs(layer: Layer) -> int:
    """How many products each output sums."""
    return int(layer.weight.size) // layer.outputs


def _moments(node: fx.Node, pairs: Sequence[tuple[Tensor, Tensor]]) -> Moments:
    layer: Layer = node.meta["layer"]
    inputs = _inputs(layer)
    positions = prod(_positions(node, pairs[0][0])[1]) * len(pairs)
    every = positions // (ROWS_AN_INPUT * inputs) | 1  # odd: positions of a row of pixels take turns
    sums, count = torch.zeros(2, layer.groups, inputs, inputs, dtype=torch.float64), 0
    for pair in pairs:
        exact, quantized = (multiplied(node, x, every) for x in pair)
        sums += torch.stack([quantized.mT @ quantized, exact.mT @ quantized])
        count += exact.shape[1]
    return Moments(sums[0], sums[1], count, layer.output_axis)
