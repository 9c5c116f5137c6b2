"""Attention masks of −∞ made finite, and the guards against the NaN that they can cause removed. Approximate.

softmax over a row that is all −∞ is 0/0, so exporters put `where(isnan(p), 0, p)` behind every softmax. With the lowest
finite number in the mask's place no NaN arises, and all rows come out the same but those in which everything is masked:
they become the mean of the values instead of 0. A batch in which every sample has a token has no such row.
(MiniLM in int8, 128 tokens, onnxruntime, one thread: 15.9 ms with the guards, 11.4 without, on a busy machine.)
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from lowbit.graph.changed import Changed
from lowbit.graph.links import made_by, remove_node
from lowbit.graph.weights import constant, drop_unread, scalar, set_constant


def finite_masks(program: ir.Model) -> Changed:
    """Remove each Where(IsNaN(softmax), 0, softmax); the −∞ of the masks added before it become finite."""
    done: list[str] = []
    for graph in program.graphs():
        for node in [node for node in graph if node.op_type == "Where"]:
            softmax = _guarded(node)
            if softmax is None:
                continue
            masks = _masks(softmax.inputs[0])
            for mask in masks:
                _make_finite(mask)
            guard = node.inputs[0].producer()  # type: ignore[union-attr]
            remove_node(node, softmax.outputs[0])
            if guard is not None and not guard.outputs[0].uses():
                graph.remove(guard, safe=True)
            done.append(f"guard '{node.name}' against NaN after '{softmax.name}' removed")
    drop_unread(program)
    return Changed(tuple(done), exact=False)


def _guarded(node: ir.Node) -> ir.Node | None:
    """The Softmax where the node is Where(IsNaN(softmax), 0, softmax) and nobody else reads the softmax."""
    condition, zero, probabilities = node.inputs
    isnan, softmax = made_by(condition, "IsNaN"), made_by(probabilities, "Softmax")
    if isnan is None or softmax is None:
        return None
    if isnan.inputs[0] is not probabilities or scalar(zero) != 0 or condition is None:
        return None
    if len(probabilities.uses()) != 2 or len(condition.uses()) != 1 or softmax.inputs[0] is None:  # type: ignore[union-attr]
        return None
    return softmax


def _masks(scores: ir.Value | None, depth: int = 0) -> list[ir.Node]:
    """The Where nodes with an infinite constant that are added to the scores, or choose among them."""
    producer = None if scores is None else scores.producer()
    if producer is None or depth > 4:
        return []
    if producer.op_type == "Where":
        return [producer]
    if producer.op_type != "Add":
        return []
    return [mask for value in producer.inputs for mask in _masks(value, depth + 1)]


def _make_finite(mask: ir.Node) -> None:
    for index in (1, 2):
        array = constant(mask.inputs[index])
        if array is not None and array.dtype.kind == "f" and np.isneginf(array).any():
            finite = np.where(np.isneginf(array), np.finfo(array.dtype).min, array)
            set_constant(mask, index, finite, f"{mask.name}.finite")
