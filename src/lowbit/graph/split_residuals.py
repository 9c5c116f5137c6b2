"""What a residual and layers both read gets a copy for the layers, so that the two can have other formats. Exact.

The literature on few bits rounds what layers read and leaves the sum of the residual as it is. A copy is a Clip without
bounds: a value of its own, with a quantizer of its own, which is gone from the file.
"""

from __future__ import annotations

import onnx_ir as ir

from lowbit.graph.changed import Changed
from lowbit.graph.layer import MULTIPLYING, adds_residual
from lowbit.graph.weights import float_constant

_STEPS = 4  # nodes without weights that may lie between a value and the Add


def split_residuals(program: ir.Model) -> Changed:
    """Let layers read a copy of each value that a residual Add reads as well."""
    done: list[str] = []
    for node in list(program.graph):
        for value in node.outputs:
            layers = [u for u in value.uses() if u.node.op_type in MULTIPLYING and u.idx == 0]
            if not layers or value.is_graph_output() or not _reaches_residual(value, _STEPS):
                continue
            copy = ir.Node("", "Clip", [value], name=f"{value.name}_copied")
            made = copy.outputs[0]
            made.name, made.type, made.shape = f"{value.name}_copy", value.type, value.shape
            program.graph.insert_after(node, copy)
            for use in layers:
                use.node.replace_input_with(use.idx, made)
            done.append(f"layers read a copy of '{value.name}', which a residual reads too")
    return Changed(tuple(done))


def _reaches_residual(value: ir.Value, steps: int) -> bool:
    """Whether a residual Add reads a value, straight or behind a few nodes that have it alone for data."""
    for use in value.uses():
        if adds_residual(use.node):
            return True
        data = [v for v in use.node.inputs if v is not None and float_constant(v) is None and v.const_value is None]
        passes = use.node.op_type not in MULTIPLYING and data == [value]
        if steps and passes and any(_reaches_residual(v, steps - 1) for v in use.node.outputs):
            return True
    return False
