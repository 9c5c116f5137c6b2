"""float16, bfloat16 and float64 networks become float32: what they are quantized from, and what engines' kernels take.

Approximate only where float64 is: float16 and bfloat16 numbers are float32 numbers, and sums get more exact. Inputs and
outputs of float16 and float64 keep their type, through a Cast at the edge, so that the file stays a drop-in. Those of
bfloat16 become float32: NumPy has no such type, and onnxruntime takes none from it.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from lowbit.graph.fold import infer_shapes
from lowbit.graph.layer import MULTIPLYING

HALF = (ir.DataType.FLOAT16, ir.DataType.BFLOAT16)
LINEAR = MULTIPLYING | {"Einsum", "Attention"}
_TYPE_ATTRIBUTES = frozenset({"to", "dtype", "output_dtype"})
_LARGEST = float(np.finfo(np.float32).max)


def to_float32(program: ir.Model) -> tuple[str, ...]:
    """Convert the program in place; the names of the types that it computed in, none where it was float32 already.

    float64 is converted where a layer with weights computes in it: a few float64 numbers in a float32 network compute
    positions and sizes, which float32 may round. Functions have to be inlined before.
    """
    if not _mentions(program):
        return ()
    infer_shapes(program)
    found = _types(program)
    if not found:
        return ()
    kept = found - {ir.DataType.BFLOAT16}
    inputs, outputs = (
        {value: value.dtype for value in values if value.dtype in kept}
        for values in (program.graph.inputs, program.graph.outputs)
    )
    for value in _values(program):
        value.type = _converted_type(value.type, found)
        tensor = value.const_value
        if tensor is not None and tensor.dtype in found:
            value.const_value = _converted_tensor(tensor)
    for node in program.graph.all_nodes():
        _convert_attributes(node, found)
    _cast_at_the_edge(program.graph, inputs, outputs)
    infer_shapes(program)
    return tuple(sorted(str(np.dtype(dtype.numpy())) for dtype in found))


def _mentions(program: ir.Model) -> bool:
    """Whether such a type is written anywhere: only then types are inferred, which takes seconds for large networks."""
    wanted = {*HALF, ir.DataType.DOUBLE}
    codes = {int(dtype) for dtype in wanted}
    for graph in program.graphs():
        if any(value.dtype in wanted for value in (*graph.inputs, *graph.initializers.values())):
            return True
        for node in graph:
            for name, attribute in node.attributes.items():
                if attribute.type == ir.AttributeType.TENSOR and attribute.as_tensor().dtype in wanted:
                    return True
                if attribute.type == ir.AttributeType.INT and name in _TYPE_ATTRIBUTES and attribute.as_int() in codes:
                    return True
    return False


def _types(program: ir.Model) -> set[ir.DataType]:
    """Types other than float32 that layers compute in; what is only cast at the edge is none of them."""
    found: set[ir.DataType] = set()
    for node in program.graph.all_nodes():
        types = {v.dtype for v in (*node.inputs, *node.outputs) if v is not None and v.dtype is not None}
        if node.op_type == "Cast" and len(types & {*HALF, ir.DataType.DOUBLE}) < 2:
            continue
        found |= types & {*HALF, *((ir.DataType.DOUBLE,) if node.op_type in LINEAR else ())}
    return found


def _cast_at_the_edge(
    graph: ir.Graph, inputs: dict[ir.Value, ir.DataType], outputs: dict[ir.Value, ir.DataType]
) -> None:
    """A Cast behind each of these inputs and before each of these outputs; the names at the edge stay."""
    for value, dtype in inputs.items():
        value.type = ir.TensorType(dtype)
        uses = list(value.uses())
        if not uses:
            continue
        cast = ir.node("Cast", [value], {"to": ir.DataType.FLOAT}, name=f"{value.name}_to_float32")
        inner = cast.outputs[0]
        inner.name, inner.type, inner.shape = f"{value.name}_float32", ir.TensorType(ir.DataType.FLOAT), value.shape
        for use in uses:
            use.node.replace_input_with(use.idx, inner)
        graph.insert_before(graph[0], cast)
    for value, dtype in outputs.items():
        if value.is_graph_input():  # given on as it came
            value.type = ir.TensorType(dtype)
            continue
        name = str(value.name)
        constant = graph.initializers.pop(name, None)
        value.name = f"{name}_float32"
        if constant is not None:
            graph.initializers.add(value)
        cast = ir.node("Cast", [value], {"to": dtype}, name=f"{name}_to_{dtype.name.lower()}")
        outer = cast.outputs[0]
        outer.name, outer.type, outer.shape = name, ir.TensorType(dtype), value.shape
        outer.doc_string = value.doc_string
        graph.append(cast)
        for index, output in enumerate(list(graph.outputs)):
            if output is value:
                graph.outputs[index] = outer


def _values(program: ir.Model) -> list[ir.Value]:
    """Every value of every graph, each once."""
    found: dict[ir.Value, None] = {}
    for graph in program.graphs():
        made = (value for node in graph for value in node.outputs)
        found |= dict.fromkeys((*graph.inputs, *graph.initializers.values(), *made))
    return list(found)


def _converted_type(kind: ir.TypeProtocol | None, found: set[ir.DataType]) -> ir.TypeProtocol | None:
    if isinstance(kind, ir.TensorType):
        return ir.TensorType(ir.DataType.FLOAT) if kind.dtype in found else kind
    if isinstance(kind, (ir.SequenceType, ir.OptionalType)):
        inner = _converted_type(kind.elem_type, found)
        return kind if inner is kind.elem_type or inner is None else type(kind)(inner)
    return kind


def _converted_tensor(tensor: ir.TensorProtocol) -> ir.TensorProtocol:
    array = np.asarray(tensor.numpy())
    if array.dtype == np.float64:  # −1.8e308 of a mask stays finite
        array = np.where(np.isfinite(array), np.clip(array, -_LARGEST, _LARGEST), array)
    return ir.tensor(array.astype(np.float32), name=tensor.name)


def _convert_attributes(node: ir.Node, found: set[ir.DataType]) -> None:
    """Constants, and the types that Cast, RandomNormal and the like write."""
    codes = {int(dtype) for dtype in found}
    for name, attribute in list(node.attributes.items()):
        if attribute.is_ref():
            continue
        if attribute.type == ir.AttributeType.TENSOR and attribute.as_tensor().dtype in found:
            node.attributes[name] = ir.AttrTensor(name, _converted_tensor(attribute.as_tensor()))
        elif attribute.type == ir.AttributeType.INT and name in _TYPE_ATTRIBUTES and attribute.as_int() in codes:
            node.attributes[name] = ir.AttrInt64(name, int(ir.DataType.FLOAT))
