"""What a graph computes twice, computed once. Exact.

Exporters write the attention mask of every layer out again. Merged nodes keep the first one's name.
"""

from __future__ import annotations

from collections.abc import Hashable

import onnx_ir as ir

from lowbit.graph.changed import Changed
from lowbit.graph.weights import drop_unread

_RANDOM = frozenset(
    {"RandomNormal", "RandomUniform", "RandomNormalLike", "RandomUniformLike", "Multinomial", "Bernoulli"}
)
SMALL_BYTES = 64  # constants up to this size are compared by what they hold, larger ones by being the same tensor


def merge_repeats(program: ir.Model) -> Changed:
    """Let nodes of the same operator, attributes and inputs be one node, in each graph on its own."""
    done: list[str] = []
    for graph in program.graphs():
        seen: dict[Hashable, ir.Node] = {}
        for node in list(graph):
            key = _key(node)
            if key is None or any(output.is_graph_output() for output in node.outputs):
                continue
            first = seen.setdefault(key, node)
            if first is node:
                continue
            for old, same in zip(node.outputs, first.outputs, strict=True):
                old.replace_all_uses_with(same)
            graph.remove(node, safe=True)
            done.append(f"{node.op_type} '{node.name}' is '{first.name}' again")
    drop_unread(program)
    return Changed(tuple(done))


def _key(node: ir.Node) -> Hashable | None:
    """Equal for nodes that compute the same; None for those that must stay apart."""
    graphs = (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS, ir.AttributeType.TENSOR, ir.AttributeType.TENSORS)
    if node.op_type in _RANDOM or any(attr.type in graphs for attr in node.attributes.values()):
        return None
    attributes = tuple(sorted((name, repr(attr.value)) for name, attr in node.attributes.items()))
    return node.op_identifier(), attributes, tuple(map(_operand, node.inputs)), len(node.outputs)


def _operand(value: ir.Value | None) -> Hashable:
    tensor = None if value is None or not value.is_initializer() else value.const_value
    if tensor is not None and tensor.dtype != ir.DataType.STRING and tensor.nbytes <= SMALL_BYTES:
        return tensor.dtype, tuple(tensor.shape.numpy()), tensor.tobytes()
    return id(value)
