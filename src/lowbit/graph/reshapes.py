"""Reshapes said by their result, and transposes said once. Exact: no number is computed, only moved.

Exporters compute the target of a Reshape from Shape, Gather and Concat wherever a dimension is free, ten small
operators for each attention. Where shape inference knows the result, a constant says it: 0 keeps a free dimension, one
-1 takes what is left.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
from onnx_ir.passes import common

from lowbit.graph.changed import Changed
from lowbit.graph.links import made_by, only_reader, remove_node
from lowbit.graph.weights import add_constant, constant

Dim = int | str | None


def simplify_reshapes(program: ir.Model) -> Changed:
    """Give every Reshape of a known result a constant target, then merge what is one Transpose."""
    done: list[str] = []
    for node in [node for graph in program.graphs() for node in graph if node.op_type == "Reshape"]:
        target = _target(node)
        if target is None:
            continue
        node.attributes.pop("allowzero", None)
        assert isinstance(node.graph, ir.Graph)
        shape = add_constant(node.graph, f"{node.outputs[0].name}_shape", np.array(target, dtype=np.int64))
        node.replace_input_with(1, shape)
        done.append(f"Reshape '{node.name}' to the constant {target}")
    for graph in program.graphs():
        for node in [node for node in graph if node.op_type == "Transpose"]:
            if node.graph is not None and (_unwrap(node) or _merge(node)):
                done.append(f"Transpose '{node.name}' merged with what is around it")
    common.RemoveUnusedNodesPass()(program)
    return Changed(tuple(done))


def dims(value: ir.Value | None) -> list[Dim] | None:
    """The dimensions of a value: numbers, names, or None where not even a name is known; None without a rank."""
    if value is None or value.shape is None:
        return None
    return [dim if isinstance(dim, int) else dim.value for dim in value.shape]


def _target(node: ir.Node) -> list[int] | None:
    """What to reshape to, as a constant; None where it is one already or more than one dimension stays open."""
    before, after = dims(node.inputs[0]), dims(node.outputs[0])
    if constant(node.inputs[1]) is not None or before is None or after is None or 0 in after or 0 in before:
        return None
    if node.outputs[0].is_graph_output():
        return None  # its shape is what the file declares, not what was inferred
    target: list[int] = []
    for axis, size in enumerate(after):
        if isinstance(size, int):
            target.append(size)
        elif size is not None and axis < len(before) and before[axis] == size:
            target.append(0)
        else:
            target.append(-1)
    return target if target.count(-1) <= 1 else None


def _unwrap(node: ir.Node) -> bool:
    """Reshape to (…, c, d), Transpose of the last two, Reshape back: one Transpose of the whole."""
    if _perm(node) != [0, 2, 1] or node.inputs[0] is None:
        return False
    flat, back = node.inputs[0].producer(), only_reader(node.outputs[0])
    if flat is None or back is None or flat.op_type != "Reshape" or back.op_type != "Reshape":
        return False
    whole, rows, result = flat.inputs[0], dims(node.inputs[0]), dims(back.outputs[0])
    before = dims(whole)
    if whole is None or before is None or rows is None or result is None or len(before) < 3 or None in before:
        return False
    if before[-2:] != rows[-2:] or not _equal(result, [*before[:-2], before[-1], before[-2]]):
        return False
    rank = len(before)
    node.attributes["perm"] = ir.AttrInt64s("perm", [*range(rank - 2), rank - 1, rank - 2])
    node.replace_input_with(0, whole)
    node.outputs[0].shape = None
    remove_node(back, node.outputs[0])
    _merge(node)
    return True


def _equal(found: list[Dim], wanted: list[Dim]) -> bool:
    """Whether the dimensions are the same; one may be open, since the number of elements is the same."""
    if len(found) != len(wanted):
        return False
    different = [have for have, want in zip(found, wanted, strict=True) if have != want]
    return not different or (len(different) == 1 and not isinstance(different[0], int))


def _merge(node: ir.Node) -> bool:
    """A Transpose of a Transpose is one Transpose."""
    first = made_by(node.inputs[0], "Transpose")
    inner, outer = _perm(first), _perm(node)
    if first is None or inner is None or outer is None or len(inner) != len(outer):
        return False
    node.attributes["perm"] = ir.AttrInt64s("perm", [inner[axis] for axis in outer])
    node.replace_input_with(0, first.inputs[0])
    return True


def _perm(node: ir.Node | None) -> list[int] | None:
    perm = node.attributes.get("perm") if node is not None and node.op_type == "Transpose" else None
    return None if perm is None else list(perm.as_ints())
