"""Inputs, or symbolic dimensions of inputs, that are always the same, made constants. Exact for those values.

What they decide is computed and dead branches of `If` are removed. A network that chooses between sampling rates, for
one, becomes a network without branches for one of them, which can be calibrated and quantized throughout.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx_ir as ir

from lowbit.errors import InputError, ShapeError
from lowbit.graph.fold import fold_constants, infer_shapes
from lowbit.graph.weights import add_constant, drop_unread


def fix_inputs(program: ir.Model, values: Mapping[str, Any]) -> None:
    """Replace inputs by constants and symbolic dimensions by sizes, and fold what follows from them; in place.

    values   by the name of an input or, where no input has that name, of a dimension: {"sr": 16000, "sequence": 576}
    InputError where there is neither, ShapeError where a value does not fit its input.
    """
    sizes: dict[str, int] = {}
    for name, value in values.items():
        port = next((port for port in program.graph.inputs if port.name == name), None)
        if port is None:
            sizes[name] = value
        else:
            _fix_input(program.graph, port, value)
    _fix_dimensions(program, sizes)
    infer_shapes(program)
    while fold_constants(program):
        infer_shapes(program)
    drop_unread(program)


def _fix_input(graph: ir.Graph, port: ir.Value, value: Any) -> None:
    name = str(port.name)
    array = np.asarray(value, dtype=None if port.dtype is None else port.dtype.numpy())
    if port.shape is not None and not _fits(array, port.shape):
        raise ShapeError(f"input '{name}' of shape {port.shape} cannot be fixed to a value of shape {array.shape}.")
    graph.inputs.remove(port)
    port.name = f"{name}.input"
    port.replace_all_uses_with(add_constant(graph, name, array), replace_graph_outputs=True)


def _fix_dimensions(program: ir.Model, sizes: Mapping[str, int]) -> None:
    ports = program.graph.inputs
    known = {str(dim.value) for port in ports for dim in port.shape or () if isinstance(dim, ir.SymbolicDim)}
    if unknown := [name for name in sizes if name not in known]:
        raise InputError(
            f"no input and no dimension of an input is called '{unknown[0]}'; the inputs are "
            f"{[port.name for port in ports]}, their dimensions {sorted(known)}."
        )
    for port in ports:
        if port.shape is not None:
            port.shape = ir.Shape([d if isinstance(d, int) else sizes.get(str(d.value), d) for d in port.shape])
    for node in program.graph.all_nodes():
        for value in node.outputs:  # what was inferred for any size is inferred again for this one
            if value.shape is not None and not value.shape.is_static() and not value.is_graph_output():
                value.shape = None


def _fits(array: np.ndarray, shape: ir.Shape) -> bool:
    if array.ndim != shape.rank():
        return False
    return all(not isinstance(want, int) or want == have for want, have in zip(shape, array.shape, strict=True))
