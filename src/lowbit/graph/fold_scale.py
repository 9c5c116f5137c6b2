"""A multiplication by one number, folded into the linear layer before it. Exact but for float rounding.

Attention scales queries and keys; the projection that makes them can do it for nothing, and the product of two scaled
tensors is then fed by the projections directly, which engines quantize.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from lowbit.graph.changed import Changed
from lowbit.graph.layer import Layer, linear_before
from lowbit.graph.links import only_reader, remove_node
from lowbit.graph.weights import constant, drop_unread, scalar

MOVES = frozenset({"Reshape", "Transpose", "Squeeze", "Unsqueeze", "Flatten", "Identity"})


def fold_scales(program: ir.Model) -> Changed:
    """Fold each Mul or Div by a number into the layer before it, through operators that only move elements."""
    done: list[str] = []
    for graph in program.graphs():
        for node in list(graph):
            factor, x = _factor(node)
            layer = source_layer(x, node)
            if factor is None or x is None or layer is None:
                continue
            layer.scale_outputs(np.full(layer.outputs, factor))
            remove_node(node, x)
            done.append(f"{node.op_type} '{node.name}' by {factor:.6g} folded into '{layer.node.name}'")
    drop_unread(program)
    return Changed(tuple(done))


def _factor(node: ir.Node) -> tuple[float | None, ir.Value | None]:
    if node.op_type not in ("Mul", "Div") or len(node.inputs) != 2:
        return None, None
    a, b = node.inputs
    number = scalar(b)
    if number is not None and not _widens(b, a):
        return (number if node.op_type == "Mul" else 1 / number if number else None), a
    if node.op_type == "Mul" and scalar(a) is not None and not _widens(a, b):
        return scalar(a), b
    return None, None


def _widens(number: ir.Value | None, x: ir.Value | None) -> bool:
    """Whether the constant's own dimensions of size one would add dimensions to x."""
    array = constant(number)
    rank = None if x is None or x.shape is None else x.shape.rank()
    return array is None or (array.ndim > 0 and (rank is None or array.ndim > rank))


def source_layer(x: ir.Value | None, reader: ir.Node) -> Layer | None:
    """The layer whose output x is, its elements moved but not computed on, read by nobody else."""
    while x is not None and only_reader(x) is reader:
        producer = x.producer()
        if producer is None or producer.op_type not in MOVES:
            return linear_before(x)
        reader, x = producer, producer.inputs[0]
    return None
