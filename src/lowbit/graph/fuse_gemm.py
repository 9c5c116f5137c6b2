"""MatMul + Add of a constant bias on a matrix, said as one Gemm. Exact.

Engines quantize a Gemm's bias with it; after a MatMul the addition would be an operator of its own.
"""

from __future__ import annotations

import onnx_ir as ir

from lowbit.graph.changed import Changed
from lowbit.graph.linear import linear_layer
from lowbit.graph.weights import constant, remove_node


def fuse_gemm(program: ir.Model) -> Changed:
    """Make each MatMul of a matrix by a constant weight, with the Add of its bias, a Gemm."""
    done: list[str] = []
    for graph in program.graphs():
        for node in list(graph):
            layer = linear_layer(node) if node.op_type == "MatMul" else None
            x = node.inputs[0] if node.inputs else None
            if layer is None or layer.bias_node is None or x is None or x.shape is None or x.shape.rank() != 2:
                continue
            bias = next(value for value in layer.bias_node.inputs if constant(value) is not None)
            array = constant(bias)
            if array is None or array.ndim > 2:
                continue
            node.op_type = "Gemm"
            node.resize_inputs(3)
            node.replace_input_with(2, bias)
            remove_node(layer.bias_node, node.outputs[0])
            done.append(f"MatMul and Add '{node.name}' fused into a Gemm")
    return Changed(tuple(done))
