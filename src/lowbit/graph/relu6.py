"""ReLU6 whose ceiling never binds is a ReLU. Exact on the data that the maxima were seen on, not beyond it.

A Relu after a layer costs nothing: the unsigned quantizer behind it clips at zero anyway.
"""

from __future__ import annotations

from collections.abc import Mapping

import onnx_ir as ir

from lowbit.graph.changed import Changed
from lowbit.graph.weights import drop_unread, scalar


def relax_relu6(program: ir.Model, maxima: Mapping[str, float]) -> Changed:
    """Turn Clip(0, c) into Relu where the largest value that reaches it is at most c.

    maxima   largest value seen, by the name of the Clip's input (or, equal where nothing is cut, of its output)
    """
    done: list[str] = []
    kept: list[str] = []
    for graph in program.graphs():
        for node in graph:
            ceiling = relu_ceiling(node)
            if ceiling is None or ceiling == float("inf"):
                continue
            reached = maxima.get(str(node.inputs[0].name))  # type: ignore[union-attr]
            if reached is None:
                kept.append(f"Clip '{node.name}' kept: no maximum was observed for '{node.inputs[0].name}'")  # type: ignore[union-attr]
            elif reached > ceiling:
                kept.append(f"Clip '{node.name}' kept: its input reaches {reached:.4g}, above the ceiling {ceiling:g}")
            else:
                to_relu(node)
                done.append(
                    f"Clip '{node.name}' made a Relu: its input reaches {reached:.4g}, its ceiling is {ceiling:g}"
                )
    drop_unread(program)
    return Changed(tuple(done), tuple(kept), exact=False)


def relu_ceiling(node: ir.Node | None) -> float | None:
    """c where the node is min(max(x, 0), c): 6 for ReLU6, infinity for Relu; None where it is neither."""
    if node is None or node.domain not in ("", "ai.onnx"):
        return None
    if node.op_type == "Relu":
        return float("inf")
    if node.op_type != "Clip" or len(node.inputs) < 2 or scalar(node.inputs[1]) != 0:
        return None
    if len(node.inputs) < 3 or node.inputs[2] is None:
        return float("inf")
    return scalar(node.inputs[2])


def to_relu(node: ir.Node) -> None:
    """Make a Clip a Relu; its name and its output stay."""
    node.op_type = "Relu"
    node.resize_inputs(1)
