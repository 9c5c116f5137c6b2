"""Write a quantized network: QuantizeLinear and DequantizeLinear in the original graph, integers as initialisers.

The graph stays the user's: names of inputs, outputs and nodes are kept, and whatever is not quantized is not touched.
For a quantized value `x` the file holds `x_quantized` (integers) and `x_dequantized` (what its readers see); where its
range is measured at each input, `x_scale` and `x_zero` are computed as well. For a weight `w` the initialisers are
`w_codes`, `w_scale`, `w_zero`; `compact` shortens these names after the proof. Source of the operators: ONNX,
QuantizeLinear-21 and DequantizeLinear-21.
"""

import math
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, replace

import numpy as np
import onnx_ir as ir

from lowbit.deploy.absorb import absorb_clips
from lowbit.deploy.dynamic import multiply_integers
from lowbit.deploy.expand import Expansion, Pool, expand, has_separate_rows, kernel_type, stored_type
from lowbit.deploy.lookup import looked_up
from lowbit.deploy.rewrites import fit_kernel_of_blocks, keep_bias_apart, keep_residuals_apart
from lowbit.errors import UnsupportedError
from lowbit.graph.weights import drop_unread
from lowbit.numerics import Int, QuantTensor

# Values of a table that is expanded when the file is loaded, 64 kB: its rows then cost one Gather and no arithmetic.
# A character model, ms: 0.419 where rows were decoded at each call, onnxruntime's own file 0.414; now they are equal.
SMALL_TABLE = 1 << 14


@dataclass(frozen=True)
class IntegerTensor:
    """One value to be written in integers: real ≈ (code − zero) · scale.

    codes       the integers of a constant; None for an activation, which is quantized where it is made
    scale       float32: a scalar, (channels,) along `axis`, or one per block of `block` elements along `axis`
    zero        integers of scale's shape
    bits        of a code: 1–16, and 32 of a bias. A constant takes that many in the file
    narrow      the lowest code is not used
    block       4-bit codes only: left to the engine as they are, for its kernel of blocks (onnxruntime's MatMulNBits)
    readers     (node, input index) that read the quantized value; None: all
    table       of a constant: the integers that its codes, counted from 0, stand for
    """

    value: str
    scale: np.ndarray
    zero: np.ndarray
    bits: int
    signed: bool
    codes: np.ndarray | None = None
    axis: int | None = None
    block: int = 0
    narrow: bool = False
    readers: frozenset[tuple[str, int]] | None = None
    table: np.ndarray | None = None

    @property
    def dtype(self) -> ir.DataType:
        """The ONNX integers of 8, 16 or 32 bits in which an engine computes with the codes."""
        if self.bits == 32 and self.signed:
            return ir.DataType.INT32
        if self.bits > 16:
            raise UnsupportedError(
                f"'{self.value}': no engine computes in {self.bits}-bit integers. Use 16 bits or fewer."
            )
        return kernel_type(self.grid)

    @property
    def stored(self) -> ir.DataType:
        """The ONNX integers that hold the codes of a kernel of blocks."""
        return stored_type(self.grid)

    @property
    def grid(self) -> Int:
        return Int(self.bits, self.signed)

    @property
    def ends(self) -> tuple[int, int]:
        """The lowest and the highest code."""
        return self.grid.minimum + self.narrow, self.grid.maximum

    def unsigned(self) -> "IntegerTensor":
        """The same numbers in unsigned codes, where it has at most 8 bits: codes and zero both half a grid higher."""
        if not self.signed or self.bits > 8:
            return self
        half = 1 << (self.bits - 1)
        codes = None if self.codes is None else self.codes.astype(np.int16) + half
        return replace(self, signed=False, zero=self.zero + half, codes=codes)


@dataclass(frozen=True)
class ExpandedTensor:
    """A constant in any format, expanded to floats when the file is loaded; readers as in `IntegerTensor`."""

    value: str
    stored: QuantTensor
    readers: frozenset[tuple[str, int]] | None = None


@dataclass(frozen=True)
class MeasuredTensor:
    """An activation in uint8 whose range is measured at each input; readers as in `IntegerTensor`."""

    value: str
    readers: frozenset[tuple[str, int]] | None = None


Tensor = IntegerTensor | ExpandedTensor | MeasuredTensor


