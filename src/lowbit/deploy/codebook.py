"""Shared weights in a program: codes and a small table, expanded by Gather, which engines fold when they load the file.

`w` becomes the initialisers `w_codes` (UINT4 up to 16 values, else UINT8: one code an element, which is what an entropy
coder wants to see) and `w_table` (float32), and two nodes: Cast to int32 and Gather; with several tables an Add of each
row's place in them.
"""

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from lowbit.errors import UnsupportedError


def write_codebook(
    program: ir.Model, name: str, codes: NDArray[np.uint8], tables: NDArray[np.float32]
) -> tuple[int, int]:
    """Replace the initialiser `name` in place; returns the bytes of the codes and of the tables.

    codes    the weight's shape
    tables   (groups, n): group g serves the g-th equal part of the weight's first axis
    """
    value = program.graph.initializers[name]
    groups, count = tables.shape
    if count > 256 or not value.uses():
        raise UnsupportedError(f"'{name}' cannot be written as codes: {count} values, {len(value.uses())} readers.")
    kind = ir.DataType.UINT4 if count <= 16 else ir.DataType.UINT8
    stored = _constant(program, f"{name}_codes", ir.Tensor(codes.astype(kind.numpy()), dtype=kind))
    table = _constant(program, f"{name}_table", ir.tensor(tables.reshape(-1)))
    cast = ir.node("Cast", [stored], {"to": int(ir.DataType.INT32)}, name=f"{name}_cast")
    nodes = [cast]
    places = cast.outputs[0]
    places.name = f"{name}_int32"
    if groups > 1:
        rows = np.repeat(np.arange(groups, dtype=np.int32) * count, len(codes) // groups)
        rows = rows.reshape(-1, *[1] * (codes.ndim - 1))
        offsets = _constant(program, f"{name}_offsets", ir.tensor(rows))
        nodes.append(ir.node("Add", [places, offsets], name=f"{name}_add"))
        places = nodes[-1].outputs[0]
        places.name = f"{name}_places"
    gather = ir.node("Gather", [table, places], {"axis": 0}, name=f"{name}_gather")
    expanded = gather.outputs[0]
    expanded.name = f"{name}_shared"  # no type: engines infer it, and names and types are what is left of a small file
    order = {node: i for i, node in enumerate(program.graph)}
    first = min((use.node for use in value.uses()), key=order.__getitem__)
    value.replace_all_uses_with(expanded)
    program.graph.insert_before(first, [*nodes, gather])
    del program.graph.initializers[name]
    return (codes.size + 1) // 2 if kind is ir.DataType.UINT4 else codes.size, tables.nbytes


def _constant(program: ir.Model, name: str, tensor: ir.TensorProtocol) -> ir.Value:
    tensor.name = name
    value = ir.Value(name=name, const_value=tensor)
    program.graph.register_initializer(value)
    return value


def fewer_mantissa_bits(array: NDArray[np.float32], bits: int) -> NDArray[np.float32]:
    """float32 rounded to `bits` bits of mantissa, ties to even: the type stays, the zeros cost nothing when packed."""
    words = np.ascontiguousarray(array, np.float32).view(np.uint32).astype(np.uint64)
    cut = 23 - bits
    half = np.uint64((1 << cut - 1) - 1) + ((words >> np.uint64(cut)) & np.uint64(1)) if cut else np.uint64(0)
    rounded = ((words + half) >> np.uint64(cut)) << np.uint64(cut)
    return rounded.astype(np.uint32).view(np.float32).reshape(array.shape)
