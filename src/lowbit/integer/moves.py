"""Operators that only move values, as nests of loops that copy codes.

What an operator moves where is found by running it on the positions themselves: no operator has code of its own.
"""

import itertools
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import onnx_ir as ir

from lowbit.engines.compile import ENGINES
from lowbit.errors import UnsupportedError
from lowbit.integer.program import Piece
from lowbit.integer.tensors import Ints

FILLED = -1  # position of what comes from nowhere: padding
_LARGEST = 1 << 24  # positions are run as float32, which holds integers up to here
_MOST_PIECES = 64


def run_node(node: ir.Node, given: Mapping[int, np.ndarray]) -> list[np.ndarray]:
    """The outputs of one node, run by onnxruntime on these inputs (by index); all other inputs are absent."""
    inputs = [
        ir.Value(name=f"i{index}", type=ir.TensorType(ir.DataType.from_numpy(array.dtype)), shape=ir.Shape(array.shape))
        for index, array in given.items()
    ]
    by_index = dict(zip(given, inputs, strict=True))
    outputs = [ir.Value(name=f"o{index}") for index in range(len(node.outputs))]
    attributes = list(node.attributes.values())
    read = [by_index.get(index) for index in range(1 + max(given))]
    alone = ir.Node("", node.op_type, read, attributes, outputs=outputs)
    graph = ir.Graph(inputs, outputs, nodes=[alone], opset_imports={"": 21}, name="one")
    run = ENGINES["onnxruntime"].compile(ir.Model(graph, ir_version=10), threads=1, optimize=False)
    results = run({value.name or "": array for value, array in zip(inputs, given.values(), strict=True)})
    return [results[str(value.name)] for value in outputs]


def positions(node: ir.Node, shapes: Mapping[int, tuple[int, ...]], constants: Mapping[int, np.ndarray]) -> list[Ints]:
    """For each output of a moving node, where each element comes from: positions count through all data inputs.

    shapes      of the data inputs, by index
    constants   the other inputs; of a Pad the filling is FILLED
    """
    given, begin = dict(constants), 0
    for index, shape in shapes.items():
        size = int(np.prod(shape))
        given[index] = np.arange(begin, begin + size, dtype=np.float32).reshape(shape)
        begin += size
    if begin > _LARGEST:
        raise UnsupportedError(f"'{node.name}' moves {begin:,} values; the integer program takes up to {_LARGEST:,}.")
    if node.op_type == "Pad":
        given[2] = np.full((), FILLED, np.float32)
    results = run_node(node, dict(sorted(given.items())))
    return [np.rint(result).astype(np.int64) for result in results]


def pieces_of(index: Ints, sizes: Sequence[int], name: str) -> tuple[Piece, ...]:
    """Loops that copy: target place i, counted through memory, gets what lies at index[i].

    index   in the target's shape in memory; positions count through all sources, one after the other
    sizes   of the sources
    """
    ends = np.cumsum([0, *sizes])
    pieces: list[Piece] = []
    flat = index.reshape(-1)
    for source, (first, last) in enumerate(itertools.pairwise(ends)):
        write = np.flatnonzero((flat >= first) & (flat < last))
        pairs = np.stack([flat[write] - first, write], 1)
        pieces += [_piece(source, *loops) for loops in _loops(pairs)]
    if len(pieces) > _MOST_PIECES:
        raise UnsupportedError(
            f"'{name}' moves values in {len(pieces)} blocks; the integer program copies {_MOST_PIECES} at most."
        )
    return tuple(pieces)


_Nest = tuple[tuple[int, ...], Ints, Ints]  # counts, (read, write) of the first element, steps (loops, 2)


def _piece(source: int, counts: tuple[int, ...], first: Ints, steps: Ints) -> Piece:
    read, write = (tuple(int(step) for step in steps[:, side]) for side in (0, 1))
    return Piece(source, counts, int(first[0]), read, int(first[1]), write)


def _loops(pairs: Ints) -> Iterator[_Nest]:
    """(n, 2) places to read and to write, as nests of loops; cut in two where they are no single nest."""
    if not len(pairs):
        return
    nest = _nest(pairs)
    if nest is not None:
        yield nest
        return
    step = np.diff(pairs, axis=0)
    breaks = np.flatnonzero(np.any(np.diff(step, axis=0), axis=1))
    jumps = np.abs(step[:, 0])
    cut = int(breaks[0]) + 2 if len(breaks) and len(pairs) < 4 else int(jumps.argmax()) + 1
    yield from _loops(pairs[:cut])
    yield from _loops(pairs[cut:])


def _nest(pairs: Ints) -> _Nest | None:
    count = len(pairs)
    if count == 1:
        return (1,), pairs[0], np.zeros((1, 2), np.int64)
    step = np.diff(pairs, axis=0)
    same = np.all(step == step[0], axis=1)
    length = count if same.all() else int(np.argmin(same)) + 1
    if length == count:
        return (count,), pairs[0], step[:1]
    if count % length:
        return None
    rows = pairs.reshape(-1, length, 2)
    if np.any(rows - rows[:, :1] != rows[:1] - rows[:1, :1]):
        return None
    outer = _nest(rows[:, 0])
    return None if outer is None else ((*outer[0], length), pairs[0], np.concatenate([outer[2], step[:1]]))