def write(
    program: ir.Model,
    tensors: Iterable[Tensor],
    floats: Mapping[str, np.ndarray] | None = None,
    whole_codes: bool = False,
    recurrent: Collection[str] = (),
) -> ir.Model:
    """A copy of the program in which these values are stored in few bits, and integers are passed on.

    floats        initialisers that stay float, and what they hold from now on
    whole_codes   the codes of a table take 4, 8 or 16 bits each; else as many as their format says
    recurrent     names of the recurrent layers that quantize their states themselves
    """
    program = program.clone()
    for name, array in (floats or {}).items():
        program.graph.initializers[name].const_value = ir.tensor(array, name=name)
    values = {v.name: v for v in program.graph.inputs}
    values |= {str(name): v for name, v in program.graph.initializers.items()}
    values |= {v.name: v for node in program.graph for v in node.outputs}
    pool = Pool(whole_codes)
    for tensor in tensors:
        value = values[tensor.value]
        if isinstance(tensor, ExpandedTensor):
            _write_expanded(program, value, tensor, pool)
        elif isinstance(tensor, IntegerTensor) and tensor.codes is not None:
            _write_constant(program, value, tensor, pool)
        elif value.dtype is ir.DataType.FLOAT:
            _write_activation(program, value, tensor, pool)
        else:
            raise UnsupportedError(f"'{tensor.value}' has type {value.dtype}; only float32 values are quantized.")
    multiply_integers(program, recurrent)
    keep_bias_apart(program)
    fit_kernel_of_blocks(program)
    keep_residuals_apart(program)
    absorb_clips(program)
    drop_unread(program)
    return program


def _attributes(tensor: IntegerTensor) -> dict[str, int]:
    attributes = {} if tensor.axis is None else {"axis": tensor.axis}
    return attributes | ({"block_size": tensor.block} if tensor.block else {})


def _node(
    op_type: str, inputs: list[ir.Value], name: str, dtype: ir.DataType, shape: ir.Shape | None, **attributes: int
) -> ir.Node:
    output = ir.Value(name=name, shape=shape, type=ir.TensorType(dtype))
    return ir.node(op_type, inputs, attributes, outputs=[output])


def _write_constant(program: ir.Model, value: ir.Value, tensor: IntegerTensor, pool: Pool) -> None:
    """codes → DequantizeLinear. Codes of few bits become int8 first: engines fold that when they load the file.

    onnxruntime makes QLinearConv of int8 codes only; int4 codes under DequantizeLinear are decoded at each call.
    """
    name = str(value.name)
    assert tensor.codes is not None
    expansion = Expansion(name, pool)
    if tensor.block or tensor.bits == 32:
        codes = expansion.constant("_codes", tensor.codes, ir.DataType.INT32 if tensor.bits == 32 else tensor.stored)
    elif tensor.table is not None:
        codes = expansion.looked_up(tensor.codes, tensor.table, "_codes", tensor.dtype)
    else:
        codes = expansion.integers(tensor.codes, tensor.grid, "_codes", tensor.dtype)
    inputs = [codes, expansion.constant("_scale", np.asarray(tensor.scale, np.float32), ir.DataType.FLOAT)]
    if tensor.bits < 32 and not (tensor.block and not np.any(tensor.zero)):
        inputs.append(
            expansion.constant("_zero", np.asarray(tensor.zero), tensor.stored if tensor.block else tensor.dtype)
        )
    decode = _node(
        "DequantizeLinear", inputs, f"{name}_dequantized", ir.DataType.FLOAT, value.shape, **_attributes(tensor)
    )
    _register(program, expansion)
    _replace_constant(program, value, tensor.readers, [*expansion.nodes, decode])


def _write_expanded(program: ir.Model, value: ir.Value, tensor: ExpandedTensor, pool: Pool) -> None:
    readers = _readers(value, tensor.readers)
    if all(map(_reads_rows, readers)) and has_separate_rows(tensor.stored) and not _is_small(tensor.stored):
        _register(program, looked_up(tensor.stored, str(value.name), [use.node for use in readers], pool))
        return
    expansion = expand(tensor.stored, str(value.name), f"{value.name}_dequantized", pool)
    _register(program, expansion)
    _replace_constant(program, value, tensor.readers, expansion.nodes)


