"""A layer with a weight: one table of operators, one description of a node. Whoever asks what a layer is reads it here.

A linear layer's output channel o is Σ_i weight(o, i) · input channel i + bias(o), summed over a kernel too where there
is one. A new linear operator is one row of LAYERS.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any, Literal

import numpy as np
import onnx_ir as ir

from lowbit.graph.links import only_reader
from lowbit.graph.weights import constant, float_constant, set_constant


@dataclass(frozen=True)
class Kind:
    """How an operator reads its weights.

    weights      inputs that may hold a weight
    output_axis  of a weight, whose elements make different outputs
    summed_axis  of a weight, along which products are summed; groups lie on axis 0 too, whichever axis that is
    reads        what a linear operator multiplies with its weight: "channels" of each position, or "windows" of
                 positions; "scattered": each input adds to a window of outputs. None: the operator is not linear
    bias         input that may hold the bias; None: only an Add behind the operator can
    transposed   attribute that swaps the two axes
    channels     axis of the channels in what a linear operator reads and makes
    """

    weights: tuple[int, ...]
    output_axis: int
    summed_axis: int
    reads: Literal["channels", "windows", "scattered"] | None = None
    bias: int | None = None
    transposed: str = ""
    channels: int = 1


LAYERS: Mapping[str, Kind] = MappingProxyType(
    {
        "Conv": Kind((1,), 0, 1, "windows", bias=2),
        "ConvTranspose": Kind((1,), 1, 0, "scattered", bias=2),
        "Gemm": Kind((1,), 1, 0, "channels", bias=2, transposed="transB"),
        "MatMul": Kind((1,), -1, -2, "channels", channels=-1),
        "Gather": Kind((0,), 0, 1),
        "LSTM": Kind((1, 2), 1, 2),
        "GRU": Kind((1, 2), 1, 2),
        "RNN": Kind((1, 2), 1, 2),
    }
)
MULTIPLYING = LAYERS.keys() - {"Gather"}  # it only looks its weight up
RECURRENT = frozenset({"LSTM", "GRU", "RNN"})
OVER_POSITIONS = {op for op, kind in LAYERS.items() if kind.reads in ("windows", "scattered")}  # channels on axis 1


@dataclass(frozen=True)
class Layer:
    """A node and one constant weight that it reads.

    index                     input of the node that holds the weight
    kind                      the operator's row in LAYERS
    output_axis, summed_axis  of this weight, counted from the front
    add                       of a MatMul: the Add of a constant bias behind it, if there is one
    """

    node: ir.Node
    index: int
    kind: Kind
    output_axis: int
    summed_axis: int
    add: ir.Node | None = None

    @property
    def value(self) -> ir.Value:
        """The weight's ONNX value."""
        value = self.node.inputs[self.index]
        assert value is not None
        return value

    @property
    def weight(self) -> np.ndarray:
        array = constant(self.value)
        assert array is not None
        return array

    # ---- of a linear layer ---------------------------------------------------------------------------------------

    @property
    def groups(self) -> int:
        """Of a convolution: an input channel only reaches the outputs of its own group."""
        return int(number(self.node, "group", 1))

    @property
    def output(self) -> ir.Value:
        """What the layer makes, its bias included."""
        return (self.add or self.node).outputs[0]

    @property
    def outputs(self) -> int:
        return self._channels(self.output_axis)

    @property
    def inputs(self) -> int:
        return self._channels(self.summed_axis)

    def _channels(self, axis: int) -> int:
        return int(self.weight.shape[axis]) * (self.groups if axis else 1)

    @property
    def beta(self) -> float:
        """A Gemm's factor of the bias."""
        return number(self.node, "beta", 1)

    @property
    def bias_input(self) -> tuple[ir.Node, int] | None:
        """Node and input that hold the bias or can get one; None where none can."""
        if self.add is not None:
            return self.add, next(i for i, value in enumerate(self.add.inputs) if constant(value) is not None)
        return None if self.kind.bias is None else (self.node, self.kind.bias)

    @property
    def bias_value(self) -> ir.Value | None:
        """The bias's ONNX value, if there is one."""
        node, index = self.bias_input or (self.node, len(self.node.inputs))
        return node.inputs[index] if index < len(node.inputs) else None

    @property
    def has_own_bias(self) -> bool:
        """Whether its bias, if it has one, is one number an output that nobody else reads."""
        value, array = self.bias_value, constant(self.bias_value)
        return value is None or (array is not None and array.shape == (self.outputs,) and len(value.uses()) == 1)

    @property
    def bias(self) -> np.ndarray:
        """What is added, beta included: float64, (outputs,); zeros where the layer has no bias."""
        array = constant(self.bias_value)
        if array is None:
            return np.zeros(self.outputs)
        return np.broadcast_to(array.astype(np.float64).reshape(-1) * self.beta, (self.outputs,)).copy()

    def by_group(self) -> np.ndarray:
        """float64, (groups, outputs of a group, inputs of a group, kernel)."""
        return np.asarray(by_group(self.weight.astype(np.float64), self.groups, self.output_axis))

    def grouped(self, like: Any) -> Any:
        """An array or a tensor of the weight's shape as `by_group` has it."""
        return by_group(like, self.groups, self.output_axis)

    def by_output(self) -> np.ndarray:
        """float64, (output channels, everything else)."""
        return self.by_group().reshape(self.outputs, -1)

    def by_input(self) -> np.ndarray:
        """float64, (input channels, everything else)."""
        return self.by_group().swapaxes(1, 2).reshape(self.inputs, -1)

    def scale_outputs(self, factor: np.ndarray, shift: np.ndarray | None = None) -> None:
        """output ← factor · output + shift, written into weight and bias; factor and shift are (outputs,)."""
        bias = self.bias * factor + (0 if shift is None else shift)
        self._store(self.by_group() * factor.reshape(self.groups, -1, 1, 1))
        if shift is not None or bias.any():
            self.set_bias(bias)

    def scale_inputs(self, factor: np.ndarray) -> None:
        """The weight that reads input channel i is multiplied by factor[i]; factor is (inputs,)."""
        self._store(self.by_group() * factor.reshape(self.groups, 1, -1, 1))

    def response(self, values: np.ndarray) -> np.ndarray:
        """What constant input channels add to each output where nothing is padded; (inputs,) → (outputs,)."""
        added = np.einsum("goi,gi->go", self.by_group().sum(3), values.reshape(self.groups, -1))
        return np.asarray(number(self.node, "alpha", 1) * added.reshape(-1))

    def set_bias(self, bias: np.ndarray) -> None:
        """Replace the bias, or give the layer one; float64 (outputs,), beta included."""
        assert self.bias_input is not None, f"'{self.node.name}' can have no bias"
        array = bias / self.beta
        missing = self.bias_value is None
        set_constant(*self.bias_input, array.astype(self.weight.dtype) if missing else array, f"{self.value.name}.bias")

    def pads(self) -> bool:
        """Whether outputs at the border sum fewer inputs: constant input channels then do not add the same to all."""
        auto, pads = self.node.attributes.get("auto_pad"), self.node.attributes.get("pads")
        padded = auto is not None and auto.as_string() not in ("NOTSET", "VALID")
        return self.kind.reads == "scattered" or padded or (pads is not None and any(pads.as_ints()))

    def channel_axis(self, value: ir.Value | None) -> int | None:
        """Axis of the channels in what the layer reads or makes; None where its rank is not known."""
        if self.kind.channels >= 0:
            return self.kind.channels
        return None if value is None or value.shape is None else int(value.shape.rank()) + self.kind.channels

    def _store(self, grouped: np.ndarray) -> None:
        weight = of_groups(grouped, self.weight.shape, self.output_axis)
        set_constant(self.node, self.index, np.asarray(weight), f"{self.value.name}.{self.node.name}")


