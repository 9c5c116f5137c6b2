"""Rows of stored tables: looked up as codes, and only what was looked up is decoded. Exact.

Where the scales of a table are codes too, of at most 8 bits, a row has its scale behind it: one Gather instead of two.
Rows of several tables that one Concat joins are joined as codes and decoded together.

onnxruntime 1.31, one thread, 26 tables of 100,000 × 16 in int4, 2048 rows of each, ms: float 2.2 to 2.5; codes and
scales apart 3.7; one Gather 2.7, joined 2.2 to 2.4. GatherBlockQuantized, which decodes number by number, takes 10.3.
"""

from collections.abc import Collection, Iterable
from dataclasses import dataclass, replace
from itertools import groupby

import numpy as np
import onnx_ir as ir
from onnx_ir.passes import common

from lowbit.deploy.expand import Expansion, Pool
from lowbit.graph.layer import number
from lowbit.graph.links import made_by, remove_node
from lowbit.graph.weights import scalar
from lowbit.numerics import Int, QuantTensor

_INT8 = ir.DataType.INT8
_ROWS = "lowbit.rows"  # key in the meta of a value while a program is written: its Rows


@dataclass(frozen=True)
class Rows:
    """Rows that were looked up, each with the code of its scale behind it.

    codes         (*ids, columns + 1) int8
    factor, zero  a row's scale is (its code − zero) · factor
    """

    codes: ir.Value
    columns: int
    factor: float
    zero: int


def looked_up(stored: QuantTensor, name: str, gathers: Iterable[ir.Node], pool: Pool) -> Expansion:
    """Let nodes that gather rows of a table gather codes; returns whose constants the program has to register."""
    expansion = Expansion(name, pool)
    packed = _with_scales(expansion, stored)
    for gather in gathers:
        ids = gather.inputs[1]
        assert ids is not None
        assert ids.shape is not None
        if packed is None:
            found = expansion.rows(stored, ids, len(ids.shape))
        else:
            codes = expansion.node("Gather", packed.codes, ids, axis=0)
            rows = Rows(codes, packed.columns, packed.factor, packed.zero)
            found = _decoded(expansion, rows)
            found.meta[_ROWS] = rows
        assert isinstance(gather.graph, ir.Graph)
        gather.graph.insert_before(gather, [node for node in expansion.nodes if node.graph is None])
        remove_node(gather, found)
    return expansion


def _with_scales(expansion: Expansion, stored: QuantTensor) -> Rows | None:
    """All rows of a table, packed when the file is loaded; None where scales are no codes of the kind."""
    scale, grid = stored.scale, stored.format.grid
    if not isinstance(scale, QuantTensor) or stored.zero is not None or scale.zero is not None:
        return None
    own = scale.format.grid
    if not (isinstance(grid, Int) and isinstance(own, Int)) or max(grid.bits, own.bits) > 8 or not grid.signed:
        return None
    factors = np.unique(np.asarray(scale.scale_values(), np.float32))
    if stored.tiles != (stored.shape[0], 1) or len(factors) != 1:
        return None
    signed = own if own.signed else Int(own.bits)
    zero = signed.minimum - own.minimum
    codes = expansion.integers(np.asarray(stored.codes), grid, "_codes", _INT8)
    scales = expansion.integers(np.asarray(scale.codes).astype(np.int16) + zero, signed, "_scale_codes", _INT8)
    packed = expansion.node("Concat", codes, scales, axis=1)
    return Rows(packed, stored.shape[1], float(factors[0]), zero)


def _decoded(expansion: Expansion, rows: Rows) -> ir.Value:
    """(*ids, columns) float32."""
    codes, scales = _split(expansion, rows)
    factor = expansion.shared(np.float32(rows.factor), ir.DataType.FLOAT)
    scale = expansion.node("DequantizeLinear", scales, factor, expansion.shared(np.int8(rows.zero), _INT8))
    return expansion.node("Mul", expansion.node("Cast", codes, to=ir.DataType.FLOAT), scale)


def _split(expansion: Expansion, rows: Rows) -> tuple[ir.Value, ir.Value]:
    """Codes, and the codes of their scales."""
    first = expansion.node("Split", rows.codes, expansion.shape((rows.columns, 1)), axis=-1)
    node = expansion.nodes[-1]
    node.resize_outputs(2)
    node.outputs[1].name = f"{first.name}_scales"
    return first, node.outputs[1]


def join_rows(program: ir.Model, integer: Collection[str] = ()) -> None:
    """Decode rows behind the Concat that joins them along axis 1, as vectors or stacked, where ids are vectors."""
    for concat in [node for node in program.graph if node.op_type == "Concat" and number(node, "axis") in (1, -1)]:
        inputs: list[ir.Value | None] = []
        for (width, stacked), run in groupby(concat.inputs, key=_width):
            values = list(run)
            inputs += [_joined(program.graph, concat, values, stacked)] if width and len(values) > 1 else values
        if len(inputs) < len(concat.inputs):
            concat.resize_inputs(len(inputs))
            for index, value in enumerate(inputs):
                concat.replace_input_with(index, value)
    common.RemoveUnusedNodesPass()(program)


def _behind_stack(value: ir.Value | None) -> ir.Value | None:
    """What a Concat stacks: the value in front of Unsqueeze(axis 1), else the value."""
    stack = made_by(value, "Unsqueeze")
    return stack.inputs[0] if stack is not None and scalar(stack.inputs[1]) == 1 else value


def _width(value: ir.Value | None) -> tuple[int, bool]:
    """Columns of the rows that a Concat reads, 0 where they are no such rows; and whether it stacks them."""
    inner = _behind_stack(value)
    rows = None if inner is None else inner.meta.get(_ROWS)
    vectors = rows is not None and inner is not None and inner.shape is not None and len(inner.shape) == 2
    return (rows.columns if rows is not None and vectors else 0), inner is not value


def _joined(graph: ir.Graph, concat: ir.Node, values: list[ir.Value | None], stacked: bool) -> ir.Value:
    expansion = Expansion(f"{concat.name}_rows", Pool())
    found: list[Rows] = [inner.meta[_ROWS] for value in values if (inner := _behind_stack(value)) is not None]
    count, columns = len(found), found[0].columns
    joined = expansion.node("Concat", *(rows.codes for rows in found), axis=1)
    flat = expansion.reshape(joined, (-1, columns + 1))
    codes, scales = _split(expansion, replace(found[0], codes=flat))
    factors = expansion.constant("_factors", np.array([rows.factor for rows in found]), ir.DataType.FLOAT)
    zeros = expansion.constant("_zeros", np.array([rows.zero for rows in found]), _INT8)
    scale = expansion.node("DequantizeLinear", expansion.reshape(scales, (-1, count)), factors, zeros, axis=1)
    decoded = expansion.node("DequantizeLinear", codes, expansion.reshape(scale, (-1,)), axis=0)
    result = expansion.reshape(decoded, (-1, count, columns) if stacked else (-1, count * columns))
    graph.insert_before(concat, expansion.nodes)
    for constant in expansion.initializers:
        constant.name = f"{expansion.name}~{constant.name}"
        graph.register_initializer(constant)
    return result
