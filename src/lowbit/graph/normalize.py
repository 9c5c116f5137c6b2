"""What a product reads, divided by a number for each channel or row, and multiplied back behind. Exact.

    X·W = m · ((X / s / m)·(s·W))     s one number a channel, m = max |X / s| of each row (position of the last axis)

An integer kernel that measures one range for the whole of X then has a scale for each channel, or each row. Sources:
Xiao et al. 2022 (SmoothQuant, arXiv 2211.10438), eq. 3; Yao et al. 2022 (ZeroQuant, arXiv 2206.01861), section 4.1.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from lowbit.graph.attention import find_attention
from lowbit.graph.fold_scale import source_layer
from lowbit.graph.layer import Layer
from lowbit.graph.links import only_reader, take_over
from lowbit.graph.weights import add_constant, constant, float_constant, set_constant

SMALLEST = float(np.finfo(np.float32).tiny)  # rows of zeros stay zeros


def normalize(
    graph: ir.Graph, value: ir.Value, layers: Sequence[Layer], channels: np.ndarray | None, rows: bool
) -> None:
    """Let these layers read the value divided by `channels` (inputs,), and by the largest number of each row."""
    place = min((layer.node for layer in layers), key=list(graph).index)
    read = value
    if channels is not None:
        inverse = (1 / channels).astype(np.float32)
        if (lookup := _looked_up(value, layers)) is not None:
            set_constant(lookup, 0, np.asarray(constant(lookup.inputs[0])) * inverse, f"{value.name}_table")
        elif (mixed := _values_mixed(value, layers)) is not None:
            mixed.scale_outputs(inverse)
        else:
            factor = add_constant(graph, f"{value.name}_channels", inverse)
            read = _add(graph, place, "Mul", [value, factor], f"{value.name}_smooth", value.shape)
        for layer in layers:
            along = channels.reshape([-1 if axis == layer.summed_axis else 1 for axis in range(layer.weight.ndim)])
            set_constant(layer.node, layer.index, layer.weight * along, f"{layer.value.name}.{layer.node.name}")
    if rows:
        # Not −1: of a tensor without elements onnxruntime then keeps the axis at its length.
        axis = add_constant(graph, "last_axis", np.array([value.shape.rank() - 1]))  # type: ignore[union-attr]
        smallest = add_constant(graph, "smallest", np.array(SMALLEST, np.float32))
        size = _add(graph, place, "Abs", [read], f"{value.name}_size", value.shape)
        largest = _add(graph, place, "ReduceMax", [size, axis], f"{value.name}_largest", None)
        factor = _add(graph, place, "Max", [largest, smallest], f"{value.name}_factor", None)
        read = _add(graph, place, "Div", [read, factor], f"{value.name}_rows", value.shape)
    for node in {layer.node for layer in layers}:
        node.replace_input_with(0, read)
        if rows:
            _multiply_back(graph, node, factor)


def _looked_up(value: ir.Value, layers: Sequence[Layer]) -> ir.Node | None:
    """The Gather of a table's rows that only these layers read: the table takes the factors, and no Mul is needed."""
    node = _made_for(value, layers)
    while node is not None and node.op_type == "Transpose":
        perm, source = node.attributes.get_ints("perm", ()), node.inputs[0]
        if not perm or perm[-1] != len(perm) - 1 or source is None or only_reader(source) is not node:
            return None
        node = source.producer()
    if node is None or node.op_type != "Gather" or node.attributes.get_int("axis", 0) != 0:
        return None
    rows = float_constant(node.inputs[0])
    return node if rows is not None and rows.ndim == 2 and only_reader(node.inputs[0]) is node else None


def _values_mixed(value: ir.Value, layers: Sequence[Layer]) -> Layer | None:
    """The layer that makes the values of an attention whose result only these layers read; it takes the factors.

    Attention mixes positions, each channel of the values for itself.
    """
    node = _made_for(value, layers)
    found = None if node is None else find_attention(node)
    return None if found is None else source_layer(found.product.inputs[1], found.product)


def _made_for(value: ir.Value, layers: Sequence[Layer]) -> ir.Node | None:
    """The node that makes the value, where these layers are all that read it."""
    others = value.is_graph_output() or {use.node for use in value.uses()} - {layer.node for layer in layers}
    return None if others else value.producer()


def by_input(layer: Layer) -> np.ndarray:
    """The weight as (inputs, everything else); of a recurrent layer too."""
    return np.moveaxis(layer.weight, layer.summed_axis, 0).reshape(layer.weight.shape[layer.summed_axis], -1)


def _add(
    graph: ir.Graph, place: ir.Node, op: str, inputs: list[ir.Value], name: str, shape: ir.Shape | None
) -> ir.Value:
    node = ir.node(op, inputs, name=f"{name}_{op}")
    value = node.outputs[0]
    value.name, value.shape, value.type = name, shape, ir.TensorType(ir.DataType.FLOAT)
    graph.insert_before(place, node)
    return value


def _multiply_back(graph: ir.Graph, node: ir.Node, factor: ir.Value) -> None:
    product = node.outputs[0]
    behind = ir.node("Mul", [product, factor], name=f"{node.name}_Mul")
    graph.insert_after(node, behind)
    take_over(product, behind.outputs[0], "normalized")
    behind.replace_input_with(0, product)
