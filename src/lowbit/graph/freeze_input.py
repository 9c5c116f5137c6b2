"""An input, or a dimension of one, made a constant: what it decides is decided, dead branches are gone. Exact.

A network whose `If` chooses between sampling rates, for one, becomes a flat network for one of them, which can be
calibrated and quantized throughout.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx_ir as ir

from lowbit.errors import InputError, ShapeError
from lowbit.graph.changed import Changed
from lowbit.graph.fold import fold_constants, infer_shapes, name_uniquely
from lowbit.graph.weights import add_constant, constant, drop_unread


def freeze_input(program: ir.Model, name: str, value: object) -> Changed:
    """Replace the input `name` by a constant, fold, and put the taken branch of every decided If in its place.

    value   what the input always is; converted to the input's type
    InputError where there is no such input, ShapeError where the value does not fit it.
    """
    port = next((port for port in program.graph.inputs if port.name == name), None)
    if port is None:
        raise InputError(f"no input '{name}' to freeze; the inputs are {[p.name for p in program.graph.inputs]}.")
    array = np.asarray(value, dtype=None if port.dtype is None else port.dtype.numpy())
    if port.shape is not None and not _fits(array, port.shape):
        raise ShapeError(f"input '{name}' of shape {port.shape} cannot be frozen to the shape {list(array.shape)}.")
    program.graph.inputs.remove(port)
    port.name = f"{name}.input"
    port.replace_all_uses_with(add_constant(program.graph, name, array), replace_graph_outputs=True)
    return Changed((f"input '{name}' frozen to {np.array2string(array, threshold=8)}",)) + inline_decided_ifs(program)


def freeze_dimensions(program: ir.Model, sizes: Mapping[str, int]) -> Changed:
    """Give symbolic dimensions of the inputs a fixed size, fold what follows from it, and inline the decided Ifs.

    sizes   by the dimension's name: {"sequence": 576}
    InputError where no input has such a dimension.
    """
    known = {dim.value for port in program.graph.inputs for dim in port.shape or () if isinstance(dim, ir.SymbolicDim)}
    if unknown := [name for name in sizes if name not in known]:
        raise InputError(f"no input has a dimension '{unknown[0]}'; there are {sorted(map(str, known))}.")
    for port in program.graph.inputs:
        if port.shape is not None:
            port.shape = ir.Shape(
                [dim if isinstance(dim, int) else sizes.get(str(dim.value), dim) for dim in port.shape]
            )
    for node in program.graph.all_nodes():
        for value in node.outputs:  # what was inferred for any size is inferred again for this one
            if value.shape is not None and not value.shape.is_static() and not value.is_graph_output():
                value.shape = None
    infer_shapes(program)
    done = tuple(f"dimension '{name}' fixed to {size}" for name, size in sizes.items())
    return Changed(done) + inline_decided_ifs(program)


def inline_decided_ifs(program: ir.Model) -> Changed:
    """Fold, and replace every If of a constant condition by the branch that it takes, until none is left."""
    done: list[str] = []
    fold_constants(program)
    while node := next((node for graph in program.graphs() for node in graph if _decided(node) is not None), None):
        taken = _decided(node)
        done.append(f"If '{node.name}' is always {taken}: its branch inlined")
        _inline(program, node, node.attributes["then_branch" if taken else "else_branch"].as_graph())
        name_uniquely(program)
        fold_constants(program)
    infer_shapes(program)
    drop_unread(program)
    return Changed(tuple(done))


def _fits(array: np.ndarray, shape: ir.Shape) -> bool:
    if array.ndim != shape.rank():
        return False
    return all(not isinstance(want, int) or want == have for want, have in zip(shape, array.shape, strict=True))


def _decided(node: ir.Node) -> bool | None:
    if node.op_type != "If" or node.domain not in ("", "ai.onnx"):
        return None
    condition = constant(node.inputs[0])
    return None if condition is None else bool(condition.reshape(-1)[0])


def _inline(program: ir.Model, node: ir.Node, branch: ir.Graph) -> None:
    parent = node.graph
    assert isinstance(parent, ir.Graph)
    taken = ir.convenience.create_value_mapping(program.graph)
    for name, value in list(branch.initializers.items()):
        del branch.initializers[name]
        value.name = f"{node.name}.{name}" if name in taken or name in parent.initializers else name
        parent.register_initializer(value)
    results = list(branch.outputs)
    branch.outputs.clear()
    for inner in list(branch):
        branch.remove(inner)
        node.prepend(inner)
    for output, result in zip(node.outputs, results, strict=True):
        same = ir.node("Identity", [result], name=f"{node.name}_{output.name}")
        node.prepend(same)
        passed, name = same.outputs[0], str(output.name)
        passed.shape, passed.type = output.shape or result.shape, output.type or result.type
        output.replace_all_uses_with(passed, replace_graph_outputs=True)
        output.name, passed.name = f"{name}_decided", name
    parent.remove(node, safe=True)
