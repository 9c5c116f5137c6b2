"""From a file of QuantizeLinear and DequantizeLinear to the integer program: one walk over the graph.

Every float value of the file is a function of codes: what DequantizeLinear gives, or an accumulator that waits for the
QuantizeLinear behind it. The float graph only says which; none of it is left in the program.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import onnx_ir as ir

from lowbit.errors import LowbitError, ModelError, UnsupportedError
from lowbit.graph.layer import RECURRENT, number
from lowbit.graph.load import read_file
from lowbit.graph.weights import constant
from lowbit.integer import forms
from lowbit.integer.bounds import check_accumulators
from lowbit.integer.decoded import decode_products
from lowbit.integer.float32 import with_float32_factors
from lowbit.integer.forms_sequences import SEQUENCES, recurrent, rescaled
from lowbit.integer.functions import FUNCTIONS, evaluate
from lowbit.integer.layout import MOVING, in_channels_last, in_order, moved, spread
from lowbit.integer.moves import run_node
from lowbit.integer.program import Add, Layer, Multiply, Program, Table
from lowbit.integer.sizes import fix_sizes
from lowbit.integer.tensors import Rounding, Tensor
from lowbit.integer.values import Array, Coded, Constant, Waiting, channels_last

AGAIN = "Quantize the float network with --target integer."


def read_program(path: Path, rounding: Rounding = "onnxruntime", sizes: Mapping[str, int] | None = None) -> Program:
    """The integer program of a file that `lowbit quantize --target integer` wrote."""
    return lower(read_file(path), rounding, sizes)


def lower(
    source: ir.Model,
    rounding: Rounding = "onnxruntime",
    sizes: Mapping[str, int] | None = None,
    outputs: Sequence[str] | None = None,
) -> Program:
    """The integer program of a network with Q/DQ; UnsupportedError names all operators that have no integer form.

    sizes     of dimensions that have only a name; the batch, the first of every input, is 1 where they do not say it
    outputs   values to give, inner ones too; None: the outputs of the network
    """
    program = source.clone()
    decode_products(program)
    fix_sizes(program, dict(sizes or {}))
    walk = _Walk(program.graph)
    for node in program.graph:
        walk.visit(node)
    if walk.wrong:
        raise UnsupportedError(f"these have no integer form: {'; '.join(walk.wrong)}. {AGAIN}")
    names = tuple(outputs or (str(v.name) for v in program.graph.outputs))
    made = walk.outputs(names)
    layers = tuple(map(with_float32_factors, walk.layers) if rounding == "onnxruntime" else walk.layers)
    lowered = Program(walk.inputs(), made, names, layers, rounding)
    beside = (replace(layer.b, name=layer.name) for layer in lowered.layers if isinstance(layer, (Add, Multiply)))
    wide = next((t.name for t in (*lowered.tensors(), *beside) if t.bits > 8), None)
    if rounding == "twice" and wide is not None:
        raise UnsupportedError(f"'{wide}' has 16-bit codes, which are rounded once. Leave out --rounding twice.")
    check_accumulators(lowered)
    return lowered


@dataclass
class _Codes:
    """The output of a QuantizeLinear; the tensor is made by the first DequantizeLinear, which has the user's name."""

    made: "Waiting | Coded | ir.Value"
    scale: float
    zero: int
    bits: int
    low: int
    high: int
    tensor: Coded | None = None


_Known = Coded | Waiting | _Codes | Constant


class _FollowsError(UnsupportedError):
    """Reads what a node before, already named, could not make."""


