"""Write a quantized network: QuantizeLinear and DequantizeLinear in the original graph, integers as initialisers.

The graph stays the user's: names of inputs, outputs and nodes are kept, and whatever is not quantized is not touched.
For a quantized value `x` the file holds `x_quantized` (integers) and `x_dequantized` (what its readers see); where its
range is measured at each input, `x_scale` and `x_zero` are computed as well. For a weight `w` the initialisers are
`w_codes`, `w_scale`, `w_zero`; `compact` shortens these names after the proof. Source of the operators: ONNX,
QuantizeLinear-21 and DequantizeLinear-21.
"""

import math
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from lowbit.deploy.absorb import absorb_clips
from lowbit.deploy.dynamic import multiply_integers
from lowbit.deploy.expand import Expansion, Pool, expand, has_separate_rows, kernel_type, stored_type
from lowbit.deploy.lookup import looked_up
from lowbit.deploy.rewrites import fit_kernel_of_blocks, keep_bias_apart, keep_residuals_apart
from lowbit.engines.read_back import BY_BLOCK, FLOAT
from lowbit.errors import UnsupportedError
from lowbit.graph.weights import drop_unread
from lowbit.numerics import Int, QuantTensor
from lowbit.numerics.grids import grid_table

# Values of a table that is expanded when the file is loaded, 64 kB: its rows then cost one Gather and no arithmetic.
# A character model, ms: 0.419 where rows were decoded at each call, onnxruntime's own file 0.414; now they are equal.
SMALL_TABLE = 1 << 14


@dataclass(frozen=True)
class StoredTensor:
    """A constant in codes.

    readers      (node, input index) that read the quantized value; None: all
    arithmetic   of its kernel: INTEGERS of 8 or 16 bits; BY_BLOCK, the engine's own kernel of 4-bit blocks
                 (onnxruntime's MatMulNBits); FLOAT, in any format: expanded when the file is loaded
    lift         what codes and zeros of integers are higher by in the file: half a grid makes signed ones unsigned
    """

    value: str
    stored: QuantTensor
    readers: frozenset[tuple[str, int]] | None = None
    arithmetic: str = FLOAT
    lift: int = 0


@dataclass(frozen=True)
class BiasTensor:
    """A bias in int32. codes and scale: (outputs,)"""

    value: str
    codes: np.ndarray
    scale: np.ndarray


@dataclass(frozen=True)
class ActivationTensor:
    """An activation in codes of `grid`, real ≈ (code − zero) · scale; readers and lift as in `StoredTensor`."""

    value: str
    scale: np.ndarray
    zero: np.ndarray
    grid: Int
    readers: frozenset[tuple[str, int]] | None = None
    lift: int = 0

    @property
    def dtype(self) -> ir.DataType:
        """The ONNX integers of 8 or 16 bits in which an engine computes with the codes."""
        return kernel_type(_lifted(self.grid, self.lift))

    @property
    def lifted_zero(self) -> np.ndarray:
        return np.asarray(self.zero + self.lift)

    @property
    def ends(self) -> tuple[int, int]:
        """The lowest and the highest code."""
        return self.grid.minimum + self.lift, self.grid.maximum + self.lift


@dataclass(frozen=True)
class MeasuredTensor:
    """An activation in uint8 whose range is measured at each input; readers as in `StoredTensor`."""

    value: str
    readers: frozenset[tuple[str, int]] | None = None


Tensor = StoredTensor | BiasTensor | ActivationTensor | MeasuredTensor


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
        if isinstance(tensor, StoredTensor):
            (_write_expanded if tensor.arithmetic == FLOAT else _write_decoded)(program, value, tensor, pool)
        elif isinstance(tensor, BiasTensor):
            _write_bias(program, value, tensor, pool)
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


def _lifted(grid: Int, lift: int) -> Int:
    return Int(grid.bits, grid.signed and not lift)


def _node(
    op_type: str, inputs: list[ir.Value], name: str, dtype: ir.DataType, shape: ir.Shape | None, **attributes: int
) -> ir.Node:
    output = ir.Value(name=name, shape=shape, type=ir.TensorType(dtype))
    return ir.node(op_type, inputs, attributes, outputs=[output])


