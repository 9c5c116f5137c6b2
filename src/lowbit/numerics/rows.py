"""Blocks and rows: how many elements share one number, and the reshaping that makes everything else row-wise.

After `to_rows` nothing sees an axis, a channel or a group: a row is what shares one scale.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

from lowbit.errors import ShapeError

WHOLE = 0  # as a length: the whole axis


@dataclass(frozen=True)
class Block:
    """How many elements share one number.

    lengths  (axis, length) pairs; length WHOLE is the whole axis
    rest     length on every other axis: 1 or WHOLE
    The last tile of an axis may be shorter. Made by TENSOR, ELEMENT, channel(), group() and tile().
    """

    lengths: tuple[tuple[int, int], ...] = ()
    rest: int = WHOLE

    def tile(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Length of a tile on each axis of `shape`; never longer than the axis."""
        tile = [self.rest] * len(shape)
        for axis, length in self.lengths:
            if not -len(shape) <= axis < len(shape):
                raise ShapeError(f"{self!r} needs an axis {axis}, but the tensor has shape {tuple(shape)}.")
            tile[axis] = length
        return tuple(
            max(1, min(length if length != WHOLE else dim, dim)) for length, dim in zip(tile, shape, strict=True)
        )

    @property
    def elements(self) -> float:
        """Elements of a full tile, or infinity where the tile grows with the tensor."""
        lengths = [length for _, length in self.lengths]
        return float("inf") if self.rest == WHOLE or WHOLE in lengths else prod(lengths)

    @property
    def group_axis(self) -> int | None:
        """The axis along which a group() runs; None for other blocks."""
        return self.lengths[0][0] if self.rest == 1 and len(self.lengths) == 1 else None

    def __repr__(self) -> str:
        if not self.lengths:
            return "TENSOR" if self.rest == WHOLE else "ELEMENT"
        if self.rest == WHOLE and all(length == 1 for _, length in self.lengths):
            return f"channel({', '.join(str(axis) for axis, _ in self.lengths)})"
        if self.rest == 1 and len(self.lengths) == 1 and self.lengths[0][1] != WHOLE:
            axis, length = self.lengths[0]
            return f"group({length})" if axis == -1 else f"group({length}, axis={axis})"
        return f"tile({dict(self.lengths)}{', rest=WHOLE' if self.rest == WHOLE else ''})"


TENSOR = Block((), WHOLE)
ELEMENT = Block((), 1)


def channel(*axes: int) -> Block:
    """One number for each index of the axis (or of each combination of the axes)."""
    return tile(dict.fromkeys(axes, 1), rest=WHOLE)


def group(length: int, axis: int = -1) -> Block:
    """One number for each `length` consecutive elements along one axis."""
    return tile({axis: length})


def tile(lengths: Mapping[int, int], rest: int = 1) -> Block:
    """One number for each box of the given lengths; `rest` is the length on the axes not named, 1 or WHOLE."""
    for axis, length in lengths.items():
        if length < 0 or (length == 0 and length is not WHOLE):
            raise ShapeError(f"a tile of {length} elements along axis {axis} cannot be: use 1 or more, or WHOLE.")
    if rest not in (1, WHOLE):
        raise ShapeError(f"rest={rest} in a tile: use 1 or WHOLE.")
    return Block(tuple(lengths.items()), rest)


def tile_counts(shape: tuple[int, ...], tile: tuple[int, ...]) -> tuple[int, ...]:
    """Number of tiles along each axis: the shape of the scale tensor."""
    return tuple(-(-dim // length) for dim, length in zip(shape, tile, strict=True))


def to_rows(x: Tensor, block: Block) -> Tensor:
    """x as (n_blocks, block_elements), blocks in row-major order of the grid of tiles. A view where possible.

    A shorter last tile is filled by repeating its last element: a zero would widen the range of an all-positive tile.
    """
    shape = tuple(x.shape)
    return tiles_to_rows(x, block.tile(shape))


def tiles_to_rows(x: Tensor, tile: tuple[int, ...]) -> Tensor:
    """`to_rows` for a tile already known: its length on each axis."""
    shape = tuple(x.shape)
    counts = tile_counts(shape, tile)
    if x.numel() == 0:
        return x.reshape(0, prod(tile))
    for axis, (dim, length, count) in enumerate(zip(shape, tile, counts, strict=True)):
        if dim != length * count:
            last = x.narrow(axis, dim - 1, 1)
            x = torch.cat([x, last.expand(*x.shape[:axis], length * count - dim, *x.shape[axis + 1 :])], dim=axis)
    if _is_contiguous_tile(tile, tuple(x.shape)):
        return x.reshape(prod(counts), prod(tile))
    split = x.reshape([n for pair in zip(counts, tile, strict=True) for n in pair])
    axes = len(shape)
    order = [2 * axis for axis in range(axes)] + [2 * axis + 1 for axis in range(axes)]
    return split.permute(order).reshape(prod(counts), prod(tile))


def from_rows(rows: Tensor, shape: tuple[int, ...], tile: tuple[int, ...]) -> Tensor:
    """The inverse of `to_rows`: a tensor of `shape`, fill elements dropped."""
    shape = tuple(shape)
    counts = tile_counts(shape, tile)
    if rows.numel() == 0:
        return rows.reshape(shape)
    full = tuple(count * length for count, length in zip(counts, tile, strict=True))
    if _is_contiguous_tile(tile, full):
        x = rows.reshape(full)
    else:
        axes = len(shape)
        order = [axis // 2 + (axis % 2) * axes for axis in range(2 * axes)]
        x = rows.reshape(counts + tile).permute(order).reshape(full)
    for axis, (dim, padded) in enumerate(zip(shape, full, strict=True)):
        if dim != padded:
            x = x.narrow(axis, 0, dim)
    return x.contiguous()


def expand_tiles(per_tile: Tensor, shape: tuple[int, ...], tile: tuple[int, ...]) -> Tensor:
    """One number per tile, (counts), to one per element, (shape)."""
    for axis, (dim, length) in enumerate(zip(shape, tile, strict=True)):
        if per_tile.shape[axis] != dim and length > 1:
            per_tile = per_tile.repeat_interleave(length, dim=axis).narrow(axis, 0, dim)
    return per_tile.expand(shape)


def _is_contiguous_tile(tile: tuple[int, ...], shape: tuple[int, ...]) -> bool:
    """Whether each tile is a run of consecutive elements: whole axes after one split axis after single elements."""
    axis = 0
    while axis < len(tile) and tile[axis] == 1:
        axis += 1
    return all(length == dim for length, dim in zip(tile[axis + 1 :], shape[axis + 1 :], strict=True))
