"""Copies as TFLite's operators: which of CONCATENATION, PAD, STRIDED_SLICE and TRANSPOSE moves codes the same way."""

from collections.abc import Iterator
from itertools import permutations
from typing import Any

import numpy as np

from lowbit.errors import UnsupportedError
from lowbit.integer.program import Copy, Ints, Piece, Tensor

Move = tuple[str, list[int], list[Ints], dict[str, Any], Tensor]  # operator, sources, constants, options, output


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
    if layer.fill is None:
        found = _slice(lies, index)
        if found is not None:
            begin, end, strides = (np.array(numbers, np.int32) for numbers in found)
            yield "STRIDED_SLICE", [0], [begin, end, strides], {}, output
            return
        for order in permutations(range(lies.ndim)):
            turned = lies.transpose(order)
            if turned.shape == index.shape and np.array_equal(turned, index):
                yield "TRANSPOSE", [0], [np.array(order, np.int32)], {}, output
                return
    raise UnsupportedError("values moved in a way that is no pad, slice or transpose")


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