class _Walk:
    """The state of `lower`: what each value of the graph is in the integer program, and the layers so far."""

    def __init__(self, graph: ir.Graph) -> None:
        self.graph = graph
        self.layers: list[Layer] = []
        self.known: dict[str, _Known] = {}
        self.ports: dict[str, Tensor] = {}
        self.wrong: list[str] = []

    def visit(self, node: ir.Node) -> None:
        try:
            self._visit(node)
        except _FollowsError:
            pass
        except LowbitError as error:
            self.wrong.append(f"'{node.name}' ({node.op_type}): {error}")

    def inputs(self) -> tuple[Tensor, ...]:
        if missing := [port.name for port in self.graph.inputs if str(port.name) not in self.ports]:
            raise UnsupportedError(f"input '{missing[0]}' is not quantized. {AGAIN}")
        return tuple(self.ports[str(port.name)] for port in self.graph.inputs)

    def outputs(self, names: Sequence[str]) -> tuple[Tensor, ...]:
        found = []
        for name in names:
            if name not in self.known:
                raise ModelError(f"the integer program has no value '{name}'. There are {', '.join(self.known)}.")
            known = self.known[name]
            coded = known.tensor if isinstance(known, _Codes) else known
            if not isinstance(coded, Coded) or coded.function is not None:
                raise UnsupportedError(f"output '{name}' is computed in float. {AGAIN}")
            found.append(coded.tensor)
        return tuple(found)

    # ---- values --------------------------------------------------------------------------------------------------

    def _value(self, value: ir.Value | None) -> _Known:
        name = "" if value is None else str(value.name)
        if name not in self.known:
            array = constant(value)
            if array is None:
                if value is not None and value.is_graph_input():
                    raise UnsupportedError(f"reads the input '{name}', which is not quantized")
                raise _FollowsError(f"'{name}' has no integer form")
            few = {"int2": np.int8, "int4": np.int8, "uint2": np.uint8, "uint4": np.uint8}.get(array.dtype.name)
            self.known[name] = Constant(array if few is None else array.astype(few))
        return self.known[name]

    def _is_constant(self, value: ir.Value) -> bool:
        known = self.known.get(str(value.name))
        return isinstance(known, Constant) if known is not None else constant(value) is not None

    def _array(self, value: ir.Value | None) -> Array:
        held = self._value(value)
        if not isinstance(held, Constant):
            raise UnsupportedError("an operand that has to be a constant is computed")
        return held.real()

    def _visit(self, node: ir.Node) -> None:
        read = {i: v for i, v in enumerate(node.inputs) if v is not None}
        data = [v for v in read.values() if not self._is_constant(v)]
        name = str(node.outputs[0].name)
        if node.op_type == "DequantizeLinear":
            self.known[name] = self._decoded(node, name)
        elif not data:
            arrays = {i: np.asarray(self._array(v)) for i, v in read.items()}
            arrays = {i: a.astype(np.float32) if a.dtype == np.float64 else a for i, a in arrays.items()}
            self.known |= {str(v.name): Constant(a) for v, a in zip(node.outputs, run_node(node, arrays), strict=True)}
        elif node.op_type == "QuantizeLinear":
            self.known[name] = self._encoded(node)
        elif isinstance(first := self._value(data[0]), _Codes):
            self.known[name] = self._clipped(node, first)
        elif isinstance(waiting := next((w for v in data if isinstance(w := self._value(v), Waiting)), None), Waiting):
            self.known[name] = self._behind(node, waiting)
        else:
            self._compute(node, {i: self._value(v) for i, v in read.items()})

    # ---- quantizers ----------------------------------------------------------------------------------------------

    def _encoded(self, node: ir.Node) -> _Codes:
        value, scale = node.inputs[0], self._array(node.inputs[1])
        zero = self._array(node.inputs[2]) if len(node.inputs) > 2 else np.zeros((), np.uint8)
        if scale.size != 1:
            raise UnsupportedError("an activation with a scale for each channel")
        assert value is not None
        made = value if value.is_graph_input() else self._value(value)
        if isinstance(made, (Constant, _Codes)):
            raise UnsupportedError("quantizes what is no activation")
        bits = 8 * zero.dtype.itemsize
        half = 1 << (bits - 1)
        signed = int(zero.reshape(())) - (half if zero.dtype.kind == "u" else 0)  # codes are signed in the program
        return _Codes(made, float(scale.reshape(())), signed, bits, -half, half - 1)

    def _clipped(self, node: ir.Node, codes: _Codes) -> _Codes:
        """Codes between bounds: they have fewer bits, or a clip stood before the quantizer."""
        if node.op_type != "Clip":
            raise UnsupportedError("computes on codes as they are")
        low, high = (self._array(value) for value in node.inputs[1:3])
        half = 1 << (codes.bits - 1) if low.dtype.kind == "u" else 0
        return replace(codes, low=int(low) - half, high=int(high) - half)

    def _decoded(self, node: ir.Node, name: str) -> Coded | Constant:
        value = node.inputs[0]
        assert value is not None
        if self._is_constant(value):
            zero = self._array(node.inputs[2]) if len(node.inputs) > 2 else None
            scale, axis = self._array(node.inputs[1]), node.attributes.get_int("axis", 1)
            return Constant(self._array(value), scale, zero, axis if scale.ndim else None)
        codes = self._value(value)
        if not isinstance(codes, _Codes):
            raise UnsupportedError("decodes what holds no codes")
        if codes.tensor is None:
            codes.tensor = self._tensor(codes, name)
        return codes.tensor

    def _tensor(self, codes: _Codes, name: str) -> Coded:
        """The tensor that a QuantizeLinear makes, and the layer that computes it."""
        made = codes.made
        if isinstance(made, ir.Value):
            shape = tuple(int(d) for d in made.shape or ())  # type: ignore[arg-type]
            order = channels_last(len(shape))
            tensor = Tensor(str(made.name), tuple(shape[a] for a in order), order, codes.scale, codes.zero, codes.bits)
            if self.ports.setdefault(str(made.name), tensor) != tensor:
                raise UnsupportedError(f"input '{made.name}' is quantized in two ways")
            return Coded(tensor)
        if isinstance(made, Coded):
            return self._table(made, codes, name)
        shape = tuple(made.shape[axis] for axis in made.order)
        tensor = Tensor(name, shape, made.order, codes.scale, codes.zero, codes.bits)
        ends = (np.rint(end / codes.scale) + codes.zero for end in (made.low, made.high))
        low, high = (int(np.clip(end, codes.low, codes.high)) for end in ends)
        self.layers.append(made.finish(tensor, low, high))
        return Coded(tensor)

    def _table(self, made: Coded, codes: _Codes, name: str) -> Coded:
        before = made.tensor
        wide = max(before.bits, codes.bits) > 8
        same = (before.scale, before.zero, before.bits) == (codes.scale, codes.zero, codes.bits)
        if made.function is None and same and (codes.low, codes.high) == before.ends:
            return made  # it was quantized so already
        if made.function is None and wide:
            return rescaled(self.layers, before, name, codes.scale, codes.zero, codes.bits)
        tensor = replace(before, name=name, scale=codes.scale, zero=codes.zero, bits=codes.bits)
        table = np.clip(np.rint(made.values() / codes.scale) + codes.zero, codes.low, codes.high)
        self.layers.append(Table(name, before, tensor, table.astype(tensor.dtype)))
        return Coded(tensor)

    # ---- operators -----------------------------------------------------------------------------------------------

    def _behind(self, node: ir.Node, waiting: Waiting) -> Waiting:
        """What stands between a kernel and its QuantizeLinear: clips, and the constant that is a product's bias."""
        if node.op_type == "LeakyRelu" and number(node, "alpha", 0.01) == 1:
            return waiting  # the writer puts it where onnxruntime would fuse 16-bit codes into an 8-bit kernel
        if node.op_type in ("Relu", "Clip"):
            low, high = self._bounds(node)
            low, high = (float(np.clip(end, low, high)) for end in (waiting.low, waiting.high))
            return replace(waiting, low=low, high=high)
        added = [v for v in node.inputs if v is not None and self._is_constant(v)]
        if node.op_type in ("Add", "Sum") and waiting.add_bias is not None and len(added) == 1:
            bias = self._value(added[0])
            assert isinstance(bias, Constant)
            return waiting.add_bias(bias)
        raise UnsupportedError("reads a value that no quantizer stands on")

    def _bounds(self, clip: ir.Node) -> tuple[float, float]:
        """(lowest, highest) value that a Relu or Clip lets through."""
        if clip.op_type == "Relu":
            return 0.0, np.inf
        ends = [*clip.inputs[1:], None, None][:2]
        low, high = (d if v is None else float(self._array(v)) for v, d in zip(ends, (-np.inf, np.inf), strict=True))
        return low, high

    def _compute(self, node: ir.Node, read: dict[int, _Known]) -> None:
        name = str(node.outputs[0].name)
        data = {i: v for i, v in read.items() if isinstance(v, Coded)}
        operands = {i: v for i, v in read.items() if isinstance(v, (Coded, Constant))}
        if node.op_type in MOVING:
            constants = {i: v.real() for i, v in operands.items() if isinstance(v, Constant)}
            outputs = moved(self.layers, node, data, constants)
            self.known |= {str(v.name): coded for v, coded in zip(node.outputs, outputs, strict=True)}
        elif self._is_function(node, operands):
            first = next(iter(data.values()))
            numbers = [
                None if (v := operands.get(i)) is None else v.values() if isinstance(v, Coded) else v.real().reshape(())
                for i in range(len(node.inputs))
            ]
            self.known[name] = Coded(first.tensor, evaluate(node, numbers))
        elif node.op_type in ("MaxPool", "GlobalMaxPool"):
            layer = forms.max_pool(node, {0: in_channels_last(self.layers, data[0])})
            self.layers.append(layer)
            self.known[name] = Coded(layer.output)
        elif node.op_type in forms.OVER_POSITIONS:
            self.known[name] = forms.OVER_POSITIONS[node.op_type](
                node, operands | {0: in_channels_last(self.layers, data[0])}
            )
        elif node.op_type == "ConvTranspose":
            rank = len(data[0].shape) - 2
            strides = node.attributes.get_ints("strides", [1] * rank)
            first = spread(self.layers, in_channels_last(self.layers, data[0]), tuple(strides or ()))
            self.known[name] = forms.conv_transpose(node, operands | {0: first})
        elif node.op_type in forms.ORDERED and not (node.op_type == "MatMul" and len(data) == 2):
            as_it_lies = node.op_type == "ReduceMean"
            first = data[0] if as_it_lies else in_order(self.layers, data[0], tuple(range(len(data[0].shape))))
            self.known[name] = forms.ORDERED[node.op_type](node, operands | {0: first})
        elif node.op_type in SEQUENCES:
            self.known[name] = SEQUENCES[node.op_type](self.layers, node, operands)
        elif node.op_type in RECURRENT:
            self.known |= recurrent(self.layers, node, operands)
        elif node.op_type in ("Add", "Sum", "Sub", "Mul") and len(node.inputs) == 2:
            self.known[name] = self._elementwise(node, operands)
        else:
            raise UnsupportedError("an operator without integer form")

    def _is_function(self, node: ir.Node, operands: dict[int, Coded | Constant]) -> bool:
        """Whether it computes each value from one code: all it reads are functions of one tensor, and numbers."""
        tensors = {v.tensor.name for v in operands.values() if isinstance(v, Coded)}
        numbers = all(v.array.size == 1 for v in operands.values() if isinstance(v, Constant))
        return node.op_type in FUNCTIONS and len(tensors) == 1 and numbers

    def _elementwise(self, node: ir.Node, operands: dict[int, Coded | Constant]) -> Waiting:
        shape = tuple(int(d) for d in node.outputs[0].shape or ())  # type: ignore[arg-type]
        first = next(i for i in (0, 1) if isinstance(v := operands[i], Coded) and v.shape == shape)
        a, b = operands[first], operands[1 - first]
        assert isinstance(a, Coded)
        if any(isinstance(v, Coded) and v.function is not None for v in (a, b)):
            raise UnsupportedError("reads a value that no quantizer stands on")
        if isinstance(b, Coded):
            held, rank = b.tensor, len(shape) - len(b.shape)
            order = (*range(rank), *(axis + rank for axis in held.order))
            wide = replace(held, shape=(*(1,) * rank, *held.shape), order=order)
            b = in_order(self.layers, Coded(wide), a.tensor.order)
            if not forms.repeats(b.tensor.shape, a.tensor.shape):
                raise UnsupportedError("an operand that is repeated along inner axes")
        if node.op_type == "Mul":
            return forms.multiply(a, b)
        waiting = forms.add(a, b, -1 if node.op_type == "Sub" else 1)
        if node.op_type == "Sub" and first == 1:
            raise UnsupportedError("subtracts a larger tensor from a smaller one")
        return waiting