def _write_decoded(program: ir.Model, value: ir.Value, tensor: StoredTensor, pool: Pool) -> None:
    """codes → DequantizeLinear. Codes of few bits become int8 first: engines fold that when they load the file.

    onnxruntime makes QLinearConv of int8 codes only; int4 codes under DequantizeLinear are decoded at each call.
    """
    stored, expansion = tensor.stored, Expansion(str(value.name), pool)
    grid, codes = stored.format.grid, np.asarray(stored.codes)
    scale, zero = np.asarray(stored.scale_values()), np.asarray(stored.zero_values()) + tensor.lift
    if tensor.arithmetic == BY_BLOCK:
        assert isinstance(grid, Int)
        dtype = stored_type(grid)
        held = expansion.constant("_codes", codes, dtype)
        axis, block = next(pair for pair in enumerate(stored.tile) if pair[1] > 1)
        attributes = {"axis": axis, "block_size": block}
    else:
        axes = [axis for axis, count in enumerate(stored.tiles) if count > 1]
        attributes = {"axis": axes[0]} if axes else {}
        scale, zero = (numbers.reshape(-1 if axes else ()) for numbers in (scale, zero))
        whole = _lifted(grid if isinstance(grid, Int) else Int(8), tensor.lift)
        dtype = kernel_type(whole)
        if isinstance(grid, Int):
            held = expansion.integers(codes.astype(np.int32) + tensor.lift, whole, "_codes", dtype)
        else:
            held = expansion.looked_up(codes, grid_table(grid).values + tensor.lift, "_codes", dtype)
    inputs = [held, expansion.constant("_scale", scale, ir.DataType.FLOAT)]
    if tensor.arithmetic != BY_BLOCK or np.any(zero):
        inputs.append(expansion.constant("_zero", zero, dtype))
    _decode(program, value, tensor.readers, expansion, inputs, attributes)


def _write_bias(program: ir.Model, value: ir.Value, tensor: BiasTensor, pool: Pool) -> None:
    expansion = Expansion(str(value.name), pool)
    codes = expansion.constant("_codes", tensor.codes, ir.DataType.INT32)
    scale = expansion.constant("_scale", tensor.scale, ir.DataType.FLOAT)
    _decode(program, value, None, expansion, [codes, scale], {"axis": 0})


def _decode(
    program: ir.Model,
    value: ir.Value,
    readers: frozenset[tuple[str, int]] | None,
    expansion: Expansion,
    inputs: list[ir.Value],
    attributes: Mapping[str, int],
) -> None:
    """Let the readers of a constant read the DequantizeLinear of its codes. inputs: codes, scale, zero"""
    decode = _node(
        "DequantizeLinear", inputs, f"{value.name}_dequantized", ir.DataType.FLOAT, value.shape, **attributes
    )
    _register(program, expansion)
    _replace_constant(program, value, readers, [*expansion.nodes, decode])


def _write_expanded(program: ir.Model, value: ir.Value, tensor: StoredTensor, pool: Pool) -> None:
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


def _write_activation(
    program: ir.Model, value: ir.Value, tensor: ActivationTensor | MeasuredTensor, pool: Pool
) -> None:
    name, graph = str(value.name), program.graph
    readers = _readers(value, tensor.readers)
    if isinstance(tensor, MeasuredTensor):
        measure = ir.node("DynamicQuantizeLinear", [value], num_outputs=3)
        nodes, (codes, scale, zero) = [measure], measure.outputs
        scale.name, zero.name = f"{name}_scale", f"{name}_zero"
    else:
        constants = Expansion(name, pool)
        scale = constants.constant("_scale", tensor.scale, ir.DataType.FLOAT)
        zero = constants.constant("_zero", tensor.lifted_zero, tensor.dtype)
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
    constants: Expansion, value: ir.Value, tensor: ActivationTensor, scale: ir.Value, zero: ir.Value
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
        ends = (ends - tensor.lifted_zero) * np.float64(tensor.scale)
    low, high = (constants.shared(end.astype(kind.numpy()), kind) for end in ends)
    clip = _node("Clip", [encode.outputs[0] if by_code else value, low, high], f"{name}_clipped", kind, value.shape)
    if by_code:
        return [encode, clip]
    encode.replace_input_with(0, clip.outputs[0])
    return [clip, encode]
