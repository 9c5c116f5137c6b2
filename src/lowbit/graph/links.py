"""Who makes and who reads a value, and nodes that take the place of others."""

from __future__ import annotations

import onnx_ir as ir


def made_by(value: ir.Value | None, *op_types: str) -> ir.Node | None:
    """The node that makes the value, where it is one of these operators."""
    node = None if value is None else value.producer()
    return node if node is not None and node.op_type in op_types else None


def only_reader(value: ir.Value | None) -> ir.Node | None:
    """The one node that reads the value, or None where there are more, none, or the value leaves the graph."""
    if value is None or value.is_graph_output():
        return None
    readers = value.consumers()
    return readers[0] if len(value.uses()) == 1 and len(readers) == 1 else None


def take_over(old: ir.Value, new: ir.Value, suffix: str) -> None:
    """Let `new` be what everyone knew as `old`: its name, type, readers and place among the outputs.

    suffix   of the name that `old` then has
    """
    name = old.name
    new.shape, new.type = old.shape, old.type
    old.replace_all_uses_with(new, replace_graph_outputs=True)
    old.name, new.name = f"{name}_{suffix}", name


def remove_node(node: ir.Node, *replacements: ir.Value) -> None:
    """Remove a node; a replacement for each output takes its name, its readers and its place among the outputs."""
    assert node.graph is not None
    for output, replacement in zip(node.outputs, replacements, strict=True):
        output.replace_all_uses_with(replacement, replace_graph_outputs=True)
    node.graph.remove(node, safe=True)
    for output, replacement in zip(node.outputs, replacements, strict=True):
        replacement.name = output.name or replacement.name
        replacement.shape = replacement.shape or output.shape
        replacement.type = replacement.type or output.type
