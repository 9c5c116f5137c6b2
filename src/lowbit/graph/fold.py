"""What a graph says twice, said once: constants computed, shapes inferred, dead nodes removed. Exact.

The folding itself is onnxscript's; the limits are ours. A constant is only computed where its size is known before
and small, so that a folded file never grows much and a hostile one allocates nothing.
"""

from __future__ import annotations

import contextlib
import logging
import math
import threading
from collections.abc import Mapping

import numpy as np
import onnx_ir as ir
from onnx_ir.passes import common
from onnxscript import optimizer

# Larger inputs are weights: folding what an operator makes of them would store the weight a second time.
LARGEST_INPUT = 1 << 16
LARGEST_OUTPUT = 1 << 16
LARGEST_FILL = 1 << 10  # a ConstantOfShape says in a few bytes what the constant would take many for

# What is folded is cheap, whatever its attributes say; a hostile Conv of constants could take hours. DequantizeLinear
# is not among it: a weight stays what the file says it is, codes and scales, never the floats they stand for.
# fmt: off
_ARITHMETIC = frozenset({
    "Abs", "Add", "And", "BitwiseAnd", "BitwiseNot", "BitwiseOr", "Cast", "CastLike", "Ceil", "Clip", "Cos", "CumSum",
    "Div", "Equal", "Erf", "Exp", "Floor", "Greater", "GreaterOrEqual", "IsInf", "IsNaN", "Less", "LessOrEqual", "Log",
    "Max", "Min", "Mod", "Mul", "Neg", "Not", "Or", "Pow", "Reciprocal", "Relu", "Round", "Sigmoid", "Sign", "Sin",
    "Sqrt", "Sub", "Tanh", "Where", "Xor", "MatMul", "Gemm", "ArgMax", "ArgMin", "ReduceL1", "ReduceL2", "ReduceMax",
    "ReduceMean", "ReduceMin", "ReduceProd", "ReduceSum", "ReduceSumSquare",
})
_MOVES = frozenset({
    "Concat", "Expand", "Flatten", "Gather", "Range", "Reshape", "Shape", "Size", "Slice", "Split", "Squeeze", "Tile",
    "Transpose", "Trilu", "Unsqueeze",
})
# fmt: on
# What only brings a weight into another order: torch exports the gates of a bidirectional LSTM so.
_REORDERS = frozenset({"Concat", "Reshape", "Slice", "Split", "Squeeze", "Transpose", "Unsqueeze"})
_BORN_OF_CODES = frozenset({"Cast", "Gather", "DequantizeLinear"})


def fold_constants(program: ir.Model) -> bool:
    """Compute what does not depend on the inputs, drop what nobody reads. Exact; in place; returns whether it changed.

    Values keep their names. An If that a constant decides becomes the branch that is taken; other branches, and the
    bodies of loops, are folded inside.
    """
    before = _fingerprint(program)
    outputs = [value.name for value in program.graph.outputs]
    origins = _origins(program)
    # A reordered weight may be as large as all of them; what else is folded has its limit in `_worth_folding`.
    weights = sum(_size(value) or 0 for value in program.graph.initializers.values())
    with quiet():
        for _ in range(2):
            # onnxscript fails on some sequences. It does so before it changes the node: the rest then stays as it is.
            with contextlib.suppress(RuntimeError), np.errstate(all="ignore"):
                result = optimizer.fold_constants(
                    program,
                    onnx_shape_inference=True,
                    input_size_limit=LARGEST_INPUT,
                    output_size_limit=max(LARGEST_OUTPUT, weights),
                    should_fold=_worth_folding,
                )
                if not result.modified:
                    break
        _lift_constants(program)
        common.RemoveUnusedNodesPass()(program)
    for value, name in zip(program.graph.outputs, outputs, strict=True):
        value.name = name
    _keep_names(program, origins)
    for graph in program.graphs():
        for node in graph:
            node.metadata_props.pop(optimizer.FOLDED_FROM_KEY, None)
    name_uniquely(program)
    return _fingerprint(program) != before


def infer_shapes(program: ir.Model) -> None:
    """Infer the types and shapes of all values, as far as the operators tell; never fails."""
    with quiet():
        common.ShapeInferencePass(check_type=False, strict_mode=False, data_prop=True)(program)


def name_uniquely(program: ir.Model) -> None:
    """Give every node and value a name of its own; names that are already unique stay."""
    with quiet():
        common.NameFixPass()(program)


