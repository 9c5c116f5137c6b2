"""Copies as TFLite's operators: CONCATENATION, PAD, STRIDED_SLICE, TRANSPOSE, RESIZE_NEAREST_NEIGHBOR or several."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import permutations
from typing import Any

import numpy as np

from lowbit.errors import UnsupportedError
from lowbit.integer.program import Copy, Piece
from lowbit.integer.tensors import Ints, Tensor

Move = tuple[str, list[int], list[Ints], dict[str, Any], Tensor]
# operator, sources (-1: what the move before made), constants, options, output


def moves(layer: Copy) -> Iterator[Move]:
    """The operators, in order; UnsupportedError where none does it."""
    index, output = where(layer), layer.output
    sources = layer.sources
    start = np.cumsum([0, *(tensor.size for tensor in sources)])
    if len(sources) > 1:
        for axis in range(index.ndim):
            parts = [np.arange(t.size).reshape(t.shape) + s for t, s in zip(sources, start, strict=False)]
            fits = all(p.ndim == index.ndim for p in parts) and _joinable(parts, axis)
            if fits and np.array_equal(np.concatenate(parts, axis), index):
                yield "CONCATENATION", list(range(len(sources))), [], {"Axis": axis}, output
                return
        raise UnsupportedError("values of several tensors, which are not joined along one axis")
    (source,) = sources
    lies = np.arange(source.size).reshape(source.shape)
    if layer.fill is not None and layer.fill == source.zero and lies.ndim == index.ndim:
        box = [np.unique(places) for places in np.nonzero(index >= 0)]
        pads = np.array([[b[0], size - 1 - b[-1]] for b, size in zip(box, index.shape, strict=True)], np.int32)
        if np.array_equal(np.pad(lies, pads, constant_values=-1), index):
            yield "PAD", [0], [pads], {}, output
            return
    if layer.fill == source.zero and (strides := _spread(lies, index)) is not None:
        yield from _spreading(layer, strides)
        return
    if layer.fill is None:
        if (lies.ndim == 4 == index.ndim) and np.array_equal(_repeated(lies, index.shape), index):
            yield "RESIZE_NEAREST_NEIGHBOR", [0], [np.array(index.shape[1:3], np.int32)], {}, output
            return
        found = _slice(lies, index)
        if found is not None:
            begin, end, step = (np.array(numbers, np.int32) for numbers in found)
            yield "STRIDED_SLICE", [0], [begin, end, step], {}, output
            return
        for order in permutations(range(lies.ndim)):
            turned = lies.transpose(order)
            if turned.shape == index.shape and np.array_equal(turned, index):
                yield "TRANSPOSE", [0], [np.array(order, np.int32)], {}, output
                return
    raise UnsupportedError("values moved in a way that is no pad, slice or transpose")


def _repeated(lies: Ints, shape: Sequence[int]) -> Ints:
    """Each position as often as the shape asks for."""
    for axis in (1, 2):
        lies = np.repeat(lies, max(1, shape[axis] // lies.shape[axis]), axis)
    return lies


def _spread(lies: Ints, index: Ints) -> tuple[int, int] | None:
    """Strides of height and width between which fillings stand."""
    if lies.ndim != 4 or index.ndim != 4:
        return None
    strides = [(index.shape[a] - 1) // max(lies.shape[a] - 1, 1) or 1 for a in (1, 2)]
    spread = np.full(index.shape, -1)
    target = spread[:, :: strides[0], :: strides[1]]
    if target.shape != lies.shape:
        return None
    target[:] = lies
    return (strides[0], strides[1]) if np.array_equal(spread, index) else None


def _spreading(layer: Copy, strides: tuple[int, int]) -> Iterator[Move]:
    """Zeros between positions: a pad of an axis of one that stands behind each, then the last ones are cut off."""
    (source,), output = layer.sources, layer.output
    _, h, w, c = source.shape
    shapes = (h, 1, w, 1, c), (h, strides[0], w, strides[1], c), (1, h * strides[0], w * strides[1], c)
    apart, padded, wide = (replace(output, name=f"{layer.name}/{i}", shape=shape) for i, shape in enumerate(shapes))
    pads = np.array([[0, 0], [0, strides[0] - 1], [0, 0], [0, strides[1] - 1], [0, 0]], np.int32)
    ends = np.array(output.shape, np.int32)
    yield "RESHAPE", [0], [np.array(shapes[0], np.int32)], {}, apart
    yield "PAD", [-1], [pads], {}, padded
    yield "RESHAPE", [-1], [np.array(shapes[2], np.int32)], {}, wide
    yield "STRIDED_SLICE", [-1], [np.zeros(4, np.int32), ends, np.ones(4, np.int32)], {}, output


def where(layer: Copy) -> Ints:
    """In the output's shape, where each code comes from: places count through all sources; −1 is filled."""
    index = np.full(layer.output.size, -1, np.int64)
    start = np.cumsum([0, *(tensor.size for tensor in layer.sources)])
    for piece in layer.pieces:
        index[_places(piece, piece.write_to, piece.write_steps)] = (
            _places(piece, piece.read_from, piece.read_steps) + start[piece.source]
        )
    return np.asarray(index.reshape(layer.output.shape))


def _places(piece: Piece, first: int, steps: tuple[int, ...]) -> Ints:
    loops = [np.arange(count) * step for count, step in zip(piece.counts, steps, strict=True)]
    return np.asarray(np.add.reduce(np.meshgrid(*loops, indexing="ij")).reshape(-1) + first)


def _joinable(parts: list[Ints], axis: int) -> bool:
    rest = {part.shape[:axis] + part.shape[axis + 1 :] for part in parts}
    return len(rest) == 1


def _slice(lies: Ints, index: Ints) -> tuple[list[int], list[int], list[int]] | None:
    """(begin, end, strides) of a slice that gives these places."""
    if lies.ndim != index.ndim:
        return None
    begin = [int(b) for b in np.unravel_index(int(index.reshape(-1)[0]), lies.shape)]
    strides = []
    for axis, size in enumerate(index.shape):
        second = int(np.take(index, min(1, size - 1), axis).reshape(-1)[0])
        step = int(np.unravel_index(second, lies.shape)[axis]) - begin[axis]
        strides.append(step if size > 1 else 1)
    if any(step < 1 for step in strides):
        return None
    end = [b + step * (size - 1) + 1 for b, step, size in zip(begin, strides, index.shape, strict=True)]
    cut = lies[tuple(slice(b, e, s) for b, e, s in zip(begin, end, strides, strict=True))]
    return (begin, end, strides) if np.array_equal(cut, index) else None