def _is_small(table: QuantTensor) -> bool:
    """Whether the engine may hold all rows as floats; rows with coded scales are joined with those of larger tables."""
    return math.prod(table.shape) <= SMALL_TABLE and not isinstance(table.scale, QuantTensor)


def _reads_rows(use: "ir._core.Usage") -> bool:
    ids = use.node.inputs[1] if use.node.op_type == "Gather" and use.idx == 0 else None
    return ids is not None and ids.shape is not None and use.node.attributes.get_int("axis", 0) == 0


def _register(program: ir.Model, expansion: Expansion) -> None:
    for constant in expansion.initializers:
        program.graph.register_initializer(constant)


def _readers(value: ir.Value, wanted: frozenset[tuple[str, int]] | None) -> list["ir._core.Usage"]:
    return [u for u in value.uses() if wanted is None or (u.node.name, u.idx) in wanted]


def _replace_constant(
    program: ir.Model, value: ir.Value, wanted: frozenset[tuple[str, int]] | None, nodes: list[ir.Node]
) -> None:
    """Let the readers of a constant read the last of these nodes instead."""
    readers = _readers(value, wanted)
    first = min((u.node for u in readers), key=list(program.graph).index)
    program.graph.insert_before(first, nodes)
    for use in readers:
        use.node.replace_input_with(use.idx, nodes[-1].outputs[0])


def _write_activation(program: ir.Model, value: ir.Value, tensor: IntegerTensor | MeasuredTensor, pool: Pool) -> None:
    name, graph = str(value.name), program.graph
    readers = _readers(value, tensor.readers)
    if isinstance(tensor, MeasuredTensor):
        measure = ir.node("DynamicQuantizeLinear", [value], num_outputs=3)
        nodes, (codes, scale, zero) = [measure], measure.outputs
        scale.name, zero.name = f"{name}_scale", f"{name}_zero"
    else:
        constants = Expansion(name, pool)
        scale = constants.constant("_scale", tensor.scale, ir.DataType.FLOAT)
        zero = constants.constant("_zero", tensor.zero, tensor.dtype)
        nodes = _encode(constants, value, tensor, scale, zero)
        _register(program, constants)
        codes = nodes[-1].outputs[0]
    codes.name = f"{name}_quantized"
    decode = _node("DequantizeLinear", [codes, scale, zero], f"{name}_dequantized", ir.DataType.FLOAT, value.shape)
    nodes.append(decode)
    producer = value.producer()
    if producer is None:
        first = min((u.node for u in readers), key=list(graph).index)
        graph.insert_before(first, nodes)
    else:
        graph.insert_after(producer, nodes)
    for use in readers:
        use.node.replace_input_with(use.idx, decode.outputs[0])
    if value.is_graph_output() and tensor.readers is None:
        # The name of an output is the user's: the dequantized value takes it over.
        result = decode.outputs[0]
        value.name, result.name = f"{name}_unquantized", name
        for index, output in enumerate(graph.outputs):
            if output is value:
                graph.outputs[index] = result


def _encode(
    constants: Expansion, value: ir.Value, tensor: IntegerTensor, scale: ir.Value, zero: ir.Value
) -> list[ir.Node]:
    """QuantizeLinear, which saturates at the ends of 8 or 16 bits, and a Clip where the codes have fewer.

    Codes of 8 bits are clipped behind it: a float Clip between Conv and QuantizeLinear would keep onnxruntime from
    making a QLinearConv of the two. It has no Clip of 16-bit integers: there the value is clipped before.
    """
    name, held = constants.name, np.iinfo(tensor.dtype.numpy())
    ends = np.array(tensor.ends)
    encode = _node("QuantizeLinear", [value, scale, zero], f"{name}_rounded", tensor.dtype, value.shape)
    if ends[0] == held.min and ends[1] == held.max:
        return [encode]
    by_code = tensor.dtype.bitwidth == 8
    kind = tensor.dtype if by_code else ir.DataType.FLOAT
    if not by_code:
        ends = (ends - tensor.zero) * np.float64(tensor.scale)
    low, high = (constants.shared(end.astype(kind.numpy()), kind) for end in ends)
    clip = _node("Clip", [encode.outputs[0] if by_code else value, low, high], f"{name}_clipped", kind, value.shape)
    if by_code:
        return [encode, clip]
    encode.replace_input_with(0, clip.outputs[0])
    return [clip, encode]
