"""Where values lie in memory: orders of axes, and copies where an order has to change or an operator moves values.

Each function appends the copies that it needs to `layers`. A view is no copy: the same memory under another shape.
"""

from dataclasses import replace

import numpy as np
import onnx_ir as ir

from lowbit.errors import UnsupportedError
from lowbit.integer.moves import FILLED, pieces_of, positions
from lowbit.integer.program import Copy, Layer
from lowbit.integer.tensors import Ints, Tensor
from lowbit.integer.values import Array, Coded, channels_last, onnx_shape

MOVING = frozenset(
    {
        *("Identity", "Dropout", "Reshape", "Flatten", "Transpose", "Squeeze", "Unsqueeze", "Slice", "Split", "Concat"),
        *("Pad", "Expand", "Tile", "DepthToSpace", "SpaceToDepth", "Gather", "Resize"),
    }
)


def in_channels_last(layers: list[Layer], coded: Coded) -> Coded:
    return in_order(layers, coded, channels_last(len(coded.shape)))


def in_order(layers: list[Layer], coded: Coded, order: tuple[int, ...]) -> Coded:
    """The same values with their axes in this order in memory; copied where they lie otherwise."""
    held = coded.tensor
    if held.order == order or coded.function is not None:
        return coded
    name = f"{held.name}.{''.join(map(str, order))}"
    if made := [layer.output for layer in layers if layer.output.name == name]:
        return Coded(made[0])  # another reader asked for it
    return copied(layers, name, [held], _lies(held).transpose(order), order)


def spread(layers: list[Layer], coded: Coded, strides: tuple[int, ...]) -> Coded:
    """Channels last, with strides − 1 zeros between neighbours along each axis of positions."""
    held = coded.tensor
    if max(strides) == 1 or coded.function is not None:
        return coded
    sizes = [(size - 1) * stride + 1 for size, stride in zip(held.shape[1:-1], strides, strict=True)]
    where = np.full((1, *sizes, held.shape[-1]), FILLED)
    where[(slice(None), *(slice(None, None, stride) for stride in strides))] = _lies(held).transpose(held.order)
    return copied(layers, f"{held.name}.spread{'x'.join(map(str, strides))}", [held], where, held.order)


def copied(
    layers: list[Layer], name: str, sources: list[Tensor], where: Ints, order: tuple[int, ...], fill: float = 0
) -> Coded:
    """Codes of these tensors in other places: where[i] counts through the memory of all of them."""
    first = sources[0]
    if len(sources) == 1 and np.array_equal(where.reshape(-1), np.arange(first.size)):
        return Coded(replace(first, shape=where.shape, order=order))  # as it lies
    tensor = replace(first, name=name, shape=where.shape, order=order)
    pieces = pieces_of(where, [s.size for s in sources], name)
    filled = np.any(where == FILLED)
    code = int(np.clip(np.rint(fill / first.scale) + first.zero, *first.ends))
    layers.append(Copy(name, tuple(sources), tensor, pieces, code if filled else None))
    return Coded(tensor)


def moved(layers: list[Layer], node: ir.Node, data: dict[int, Coded], constants: dict[int, Array]) -> list[Coded]:
    """The outputs of a node that only moves values.

    data        its inputs by index, all of one scale
    constants   its other inputs: shapes, axes, pads
    """
    sources = [coded.tensor for coded in data.values()]
    if any(coded.function is not None for coded in data.values()):
        raise UnsupportedError("reads a value that no quantizer stands on")
    if len({(s.scale, s.zero, s.bits) for s in sources}) > 1:
        raise UnsupportedError("joins values of several scales")
    if node.op_type == "Resize" and node.attributes.get_string("mode", "nearest") != "nearest":
        raise UnsupportedError("resizes by other than the nearest value")
    filling = float(constants[2]) if node.op_type == "Pad" and 2 in constants else 0.0
    starts = np.cumsum([0, *(s.size for s in sources)])
    lies = np.concatenate([_lies(s).reshape(-1) + start for s, start in zip(sources, starts, strict=False)])
    shapes = {i: onnx_shape(coded.tensor) for i, coded in data.items()}
    keeps = {len(s.shape) for s in sources} if sources[0].order == channels_last(len(sources[0].shape)) else set()
    outputs = []
    for value, found in zip(node.outputs, positions(node, shapes, constants), strict=True):
        order = channels_last(found.ndim) if found.ndim in keeps else tuple(range(found.ndim))
        place = np.where(found == FILLED, FILLED, lies[np.maximum(found, 0)])
        outputs.append(_placed(layers, str(value.name), sources, place, order, filling))
    return outputs


def _placed(
    layers: list[Layer], name: str, sources: list[Tensor], place: Ints, order: tuple[int, ...], fill: float
) -> Coded:
    """In the order that needs no copy, if there is one: a transpose often only renames axes."""
    for free in (order, tuple(range(place.ndim)), tuple(np.argsort(_strides(place))[::-1])):
        where = place.transpose(free)
        if len(sources) == 1 and np.array_equal(where.reshape(-1), np.arange(sources[0].size)):
            return copied(layers, name, sources, where, tuple(int(a) for a in free))
    return copied(layers, name, sources, place.transpose(order), order, fill)


def _lies(tensor: Tensor) -> Ints:
    """In ONNX's shape, where in memory each value lies."""
    return np.arange(tensor.size).reshape(tensor.shape).transpose(np.argsort(tensor.order))


def _strides(place: Ints) -> list[int]:
    """How far one step along each axis moves through memory."""
    return [
        int(np.take(place, 1, axis).reshape(-1)[0] - place.reshape(-1)[0]) if place.shape[axis] > 1 else place.size + 1
        for axis in range(place.ndim)
    ]
