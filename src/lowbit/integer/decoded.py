"""Weights beside 16-bit activations, as the writer spells them: integers cast to float, times their scales.

onnxruntime would run a Conv of decoded 8-bit weights and decoded 16-bit activations as an 8-bit kernel (see
deploy/kernels.py); the integer program wants to see the codes.
"""

import numpy as np
import onnx_ir as ir

from lowbit.graph.links import made_by
from lowbit.graph.weights import add_constant, constant
from lowbit.integer.moves import run_node


def decode_products(program: ir.Model) -> None:
    """Each such Mul becomes the DequantizeLinear that it spells, in place."""
    for node in list(program.graph):
        cast = made_by(node.inputs[0], "Cast") if node.op_type == "Mul" else None
        scale = None if cast is None else constant(node.inputs[1])
        codes = _codes(cast.inputs[0]) if cast is not None and scale is not None else None
        if codes is None or scale is None:
            continue
        axes = [axis + codes.ndim - scale.ndim for axis, size in enumerate(scale.shape) if size > 1]
        if len(axes) > 1 or codes.min(initial=0) < -128 or codes.max(initial=0) > 127:
            continue
        value, name = node.outputs[0], node.name
        held = add_constant(program.graph, f"{value.name}.scale", scale.reshape(-1 if axes else ()))
        stored = add_constant(program.graph, f"{value.name}.codes", codes.astype(np.int8))
        decode = ir.node("DequantizeLinear", [stored, held], {"axis": axes[0]} if axes else {}, name=name)
        program.graph.insert_before(node, decode)
        value.replace_all_uses_with(decode.outputs[0])
        decode.outputs[0].name, value.name = value.name, None
        program.graph.remove(node, safe=True)


def _codes(value: ir.Value | None) -> np.ndarray | None:
    """What integers it holds, also where few bits are unpacked by operators; None where it holds anything else."""
    array, producer = constant(value), None if value is None else value.producer()
    if array is not None:
        return array if array.dtype.kind in "iu" else array.astype(np.int8) if "int" in array.dtype.name else None
    given = [] if producer is None else [_codes(read) for read in producer.inputs]
    if producer is None or not given or any(array is None for array in given):
        return None
    arrays = {index: array for index, array in enumerate(given) if array is not None}
    return run_node(producer, arrays)[0]
