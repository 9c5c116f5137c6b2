"""Attention in one operator, ONNX's Attention-23, where the installed onnxruntime has it. Exact but for float rounding.

One attention of MiniLM with its projections, 128 tokens, one thread: 0.342 ms in onnxruntime 1.31, and 0.395 with the
operators that it replaces (`python -m benchmarks.attention`). Nothing is transposed; the mask costs no pass of its own.
"""

from collections.abc import Collection

import numpy as np
import onnx_ir as ir
from onnx_ir.passes import common

from lowbit.engines.compile import ENGINES, unsupported
from lowbit.graph.attention import Attention, find_attention
from lowbit.graph.links import remove_node
from lowbit.graph.weights import add_constant

OPSET = 23  # the first with Attention


def fuse_attention(program: ir.Model, integer: Collection[str] = ()) -> None:
    """Write each attention whose products are in float as one operator, in place."""
    found = [attention for node in program.graph if (attention := find_attention(node)) is not None]
    before = program.graph.opset_imports.get("", OPSET)
    if not found:
        return
    if before < OPSET:
        # Opsets 22 and 23 only add types to what was there; whether it has kernels of them is for onnxruntime to say.
        program.graph.opset_imports[""] = OPSET
        if unsupported(ENGINES["onnxruntime"], program):
            program.graph.opset_imports[""] = before
            return
    masks: dict[ir.Value, ir.Value] = {}
    for attention in found:
        _fuse(program.graph, attention, masks)
    common.RemoveUnusedNodesPass()(program)


def _fuse(graph: ir.Graph, found: Attention, masks: dict[ir.Value, ir.Value]) -> None:
    mask = None if found.mask is None else _whole_mask(graph, found, found.mask, masks)
    inputs = [found.queries, found.keys, found.values, *([] if mask is None else [mask])]
    attributes = {"q_num_heads": found.heads, "kv_num_heads": found.heads, "scale": found.scale}
    node = ir.node("Attention", inputs, attributes, name=found.product.name)
    graph.insert_before(found.result, node)
    remove_node(found.result, node.outputs[0])


def _whole_mask(graph: ir.Graph, found: Attention, mask: ir.Value, known: dict[ir.Value, ir.Value]) -> ir.Value:
    """The mask with a number for each pair of query and key: Attention takes no axis of one for many there.

    Attentions of as many queries as keys have the same of both where they share a mask: they share what is made of it.
    """
    lengths = [value.shape[1] for value in (found.queries, found.keys)]  # type: ignore[index]
    if mask.shape is not None and len(mask.shape) == 4 and list(mask.shape)[2:] == lengths:
        return mask
    shared = lengths[0] == lengths[1] and mask.const_value is None and mask.shape is not None and mask.shape[-1] != 1
    if shared and mask in known:
        return known[mask]
    ones = add_constant(graph, "lowbit_ones", np.ones(2, np.int64))
    sizes = [ir.node("Shape", [value], {"start": 1, "end": 2}) for value in (found.queries, found.keys)]
    shape = ir.node("Concat", [ones, *(size.outputs[0] for size in sizes)], {"axis": 0})
    whole = ir.node("Expand", [mask, shape.outputs[0]])
    nodes = [*sizes, shape, whole]
    graph.insert_before(found.result, nodes)
    for number, node in enumerate(nodes):
        node.outputs[0].name = f"{found.product.name}_mask_{number}"
    whole.outputs[0].type = mask.type
    if shared:
        known[mask] = whole.outputs[0]
    return whole.outputs[0]