class quiet:  # noqa: N801  used like a function
    """The logging of onnx_ir and onnxscript held back: what matters is raised as an error by us.

    Logging is one for the whole process: of several threads inside, the first turns it off and the last one on again.
    """

    _lock = threading.Lock()
    _inside = 0
    _before = 0

    def __enter__(self) -> None:
        with quiet._lock:
            if quiet._inside == 0:
                quiet._before = logging.root.manager.disable
                logging.disable(max(logging.ERROR, quiet._before))
            quiet._inside += 1

    def __exit__(self, *_: object) -> None:
        with quiet._lock:
            quiet._inside -= 1
            if quiet._inside == 0:
                logging.disable(quiet._before)


def _fingerprint(program: ir.Model) -> tuple[int, int, tuple[str | None, ...]]:
    nodes = [node.name for graph in program.graphs() for node in graph]
    return len(nodes), len(program.graph.initializers), tuple(nodes)


def _worth_folding(node: ir.Node) -> bool | None:
    """False to leave a node alone, None to let onnxscript's own size limits decide."""
    if node.op_type == "ConstantOfShape":
        size = _size(node.outputs[0])
        return size is not None and size <= LARGEST_FILL
    if node.op_type == "If":
        return None  # onnxscript puts the branch in the place of an If that a constant decides
    if node.op_type not in _ARITHMETIC | _MOVES or _decodes_a_weight(node):
        return False
    if _reorders_weights(node):
        return True
    if node.op_type == "Transpose":
        return None  # as large as its input, which nobody else may be reading: onnxscript looks
    sizes = [_size(output) for output in node.outputs]
    return None if all(size is not None and size <= LARGEST_OUTPUT for size in sizes) else False


def _reorders_weights(node: ir.Node) -> bool:
    """Part of a chain that moves whole weights and after which nobody reads them as they were: no byte is added."""
    data = node.inputs if node.op_type == "Concat" else node.inputs[:1]
    if node.op_type not in _REORDERS or not all(v is not None and _is_float_constant(v) for v in data):
        return False
    return all(v is not None and _moved_whole(v) for v in data)


def _moved_whole(weight: ir.Value) -> bool:
    """Whether all readers of a weight only move it, and what they make of it is together no larger."""
    readers = [use.node for use in weight.uses()]
    if weight.is_graph_output() or not all(reader.op_type in _REORDERS for reader in readers):
        return False
    size = _size(weight) or 0
    made = [
        [size] if reader.op_type == "Concat" else [_size(output) for output in reader.outputs] for reader in readers
    ]
    sizes = [part for parts in made for part in parts]
    return all(part is not None for part in sizes) and sum(part or 0 for part in sizes) <= size


def _is_float_constant(value: ir.Value) -> bool:
    return value.const_value is not None and value.const_value.dtype.is_floating_point()


def _origins(program: ir.Model) -> dict[str, str]:
    """Value → the weight that it is a reordered form of (the first of several), for values made by moves alone."""
    found: dict[str, str] = {}
    for node in program.graph:
        source = node.inputs[0] if node.op_type in _REORDERS else None
        if source is not None and (source.name in found or _is_float_constant(source)):
            found |= {str(output.name): found.get(str(source.name), str(source.name)) for output in node.outputs}
    return found


def _keep_names(program: ir.Model, origins: Mapping[str, str]) -> None:
    """A reordered weight goes by the name of what it was made of, where that is gone: rules and ledgers say it."""
    constants = program.graph.initializers
    for name in [n for n in constants if n in origins]:
        if origins[str(name)] not in constants:
            value = constants.pop(name)
            value.name = origins[str(name)]
            program.graph.register_initializer(value)


def _decodes_a_weight(node: ir.Node) -> bool:
    """Part of the chain that turns stored codes into a weight: codes → Cast → Gather from a table."""
    first = node.inputs[0] if node.inputs else None
    if node.op_type not in _BORN_OF_CODES or first is None or first.const_value is None:
        return False
    dtype = first.const_value.dtype
    return dtype != ir.DataType.STRING and dtype.bitwidth < 8


def _size(value: ir.Value) -> int | None:
    if value.shape is None or not value.shape.is_static():
        return None
    return math.prod(value.shape.numpy())


def _lift_constants(program: ir.Model) -> None:
    common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(program)
