"""MatMul + Add of a constant bias on a matrix, said as one Gemm that has a bias of its own. Exact.

Engines quantize a Gemm's bias with it; after a MatMul the addition would be an operator of its own. They want one
number for each output, at the scale of this layer: a scalar is spread, and a bias that several Gemms share is copied.
"""

from __future__ import annotations

import onnx_ir as ir

from lowbit.graph.changed import Changed
from lowbit.graph.layer import linear_layer
from lowbit.graph.links import remove_node
from lowbit.graph.weights import drop_unread, set_constant


def fuse_gemm(program: ir.Model) -> Changed:
    """Make each MatMul of a matrix by a constant weight, with the Add of its bias, a Gemm."""
    done: list[str] = []
    for graph in program.graphs():
        for node in list(graph):
            layer = linear_layer(node) if node.op_type == "MatMul" else None
            x = node.inputs[0] if node.inputs else None
            if layer is None or layer.add is None or x is None or x.shape is None or x.shape.rank() != 2:
                continue
            bias = layer.bias_value
            if bias is None or bias.shape is None or bias.shape.rank() > 2:
                continue
            node.op_type = "Gemm"
            node.resize_inputs(3)
            node.replace_input_with(2, bias)
            remove_node(layer.add, node.outputs[0])
            done.append(f"MatMul and Add '{node.name}' fused into a Gemm")
        done += [f"Gemm '{node.name}' got a bias of its own" for node in graph if _own_bias(node)]
    drop_unread(program)
    return Changed(tuple(done))


def _own_bias(node: ir.Node) -> bool:
    """Make a Gemm's bias (outputs,) and its own, where it is a constant that is not; whether that changed it."""
    layer = linear_layer(node) if node.op_type == "Gemm" else None
    if layer is None or layer.has_own_bias or layer.bias_value is None:
        return False
    set_constant(node, 2, layer.bias / layer.beta, f"{layer.bias_value.name}.{node.name}")
    return True
