"""A factor of each output channel that goes into the scales of a stored weight; its codes stay as they are."""

from dataclasses import replace

import torch
from torch import Tensor

from lowbit.numerics import Block, Format, QuantTensor, channel, is_fitted, tile


def takes_factor(format: Format, axis: int) -> bool:
    """Whether there is a scale, or a table for each output channel, that a factor of each can go into."""
    return format.block is not None and (not is_fitted(format.grid) or format.block == channel(axis))


def with_factor(stored: QuantTensor, factor: Tensor, axis: int) -> QuantTensor:
    """The same codes, each index of an axis times its own positive factor, which goes into the scale.

    Scales that are stored in codes keep these too where they can: their own scale takes the factor. A table for each
    channel is multiplied itself.
    """
    along = [1] * len(stored.shape)
    along[axis] = -1
    if stored.table is not None:
        return replace(stored, table=torch.as_tensor(stored.table) * factor.reshape(-1, 1))
    if isinstance(stored.scale, QuantTensor) and stored.tile[axis] == 1 and stored.zero is None:
        inner = stored.scale
        if inner.scale is None:
            kind = replace(inner.format, block=channel(axis))
            inner = replace(inner, format=kind, tile=channel(axis).tile(inner.shape), scale=factor.reshape(along))
        else:
            inner = with_factor(inner, factor, axis)
        return replace(stored, format=replace(stored.format, scale=inner.format), scale=inner)
    scale, zero, lengths = torch.as_tensor(stored.scale_values()), stored.zero, stored.tile
    block: Block | None = stored.format.block
    if lengths[axis] != 1:
        scale = _spread(scale, stored, axis)
        zero = None if zero is None else _spread(torch.as_tensor(zero), stored, axis)
        lengths = (*lengths[:axis], 1, *lengths[axis + 1 :])
        whole = all(n == m for i, (n, m) in enumerate(zip(lengths, stored.shape, strict=True)) if i != axis)
        block = channel(axis) if whole else tile(dict(enumerate(lengths)))
    kind = replace(stored.format, block=block, scale=None)
    return replace(stored, format=kind, tile=lengths, scale=scale * factor.reshape(along), zero=zero)


def _spread(of_tiles: Tensor, stored: QuantTensor, axis: int) -> Tensor:
    """A number of each tile as one of each index of the axis."""
    return of_tiles.repeat_interleave(stored.tile[axis], axis).narrow(axis, 0, stored.shape[axis])
