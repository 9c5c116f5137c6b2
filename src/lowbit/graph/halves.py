"""What stays float in half the bytes: constants stored in float16 and widened when the file is loaded.

The network still computes in float32: onnxruntime has few float16 kernels for CPUs and casts around each of the others.
"""

from __future__ import annotations

from collections.abc import Collection

import numpy as np
import onnx_ir as ir

_LARGEST = float(np.finfo(np.float16).max)
LEAST = 32  # numbers; a Cast takes about as many bytes as half of them


def store_halves(program: ir.Model, names: Collection[str]) -> None:
    """Store these constants in float16, in place, where float16 has the very numbers."""
    for name in [name for name in program.graph.initializers if name in names]:
        value = program.graph.initializers[name]
        array = _fitting(value)
        if array is None or not value.uses() or value.is_graph_output():
            continue
        half = array.astype(np.float16)
        if not np.array_equal(half.astype(np.float32), array):
            continue
        wide = ir.Value(name=f"{name}_wide", shape=value.shape, type=ir.TensorType(ir.DataType.FLOAT))
        value.replace_all_uses_with(wide)
        first = next(node for node in program.graph if wide in node.inputs)
        cast = ir.node("Cast", [value], {"to": int(ir.DataType.FLOAT)}, outputs=[wide], name=f"{name}_widen")
        program.graph.insert_before(first, cast)
        value.const_value, value.type = ir.tensor(half, name=name), ir.TensorType(ir.DataType.FLOAT16)


def _fitting(value: ir.Value) -> np.ndarray | None:
    """A constant of float32 that is worth a Cast and has no number beyond float16, such as a mask's −3.4e38."""
    tensor = value.const_value
    if tensor is None or tensor.dtype is not ir.DataType.FLOAT or tensor.size < LEAST:
        return None
    array = np.asarray(tensor.numpy())
    return array if bool((np.abs(array) <= _LARGEST).all()) else None
