"""Which inputs of a layer are its weights, what their axes mean, and what a rule may call the layer."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from math import prod

import numpy as np
import onnx_ir as ir

from lowbit.numerics import WHOLE, Block, Format, channel, group, tile
from lowbit.numerics.rows import tile_counts

SMALLEST_WEIGHT = 1024  # below, the scales and nodes of a stored-only tensor weigh more than its bits save
# operator → (weight inputs, axis of the output channels, axis that is summed over)
WEIGHT_AXES: Mapping[str, tuple[tuple[int, ...], int, int]] = {
    "Conv": ((1,), 0, 1),
    "ConvTranspose": ((1,), 1, 0),
    "MatMul": ((1,), -1, -2),
    "Gemm": ((1,), 1, 0),  # transB swaps them
    "Gather": ((0,), 0, 1),
    "LSTM": ((1, 2), 1, 2),
    "GRU": ((1, 2), 1, 2),
    "RNN": ((1, 2), 1, 2),
}


def layer_names(node: ir.Node) -> tuple[str, ...]:
    """What a rule may call this layer: node name, weight names with and without '.weight', 'op:Type'."""
    names = [node.name or ""]
    for index in WEIGHT_AXES.get(node.op_type, ((),))[0]:
        weight = node.inputs[index] if index < len(node.inputs) else None
        if weight is not None and weight.const_value is not None and weight.name:
            names += [weight.name, weight.name.removesuffix(".weight")]
    return (*names, f"op:{node.op_type}")


@dataclass(frozen=True)
class Weight:
    """A float constant that a layer multiplies with: input `index` of its node; axes are counted from the front."""

    value: ir.Value
    index: int
    array: np.ndarray
    output_axis: int
    summed_axis: int


def weights_of(node: ir.Node) -> Iterator[Weight]:
    """The weights of a node; none where it has no constant ones."""
    if node.op_type not in WEIGHT_AXES or node.domain not in ("", "ai.onnx"):
        return
    inputs, output_axis, summed_axis = WEIGHT_AXES[node.op_type]
    if node.op_type == "Gemm" and node.attributes.get_int("transB"):
        output_axis, summed_axis = summed_axis, output_axis
    for index in inputs:
        value = node.inputs[index] if index < len(node.inputs) else None
        array = float_constant(value)
        if value is not None and array is not None and array.ndim:
            yield Weight(value, index, array, output_axis % array.ndim, summed_axis % array.ndim)


def float_constant(value: ir.Value | None) -> np.ndarray | None:
    """The value's array when it is a float constant."""
    if value is None or value.const_value is None or value.producer() is not None:
        return None
    return value.const_value.numpy() if value.const_value.dtype.is_floating_point() else None


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
