"""Attention as exporters spell it out, found: softmax(Q·Kᵀ · scale + mask) · V, heads split and joined by moves.

Source: Vaswani et al. 2017 (arXiv 1706.03762), section 3.2.
"""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as ir

from lowbit.graph.links import made_by, only_reader
from lowbit.graph.weights import scalar


@dataclass(frozen=True)
class Attention:
    """Heads lie one behind the other in the last axis of queries, keys, values and of the result.

    queries, keys, values   (batch, positions, heads · size)
    mask                    what is added to the scores, up to (batch, heads, queries, keys); None: nothing
    product                 the MatMul with the values
    result                  the Reshape that joins the heads
    """

    queries: ir.Value
    keys: ir.Value
    values: ir.Value
    mask: ir.Value | None
    scale: float
    heads: int
    product: ir.Node
    result: ir.Node


def find_attention(result: ir.Node) -> Attention | None:
    """The attention whose heads this Reshape joins; None where there is none, or others read its scores."""
    heads = _heads(result.outputs[0], result.inputs[0]) if result.op_type == "Reshape" else 0
    if not heads:
        return None
    product, turned = _behind_transposes(result.inputs[0])
    softmax = _made_by(product.inputs[0], "Softmax") if product is not None and product.op_type == "MatMul" else None
    if product is None or softmax is None or turned != (0, 2, 1, 3) or only_reader(softmax.outputs[0]) is not product:
        return None
    scores, mask, scale = softmax.inputs[0], None, 1.0
    if (add := _made_by(scores, "Add")) is not None:
        first = _scaled_product(add.inputs[0])[0] is not None
        scores, mask = add.inputs if first else add.inputs[::-1]
    dots, scale = _scaled_product(scores)
    if dots is None or softmax.attributes.get_int("axis", -1) not in (-1, 3):
        return None
    parts = [
        _joined(value, perm, heads)
        for value, perm in (
            (dots.inputs[0], (0, 2, 1, 3)),
            (dots.inputs[1], (0, 2, 3, 1)),
            (product.inputs[1], (0, 2, 1, 3)),
        )
    ]
    queries, keys, values = parts
    if queries is None or keys is None or values is None:
        return None
    return Attention(queries, keys, values, mask, scale, heads, product, result)


def _made_by(value: ir.Value | None, *operators: str) -> ir.Node | None:
    """The node of one of these operators that makes the value for one reader alone."""
    return None if only_reader(value) is None else made_by(value, *operators)


def _scaled_product(value: ir.Value | None) -> tuple[ir.Node | None, float]:
    """(MatMul, factor) where the value is a product times a number."""
    scaling = _made_by(value, "Mul", "Div")
    if scaling is None:
        return _made_by(value, "MatMul"), 1.0
    number = scalar(scaling.inputs[1])
    if not number:
        return None, 1.0
    return _made_by(scaling.inputs[0], "MatMul"), number if scaling.op_type == "Mul" else 1 / number


def _behind_transposes(value: ir.Value | None) -> tuple[ir.Node | None, tuple[int, ...]]:
    """The node before all Transposes of a value of four axes, and the one permutation that these make."""
    perm: tuple[int, ...] = (0, 1, 2, 3)
    node = None if value is None else value.producer()
    while node is not None and node.op_type == "Transpose":
        own = tuple(node.attributes.get_ints("perm", ()))
        if len(own) != len(perm):
            return None, perm
        perm = tuple(own[axis] for axis in perm)
        node = None if node.inputs[0] is None else node.inputs[0].producer()
    return node, perm


def _joined(value: ir.Value | None, perm: tuple[int, ...], heads: int) -> ir.Value | None:
    """The (batch, positions, heads · size) that the value splits into heads and turns by `perm`."""
    reshape, turned = _behind_transposes(value)
    if reshape is None or reshape.op_type != "Reshape" or turned != perm:
        return None
    return reshape.inputs[0] if _heads(reshape.inputs[0], reshape.outputs[0]) == heads else None


def _heads(joined: ir.Value | None, split: ir.Value | None) -> int:
    """The number of heads where the shapes are (b, t, heads · size) and (b, t, heads, size); else 0."""
    shapes = [list(value.shape) for value in (joined, split) if value is not None and value.shape is not None]
    if [len(shape) for shape in shapes] != [3, 4]:
        return 0
    (*places, width), (*same, heads, size) = shapes
    named = all(isinstance(place, int) or place.value is not None for place in places)
    if not (isinstance(heads, int) and isinstance(size, int) and named):
        return 0
    return heads if places == same and width == heads * size else 0
