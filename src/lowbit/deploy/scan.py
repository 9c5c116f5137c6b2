"""A GRU or RNN as a Scan of MatMulInteger: no engine has an integer operator of either. `recurrent_steps` is the same.

    before         gates of all steps = q(x) · Wᵀ + b, one product for both directions
    at each step   q(h) · Rᵀ, then the gates, in float

What lies behind the end of a sequence is read as 0; these steps run too, and are left out of what is given. onnxruntime
fuses both products into DynamicQuantizeMatMul, and lays the codes of W and R out once, when it loads the file.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

from lowbit.graph.layer import number
from lowbit.graph.links import remove_node
from lowbit.graph.weights import add_constant, constant


class _Nodes:
    """Nodes in their order. The values of a body have names of their own: it sees those around it."""

    def __init__(self, graph: ir.Graph, name: str) -> None:
        self.graph, self.name, self.made = graph, name, list[ir.Node]()

    def several(self, op: str, count: int, *inputs: ir.Value | None, **attributes: Any) -> Sequence[ir.Value]:
        values = [ir.Value(name=f"{self.name}~{len(self.made)}~{index}") for index in range(count)]
        self.made.append(ir.node(op, list(inputs), attributes, outputs=values))
        return values

    def one(self, op: str, *inputs: ir.Value | None, **attributes: Any) -> ir.Value:
        return self.several(op, 1, *inputs, **attributes)[0]

    def constant(self, array: np.ndarray | np.generic) -> ir.Value:
        return add_constant(self.graph, f"{self.name}~", np.asarray(array))

    def numbers(self, *numbers: int) -> ir.Value:
        return self.constant(np.array(numbers))

    def split(self, value: ir.Value, sizes: Sequence[int], axis: int) -> Sequence[ir.Value]:
        return [value] if len(sizes) == 1 else self.several("Split", len(sizes), value, self.numbers(*sizes), axis=axis)

    def product(self, factor: ir.Value, codes: ir.Value, scale: np.ndarray, bias: np.ndarray | None) -> ir.Value:
        """q(factor) · codes · scales + bias; a scale for each column of the codes."""
        rounded, step, zero = self.several("DynamicQuantizeLinear", 3, factor)
        sums = self.one("Cast", self.one("MatMulInteger", rounded, codes, zero), to=int(ir.DataType.FLOAT))
        result = self.one("Mul", sums, self.one("Mul", step, self.constant(scale)))
        return result if bias is None else self.one("Add", result, self.constant(bias))


def run_as_scan(graph: ir.Graph, node: ir.Node, decodes: Sequence[ir.Node]) -> None:
    """Rewrite a GRU or RNN, in place, whose W and R come from these DequantizeLinear nodes, with one scale a gate."""
    written = _Recurrence(graph, node, decodes)
    results = written.results()
    graph.insert_before(node, written.nodes.made)
    remove_node(node, *results[: len(node.outputs)])
    unread = [value.producer() for value in results if not value.uses() and not value.is_graph_output()]
    graph.remove([producer for producer in unread if producer is not None], safe=True)


class _Recurrence:
    """A GRU or RNN on its way into a Scan.

    given     gates of x, for each direction and part: (time, batch, states of the part)
    scales    of R: (directions, gates)
    inner     biases that the reset multiplies too: (directions, gates)
    past      whether a step lies behind the end of its sequence, (time, batch, 1); None without lengths
    ends      whether a step is the last of its sequence
    """

    def __init__(self, graph: ir.Graph, node: ir.Node, decodes: Sequence[ir.Node]) -> None:
        self.node, self.nodes = node, _Nodes(graph, str(node.name))
        x, _, _, b, self.lengths, self.first = [*node.inputs, *[None] * 6][:6]
        assert x is not None
        (w, w_scales), (self.r, self.scales) = map(_codes_and_scales, decodes)
        self.directions, gates = self.scales.shape
        self.parts = [2, 1] if node.op_type == "GRU" else [1]  # update and reset are computed together
        self.size = gates // sum(self.parts)
        self.batch = self.nodes.one("Shape", x, start=1, end=2)
        if self.lengths is not None:
            self.past, self.ends = self._limits(x, self.lengths)
            x = self._within(x)
        held = constant(b)
        biases = np.zeros((self.directions, 2 * gates), np.float32) if held is None else held
        of_x, of_states = np.split(biases, 2, axis=1)
        self.resets_after = node.op_type == "GRU" and bool(number(node, "linear_before_reset"))
        self.inner = np.where(np.arange(gates) < (2 * self.size if self.resets_after else gates), 0, of_states)
        codes = self.nodes.one("Transpose", self.nodes.one("Flatten", w, axis=2), perm=[1, 0])
        every = self.nodes.product(x, codes, w_scales.reshape(-1), (of_x + of_states - self.inner).reshape(-1))
        self.given = self.nodes.split(every, [part * self.size for part in self.parts] * self.directions, axis=2)

    def results(self) -> list[ir.Value]:
        """The states of all steps, (time, directions, batch, states), and the last ones."""
        found = zip(*map(self._direction, range(self.directions)), strict=True)
        return [self._joined(values, axis) for values, axis in zip(found, (1, 0), strict=True)]

    def _joined(self, values: Sequence[ir.Value], axis: int) -> ir.Value:
        wide = [self.nodes.one("Unsqueeze", value, self.nodes.numbers(axis)) for value in values]
        return wide[0] if len(wide) == 1 else self.nodes.one("Concat", *wide, axis=axis)

    def _direction(self, d: int) -> tuple[ir.Value, ir.Value]:
        count, nodes = len(self.parts), self.nodes
        backwards = d == 1 or self.node.attributes.get_string("direction", "forward") == "reverse"
        given = self.given[d * count : (d + 1) * count]
        if backwards and self.lengths is not None:
            given = [self._reversed(part) for part in given]
        direction, index = int(backwards and self.lengths is None), nodes.constant(np.array(d))
        if self.first is None:
            h = nodes.one("ConstantOfShape", nodes.one("Concat", self.batch, nodes.numbers(self.size), axis=0))
        else:
            h = nodes.one("Gather", self.first, index, axis=0)
        codes = nodes.one("Transpose", nodes.one("Gather", self.r, index, axis=0), perm=[1, 0])
        body = self._body(d, codes)
        last, y = nodes.several(
            "Scan", 2, h, *given, body=body, num_scan_inputs=count, scan_input_directions=[direction] * count,
            scan_output_directions=[direction],
        )  # fmt: skip
        nodes.made[-1].name = self.node.name if d == 0 else f"{self.node.name}~{d}"
        if self.lengths is None:
            return y, last
        y = self._within(y)
        last = nodes.one("ReduceSum", nodes.one("Where", self.ends, y, self._nothing()), nodes.numbers(0), keepdims=0)
        return self._reversed(y) if backwards else y, last

    def _body(self, d: int, codes: ir.Value) -> ir.Graph:
        """One step: the states and the gates of x → the next states, twice."""
        inside = _Nodes(self.nodes.graph, f"{self.node.name}~{d}")
        floats = ir.TensorType(ir.DataType.FLOAT)
        h, *given = (ir.Value(name=f"{inside.name}~input{i}", type=floats) for i in range(len(self.parts) + 1))
        if self.node.op_type == "GRU":
            new = self._gru(inside, codes, d, h, *given)
        else:
            clip = "Relu" if "Relu" in self.node.attributes.get_strings("activations", ()) else "Tanh"
            new = inside.one(clip, inside.one("Add", given[0], inside.product(h, codes, self.scales[d], None)))
        outputs = [new, inside.one("Identity", new)]
        for value in outputs:
            value.type = floats
        return ir.Graph([h, *given], outputs, nodes=inside.made, name=inside.name)

    def _gru(
        self, inside: _Nodes, codes: ir.Value, d: int, h: ir.Value, both: ir.Value, candidate: ir.Value
    ) -> ir.Value:
        """Gates are update, reset and candidate; the reset comes before or after the candidate's product."""
        sizes, scales = [2 * self.size, self.size], self.scales[d]
        if self.resets_after:
            first, second = inside.split(inside.product(h, codes, scales, self.inner[d]), sizes, axis=1)
        else:
            own, others = self.nodes.split(codes, sizes, axis=1)
            first = inside.product(h, own, scales[: sizes[0]], None)
        gates = inside.one("Sigmoid", inside.one("Add", both, first))
        update, reset = inside.split(gates, [self.size] * 2, axis=1)
        if not self.resets_after:
            second = inside.product(inside.one("Mul", reset, h), others, scales[sizes[0] :], None)
        rest = inside.one("Mul", reset, second) if self.resets_after else second
        new = inside.one("Tanh", inside.one("Add", rest, candidate))
        return inside.one("Add", new, inside.one("Mul", update, inside.one("Sub", h, new)))

    def _limits(self, x: ir.Value, lengths: ir.Value) -> tuple[ir.Value, ir.Value]:
        nodes, one = self.nodes, self.nodes.constant(np.array(1))
        count = nodes.one("Squeeze", nodes.one("Shape", x, start=0, end=1))
        times = nodes.one("Unsqueeze", nodes.one("Range", nodes.constant(np.array(0)), count, one), nodes.numbers(1, 2))
        limits = nodes.one("Unsqueeze", nodes.one("Cast", lengths, to=int(ir.DataType.INT64)), nodes.numbers(1))
        # The first step, turned round; ReverseSequence refuses a length beyond the steps. Where it is 0, y is 0 there.
        start = nodes.one("Equal", times, nodes.one("Sub", limits, limits))
        return nodes.one("GreaterOrEqual", times, limits), self._reversed(start)

    def _within(self, value: ir.Value) -> ir.Value:
        return self.nodes.one("Where", self.past, self._nothing(), value)

    def _reversed(self, value: ir.Value) -> ir.Value:
        lengths = self.nodes.one("Cast", self.lengths, to=int(ir.DataType.INT64))
        return self.nodes.one("ReverseSequence", value, lengths, time_axis=0, batch_axis=1)

    def _nothing(self) -> ir.Value:
        return self.nodes.constant(np.float32(0))


def _codes_and_scales(decode: ir.Node) -> tuple[ir.Value, np.ndarray]:
    """Codes (directions, gates, summed) and scales (directions, gates)."""
    codes, scale, _ = decode.inputs
    assert codes is not None
    assert scale is not None
    assert scale.const_value is not None
    assert decode.outputs[0].shape is not None
    return codes, np.broadcast_to(scale.const_value.numpy(), decode.outputs[0].shape.numpy()[:2])
