"""Reading and replacing the constants of a program. Tensors are never edited in place: a copied program shares them."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir


def constant(value: ir.Value | None) -> np.ndarray | None:
    """The array of an initialiser, or None where the value is computed, missing or without data."""
    if value is None or not value.is_initializer() or value.const_value is None:
        return None
    return np.asarray(value.const_value.numpy())


def float_constant(value: ir.Value | None) -> np.ndarray | None:
    """The array of an initialiser of floating-point numbers, else None."""
    tensor = None if value is None else value.const_value
    return constant(value) if tensor is not None and tensor.dtype.is_floating_point() else None


def scalar(value: ir.Value | None) -> float | None:
    """The number in a constant of one element, else None."""
    array = constant(value)
    return float(array.reshape(())) if array is not None and array.size == 1 and array.dtype.kind in "fiu" else None


def add_constant(graph: ir.Graph, name: str, array: np.ndarray) -> ir.Value:
    """A new initialiser; `name` gets a number where it is taken."""
    taken = ir.convenience.create_value_mapping(graph)
    unique, number = name, 2
    while unique in taken or unique in graph.initializers:
        unique, number = f"{name}_{number}", number + 1
    tensor = ir.tensor(np.asarray(array, order="C"), name=unique)
    value = ir.Value(name=unique, shape=ir.Shape(array.shape), type=ir.TensorType(tensor.dtype), const_value=tensor)
    graph.register_initializer(value)
    return value


def shared_constant(graph: ir.Graph, name: str, array: np.ndarray) -> ir.Value:
    """The initialiser of that name, made once."""
    known = graph.initializers.get(name)
    return add_constant(graph, name, array) if known is None else known


def set_constant(node: ir.Node, index: int, array: np.ndarray, name: str) -> None:
    """Make the node's input `index` this constant, in the element type that it had.

    An initialiser that only this node reads is replaced under its own name; a shared one is left to its other readers
    and the node gets one called `name`.
    """
    assert node.graph is not None
    if index >= len(node.inputs):
        node.resize_inputs(index + 1)
    old = node.inputs[index]
    dtype: Any = array.dtype if old is None or old.dtype is None else old.dtype.numpy()
    array = np.asarray(array.astype(dtype), order="C")
    if old is not None and old.is_initializer() and len(old.uses()) == 1 and not old.is_graph_output():
        old.const_value = ir.tensor(array, name=old.name)
        old.shape = ir.Shape(array.shape)
    else:
        assert isinstance(node.graph, ir.Graph)
        node.replace_input_with(index, add_constant(node.graph, name, array))


def drop_unread(program: ir.Model) -> None:
    """Remove the initialisers that nobody reads any more."""
    for graph in program.graphs():
        for name, value in list(graph.initializers.items()):
            if not value.uses() and not value.is_graph_output():
                del graph.initializers[name]