def by_group(weight: Any, groups: int, output_axis: int) -> Any:
    """A linear layer's weight as (groups, outputs of a group, inputs of a group, kernel); an array or a tensor."""
    split = weight.reshape(groups, weight.shape[0] // groups, weight.shape[1], -1)
    return split.swapaxes(1, 2) if output_axis else split


def of_groups(grouped: Any, shape: tuple[int, ...], output_axis: int) -> Any:
    """The inverse of `by_group`."""
    return (grouped.swapaxes(1, 2) if output_axis else grouped).reshape(shape)


def layers_of(node: ir.Node) -> Iterator[Layer]:
    """A description for each constant float weight of a node."""
    kind = LAYERS.get(node.op_type) if node.domain in ("", "ai.onnx") else None
    for index in () if kind is None else kind.weights:
        array = float_constant(node.inputs[index]) if index < len(node.inputs) else None
        if kind is not None and array is not None and array.ndim:
            axes = kind.output_axis % array.ndim, kind.summed_axis % array.ndim
            yield Layer(node, index, kind, *(axes[::-1] if number(node, kind.transposed) else axes))


def linear_layer(node: ir.Node | None) -> Layer | None:
    """The node as a linear layer, or None where it is none, or where its weight or bias is computed or of no use."""
    layer = None if node is None else next(layers_of(node), None)
    if node is None or layer is None or layer.kind.reads is None or layer.weight.ndim < 2:
        return None
    if constant(node.inputs[0]) is not None or number(node, "transA") or layer.beta == 0:
        return None
    if layer.kind.bias is None:
        return replace(layer, add=_bias_add(layer)) if layer.weight.ndim == 2 else None
    bias = constant(layer.bias_value)
    if layer.bias_value is not None and (bias is None or not _is_vector(bias, 1, layer.outputs)):
        return None
    return layer


def linear_before(value: ir.Value | None) -> Layer | None:
    """The linear layer that makes the value, its bias included, or None."""
    producer = None if value is None else value.producer()
    makers = [] if producer is None else [producer, *(v.producer() for v in producer.inputs if v is not None)]
    layers = (linear_layer(maker) for maker in makers)
    return next((layer for layer in layers if layer is not None and layer.output is value), None)


def layer_names(node: ir.Node) -> tuple[str, ...]:
    """What a rule may call this layer: node name, weight names with and without '.weight', 'op:Type'.

    'at:input' is a layer with no other before it, and 'at:output' one with none behind it; so are nodes without weights
    that lie further out. 'at:residual' is an Add of two values, a Relu or Clip behind it, and a
    layer whose output it reads.
    """
    names = [node.name or ""]
    for index in LAYERS[node.op_type].weights if node.op_type in LAYERS else ():
        weight = node.inputs[index] if index < len(node.inputs) else None
        if weight is not None and weight.const_value is not None and weight.name:
            names += [weight.name, weight.name.removesuffix(".weight")]
    names += [word for word, step in _ENDS.items() if not _has_layers(node, step)]
    clips = node.op_type == "Relu" or (node.op_type == "Clip" and len(node.inputs) > 1)
    beside = _behind(node) if _has_weight(node) else _before(node) if clips else ()
    if adds_residual(node) or any(map(adds_residual, beside)):
        names.append("at:residual")
    return (*names, f"op:{node.op_type}")


def state_names(layer: ir.Node, state: str) -> tuple[str, ...]:
    """What a rule may call a state of a recurrent layer: 'state:', a name of the layer, and '.h' or '.c'."""
    return tuple(f"state:{name}.{state}" for name in layer_names(layer))


def adds_residual(node: ir.Node) -> bool:
    """Whether a node adds two values, neither a constant."""
    return node.op_type == "Add" and all(v is not None and v.const_value is None for v in node.inputs)


def _before(node: ir.Node) -> Iterator[ir.Node]:
    yield from (maker for value in node.inputs if value is not None and (maker := value.producer()) is not None)


def _behind(node: ir.Node) -> Iterator[ir.Node]:
    yield from (use.node for value in node.outputs for use in value.uses())


_ENDS = MappingProxyType({"at:input": _before, "at:output": _behind})


def _has_weight(node: ir.Node) -> bool:
    at = LAYERS[node.op_type].weights if node.op_type in LAYERS else ()
    return any(i < len(node.inputs) and (v := node.inputs[i]) is not None and v.const_value is not None for i in at)


def _has_layers(node: ir.Node, step: Callable[[ir.Node], Iterator[ir.Node]]) -> bool:
    """Whether layers lie in this direction: one is enough, or two for a node without weights, one behind the other.

    A Clip without bounds is a copy that layers read (pass 'split_residuals'), and is as far out as they are.
    """
    wanted = 1 if _has_weight(node) or (node.op_type == "Clip" and len(node.inputs) == 1) else 2
    seen: dict[ir.Node, int] = {}
    todo = [(node, 0)]
    while todo:
        here, passed = todo.pop()
        for other in step(here):
            count = passed + _has_weight(other)
            if count >= wanted:
                return True
            if seen.get(other, -1) < count:
                seen[other] = count
                todo.append((other, count))
    return False


def number(node: ir.Node, name: str, default: float = 0) -> float:
    """An attribute of one number."""
    attribute = node.attributes.get(name)
    return default if attribute is None else float(attribute.value)


def _bias_add(layer: Layer) -> ir.Node | None:
    """The Add of one constant number an output, if nobody else reads the products."""
    add = only_reader(layer.node.outputs[0])
    if add is None or add.op_type != "Add":
        return None
    bias = next((array for array in map(constant, add.inputs) if array is not None), None)
    return add if bias is not None and _is_vector(bias, layer.outputs) else None


def _is_vector(array: np.ndarray, *sizes: int) -> bool:
    return array.size in sizes and max(array.shape[:-1], default=1) == 1
