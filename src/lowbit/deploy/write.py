"""Write a quantized network: QuantizeLinear and DequantizeLinear in the original graph, integers as initialisers.

The graph stays the user's: names of inputs, outputs and nodes are kept, and whatever is not quantized is not touched.
For a quantized value `x` the file holds `x_quantized` (integers) and `x_dequantized` (what its readers see); for a
weight `w` the initialisers `w_codes`, `w_scale`, `w_zero`; `compact` shortens these names after the proof. Source of
the operators: ONNX, QuantizeLinear-21 and DequantizeLinear-21.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from lowbit.deploy.absorb import absorb_clips
from lowbit.deploy.expand import Pool, expand
from lowbit.deploy.rewrites import gather_codes, keep_bias_apart, keep_residuals_apart
from lowbit.errors import UnsupportedError
from lowbit.numerics import QuantTensor

INTEGERS = {
    (4, True): ir.DataType.INT4,
    (4, False): ir.DataType.UINT4,
    (8, True): ir.DataType.INT8,
    (8, False): ir.DataType.UINT8,
    (16, True): ir.DataType.INT16,
    (16, False): ir.DataType.UINT16,
    (32, True): ir.DataType.INT32,
}


@dataclass(frozen=True)
class IntegerTensor:
    """One value to be written in integers: real ≈ (code − zero) · scale.

    codes       the integers of a constant; None for an activation, which is quantized where it is made
    scale       float32: a scalar, (channels,) along `axis`, or one per block of `block` elements along `axis`
    zero        integers of scale's shape
    bits        of a code: 1–8 are stored in 4 or 8 bits, up to 16 in 16; a bias has 32
    readers     (node, input index) that read the quantized value; None: all
    """

    value: str
    scale: np.ndarray
    zero: np.ndarray
    bits: int
    signed: bool
    codes: np.ndarray | None = None
    axis: int | None = None
    block: int = 0
    readers: frozenset[tuple[str, int]] | None = None

    @property
    def dtype(self) -> ir.DataType:
        """The smallest ONNX integer type that holds the codes."""
        for (bits, signed), dtype in INTEGERS.items():
            if signed == self.signed and self.bits <= bits:
                return dtype
        raise UnsupportedError(f"'{self.value}': ONNX has no integer of {self.bits} bits. Use 32 bits or fewer.")


@dataclass(frozen=True)
class ExpandedTensor:
    """A constant in any format, expanded to floats when the file is loaded; readers as in `IntegerTensor`."""

    value: str
    stored: QuantTensor
    readers: frozenset[tuple[str, int]] | None = None


def write(program: ir.Model, tensors: Iterable[IntegerTensor | ExpandedTensor]) -> ir.Model:
    """A copy of the program in which these values are stored in few bits, and integers are passed on."""
    program = program.clone()
    values = {v.name: v for v in program.graph.inputs}
    values |= {str(name): v for name, v in program.graph.initializers.items()}
    values |= {v.name: v for node in program.graph for v in node.outputs}
    pool: Pool = {}
    for tensor in tensors:
        value = values[tensor.value]
        if isinstance(tensor, ExpandedTensor):
            _write_expanded(program, value, tensor, pool)
        elif tensor.codes is not None:
            _write_constant(program, value, tensor)
        elif value.dtype is ir.DataType.FLOAT:
            _write_activation(program, value, tensor)
        else:
            raise UnsupportedError(f"'{tensor.value}' has type {value.dtype}; only float32 values are quantized.")
    keep_bias_apart(program)
    gather_codes(program)
    keep_residuals_apart(program)
    absorb_clips(program)
    _drop_unused(program)
    return program


def _initializer(program: ir.Model, name: str, array: np.ndarray, dtype: ir.DataType) -> ir.Value:
    stored = array.astype(dtype.numpy())
    tensor = ir.Tensor(stored, dtype=dtype, name=name)
    value = ir.Value(name=name, shape=ir.Shape(array.shape), type=ir.TensorType(dtype), const_value=tensor)
    program.graph.register_initializer(value)
    return value


def _parameters(program: ir.Model, name: str, tensor: IntegerTensor) -> tuple[ir.Value, ir.Value]:
    return (
        _initializer(program, f"{name}_scale", np.asarray(tensor.scale, np.float32), ir.DataType.FLOAT),
        _initializer(program, f"{name}_zero", np.asarray(tensor.zero), tensor.dtype),
    )


def _attributes(tensor: IntegerTensor) -> dict[str, int]:
    attributes = {} if tensor.axis is None else {"axis": tensor.axis}
    return attributes | ({"block_size": tensor.block} if tensor.block else {})


def _node(
    op_type: str, inputs: list[ir.Value], name: str, dtype: ir.DataType, shape: ir.Shape | None, **attributes: int
) -> ir.Node:
    output = ir.Value(name=name, shape=shape, type=ir.TensorType(dtype))
    return ir.node(op_type, inputs, attributes, outputs=[output])


def _write_constant(program: ir.Model, value: ir.Value, tensor: IntegerTensor) -> None:
    name = str(value.name)
    assert tensor.codes is not None
    codes = _initializer(program, f"{name}_codes", tensor.codes, tensor.dtype)
    scale, zero = _parameters(program, name, tensor)
    inputs = [codes, scale] if tensor.bits > 16 else [codes, scale, zero]
    decode = _node(
        "DequantizeLinear", inputs, f"{name}_dequantized", ir.DataType.FLOAT, value.shape, **_attributes(tensor)
    )
    _replace_constant(program, value, tensor.readers, [decode])


def _write_expanded(program: ir.Model, value: ir.Value, tensor: ExpandedTensor, pool: Pool) -> None:
    expansion = expand(tensor.stored, str(value.name), f"{value.name}_dequantized", pool)
    for constant in expansion.initializers:
        program.graph.register_initializer(constant)
    _replace_constant(program, value, tensor.readers, expansion.nodes)


def _replace_constant(
    program: ir.Model, value: ir.Value, wanted: frozenset[tuple[str, int]] | None, nodes: list[ir.Node]
) -> None:
    """Let the readers of a constant read the last of these nodes instead."""
    readers = [u for u in value.uses() if wanted is None or (u.node.name, u.idx) in wanted]
    first = min((u.node for u in readers), key=list(program.graph).index)
    program.graph.insert_before(first, nodes)
    for use in readers:
        use.node.replace_input_with(use.idx, nodes[-1].outputs[0])


def _write_activation(program: ir.Model, value: ir.Value, tensor: IntegerTensor) -> None:
    name, graph = str(value.name), program.graph
    scale, zero = _parameters(program, name, tensor)
    readers = [u for u in value.uses() if tensor.readers is None or (u.node.name, u.idx) in tensor.readers]
    encode = _node("QuantizeLinear", [value, scale, zero], f"{name}_quantized", tensor.dtype, value.shape)
    decode = _node(
        "DequantizeLinear", [encode.outputs[0], scale, zero], f"{name}_dequantized", ir.DataType.FLOAT, value.shape
    )
    producer = value.producer()
    if producer is None:
        first = min((u.node for u in readers), key=list(graph).index)
        graph.insert_before(first, [encode, decode])
    else:
        graph.insert_after(producer, [encode, decode])
    for use in readers:
        use.node.replace_input_with(use.idx, decode.outputs[0])
    if value.is_graph_output() and tensor.readers is None:
        # The name of an output is the user's: the dequantized value takes it over.
        result = decode.outputs[0]
        value.name, result.name = f"{name}_unquantized", name
        for index, output in enumerate(graph.outputs):
            if output is value:
                graph.outputs[index] = result


def _drop_unused(program: ir.Model) -> None:
    for name, value in list(program.graph.initializers.items()):
        if not value.uses() and not value.is_graph_output() and not value.is_graph_input():
            del program.graph.initializers[name]
