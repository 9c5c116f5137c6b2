"""Operators through which a positive scale per channel passes unchanged: f(s·x) = s·f(x), channel by channel."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from lowbit.graph.weights import constant, scalar

ELEMENTWISE = frozenset({"Relu", "LeakyRelu", "PRelu", "Abs", "Identity"})
POOLS = frozenset({"MaxPool", "AveragePool", "GlobalAveragePool", "GlobalMaxPool", "LpPool", "GlobalLpPool"})
REDUCTIONS = frozenset({"ReduceMean", "ReduceMax", "ReduceMin", "ReduceSum"})
RESHAPES = frozenset({"Flatten", "Reshape", "Squeeze", "Unsqueeze"})


def passes_scale(node: ir.Node | None, axis: int) -> bool:
    """Whether a positive scale along `axis` of the node's first input comes out along the same axis of its output."""
    if node is None or node.domain not in ("", "ai.onnx") or not node.inputs or len(node.outputs) != 1:
        return False
    op = node.op_type
    if op in ELEMENTWISE or relu_ceiling(node) == float("inf"):
        return op != "PRelu" or constant(node.inputs[1]) is not None
    if op in POOLS:
        return axis == 1
    if op in REDUCTIONS:
        return axis == 1 and _reduces_beyond_channels(node)
    if op == "Pad":
        fill = node.inputs[2] if len(node.inputs) > 2 else None
        return axis == 1 and _mode(node) == "constant" and (fill is None or scalar(fill) == 0)
    return op in RESHAPES and axis == 1 and _only_drops_ones(node)


def _reduces_beyond_channels(node: ir.Node) -> bool:
    axes = constant(node.inputs[1]) if len(node.inputs) > 1 else None
    shape = node.inputs[0].shape  # type: ignore[union-attr]
    if axes is None or shape is None:
        return False
    return bool(np.all(axes % shape.rank() >= 2))


def _mode(node: ir.Node) -> str:
    attr = node.attributes.get("mode")
    return "constant" if attr is None else attr.as_string()


def _only_drops_ones(node: ir.Node) -> bool:
    """(N, C, 1, 1) ↔ (N, C) and the like: the first two axes stay, all others are of size one."""
    before, after = node.inputs[0], node.outputs[0]
    if before is None or before.shape is None or after.shape is None:
        return False
    a, b = list(before.shape), list(after.shape)
    if len(a) < 2 or len(b) < 2 or not isinstance(a[1], int) or a[1] != b[1]:
        return False
    return all(size == 1 for size in (*a[2:], *b[2:]))


def relu_ceiling(node: ir.Node | None) -> float | None:
    """c where the node is min(max(x, 0), c): 6 for ReLU6, infinity for Relu; None where it is neither."""
    low, high = clip_bounds(node) or (None, None)
    return high if low == 0 else None


def clip_bounds(node: ir.Node | None) -> tuple[float, float] | None:
    """(lowest, highest) value that a Relu or Clip lets through; None for other nodes, and where a bound is computed."""
    if node is None or node.domain not in ("", "ai.onnx") or node.op_type not in ("Relu", "Clip"):
        return None
    if node.op_type == "Relu":
        return 0.0, float("inf")
    ends = zip([*node.inputs[1:], None, None], (float("-inf"), float("inf")), strict=False)
    low, high = (default if value is None else scalar(value) for value, default in ends)
    return None if low is None or high is None else (low, high)
