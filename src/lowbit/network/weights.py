"""How a recipe's blocks lie on a weight: its channel is the output channel, its groups run along the sum."""

from dataclasses import replace
from math import prod

from lowbit.numerics import WHOLE, Block, Format, channel, group, tile
from lowbit.numerics.rows import tile_counts

# Smaller stored-only tensors stay exact, at most 4 kB each. `compress`, which is asked for a small file, takes those of
# 256 numbers too.
SMALLEST_WEIGHT = 1024


def has_one_scale_an_output(block: Block | None, shape: tuple[int, ...], output_axis: int) -> bool:
    """Whether all weights that are summed into one output share a scale, as blocks as long as the sum do too."""
    if block is None:
        return False
    lengths = block.tile(shape)
    split = {axis for axis, count in enumerate(tile_counts(shape, lengths)) if count > 1}
    return not split or (split == {output_axis} and lengths[output_axis] == 1)


def orient(format: Format, output_axis: int, summed_axis: int, shape: tuple[int, ...] = ()) -> Format:
    """The recipe's channel(0) is the output channel and its group(n) runs along the sum; turn both to these axes.

    A convolution with fewer than n input channels sums over its kernel as well: the group is then as many whole kernels
    as have n weights, at least one (a depthwise kernel would otherwise have a scale for each weight).
    """
    lengths = dict(format.block.lengths) if isinstance(format.block, Block) else {}
    block, scale_shape = format.block, shape
    if block == channel(0):
        block = channel(output_axis)
    elif set(lengths) == {-1} and block == group(lengths[-1]):
        block = group(lengths[-1], summed_axis)
        kernel = [axis for axis in range(2, len(shape)) if axis not in (output_axis, summed_axis)]
        kernel_size = prod(shape[axis] for axis in kernel)
        if kernel_size > 1 and shape[summed_axis] < lengths[-1]:
            kernels = max(1, lengths[-1] // kernel_size)
            block = tile({summed_axis - len(shape): kernels} | {axis - len(shape): WHOLE for axis in kernel})
    if shape and block is not None:
        scale_shape = tile_counts(shape, block.tile(shape))
    scale = None if format.scale is None else orient(format.scale, output_axis, summed_axis, scale_shape)
    return replace(format, block=block, scale=scale)
