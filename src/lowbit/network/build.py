"""An ONNX program as a torch module: every node becomes a call of its row in the operator table.

Constants go where they are cheap and useful. Small integers that say a shape, an axis or a bound are written into the
call as python numbers. Float initialisers are parameters under their ONNX names, other initialisers buffers. Values
that only describe shapes (whatever is computed from `Shape` and small integer constants) stay in main memory when the
module moves to a GPU, so reading them never waits for it.
"""

import inspect
import keyword
import operator
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor, fx, nn

from lowbit.errors import ModelError, UnsupportedError
from lowbit.graph.layer import linear_layer
from lowbit.network.operators import Operator, row_of
from lowbit.network.operators_types import TORCH_TYPES, to_tensor

# What a GraphModule has of its own; a tensor under such a name would break it.
_RESERVED = {*dir(fx.GraphModule), *vars(nn.Module()), "meta"}

# torch stores these types but has no arithmetic for them; int64 wraps around alike, modulo 2**n.
_UNSIGNED = {ir.DataType.UINT16, ir.DataType.UINT32, ir.DataType.UINT64}
_TAKES_UNSIGNED = {"Cast", "CastLike", "BitCast"}

# Longer integer constants are tables, not shapes: they are buffers, and move with the module.
_LONGEST_LITERAL = 64


def build(program: ir.Model) -> fx.GraphModule:
    """The program as an fx module that runs, trains and moves between devices like any other.

    program  opset ≥ 21, nodes in order, as lowbit.load gives it

    forward takes tensors in the order of the graph's inputs, or by keyword (names made identifiers), and returns
    {output name: tensor}. node.meta["value"] is the ONNX value's name, on inputs, constants and results alike; results
    also carry meta["op"] (operator type) and meta["node"] (ONNX node name). An operator with several outputs is one
    node with "op" and "node", and one getitem node an output with all three. meta["layer"] describes a linear layer
    (graph.layer.Layer), on the call of its operator. meta["on_host"] is set on values that only describe shapes:
    whatever their type, there is nothing to quantize.
    state_dict keys are the initialisers' ONNX names; where torch cannot take a name (it is empty, has a quote, or is
    both a tensor and the prefix of another) the key is the name with "_" for what is in the way. module.meta["keys"]
    gives the key of every initialiser in use. A constant written into a call as numbers has no key.

    UnsupportedError: a node that neither the table nor onnxruntime can compute, or of an older opset, named.
    """
    wiring = _Wiring(program)
    for value in program.graph.inputs:
        if value.name not in program.graph.initializers:
            wiring.add_input(value)
    for node in program.graph:
        wiring.add_node(node)
    wiring.graph.output({str(value.name): wiring.read(value) for value in program.graph.outputs})
    module = fx.GraphModule(wiring.root, wiring.graph, program.graph.name or "Program")
    module.meta["keys"] = wiring.keys
    return module


def constant_of(value: ir.Value) -> ir.TensorProtocol | None:
    """The tensor of an initialiser or of a Constant node's output; None for what is computed."""
    producer = value.producer()
    if producer is None:
        return value.const_value if value.is_initializer() else None
    if producer.op_type != "Constant" or producer.domain not in ("", "ai.onnx"):
        return None
    if value.const_value is not None:
        return value.const_value
    (attribute,) = producer.attributes.values()
    if attribute.type == ir.AttributeType.TENSOR:
        return attribute.as_tensor()
    dtype = np.float32 if "float" in attribute.name else np.int64
    return ir.tensor(np.array(attribute.value, dtype=dtype)) if "string" not in attribute.name else None


def host_constant(values: list[Any], dtype: torch.dtype) -> Tensor:
    return torch.tensor(values, dtype=dtype)


def to_device_of(value: Tensor, reference: Tensor | list[Tensor]) -> Tensor:
    return value.to(reference[0].device if isinstance(reference, list) else reference.device)


def to_type(value: Tensor, dtype: torch.dtype) -> Tensor:
    return value.to(dtype)


@cache
def _keywords(row: Operator) -> frozenset[str]:
    """The keywords of a row's function; torch's builtins, which do not tell, stand for operators without attributes."""
    try:
        return frozenset(inspect.signature(row.function).parameters)
    except ValueError:
        return frozenset()


def _refuse_unknown(node: ir.Node, row: Operator, attributes: Iterable[str]) -> None:
    if row.forms is not None:
        return  # it has looked at them
    if unknown := set(attributes) - _keywords(row):
        raise UnsupportedError(
            f"operator {node.op_type}, node '{node.name}': attribute {', '.join(sorted(unknown))} is not of opset "
            f"21 or later. Load the model with lowbit.load, which raises older files."
        )


@dataclass
class _Wiring:
    """The fx graph under construction.

    nodes[value] computes an ONNX value; host holds the values that stay in main memory
    """

    program: ir.Model
    graph: fx.Graph = field(default_factory=fx.Graph)
    root: nn.Module = field(default_factory=nn.Module)
    nodes: dict[ir.Value, fx.Node] = field(default_factory=dict)
    host: set[ir.Value] = field(default_factory=set)
    keys: dict[str, str] = field(default_factory=dict)

    def add_input(self, value: ir.Value) -> None:
        name = _identifier(value.name or "input", {str(n.target) for n in self.nodes.values()})
        self.nodes[value] = self.graph.placeholder(name)
        self.nodes[value].meta["value"] = value.name

    def add_node(self, node: ir.Node) -> None:
        if node.op_type == "Constant" and all(constant_of(v) is not None for v in node.outputs):
            return  # read where it is used
        row = row_of(node)
        if row is None or any(v is not None and v.dtype == ir.DataType.STRING for v in node.inputs):
            self._add_engine_node(node)
            return
        arguments, on_host = self._arguments(node, row)
        attributes = {name: _literal_attribute(attribute) for name, attribute in node.attributes.items()}
        if row.type_from is not None:
            source, attribute = row.type_from
            typed = node.inputs[source] if len(node.inputs) > source else None
            if typed is not None and typed.dtype is not None and not attributes.get(attribute):
                attributes[attribute] = int(typed.dtype)
        _refuse_unknown(node, row, attributes)
        unsigned = node.op_type not in _TAKES_UNSIGNED and any(
            v is not None and v.dtype in _UNSIGNED for v in node.inputs
        )
        if unsigned:
            arguments = [self._cast(a, v, torch.int64) for a, v in zip(arguments, node.inputs, strict=True)]
        count = _asked(node)
        if count > 1 and "outputs" in _keywords(row):
            attributes["outputs"] = count
        call = self.graph.create_node("call_function", row.function, tuple(arguments), attributes, self._name(node))
        if (layer := linear_layer(node)) is not None:
            call.meta["layer"] = layer
        self._add_results(node, call, node.outputs[:count], on_host or row.on_host, unsigned)

    def _arguments(self, node: ir.Node, row: Operator) -> tuple[list[Any], bool]:
        """The call's arguments, and whether all that it computes from lies in main memory."""
        literal = {i: _literal(v) for i, v in enumerate(node.inputs) if i in row.literals and v is not None}
        tensors = [v for i, v in enumerate(node.inputs) if v is not None and i not in row.literals]
        on_device = [v for v in tensors if v not in self.host and not _small_integers(v)]
        arguments: list[Any] = []
        for i, value in enumerate(node.inputs):
            if value is None:
                arguments.append(None)
            elif literal.get(i) is not None:
                arguments.append(literal[i])
            elif i in row.literals or value in on_device or not on_device:
                arguments.append(self.read(value, on_host=not on_device, buffer=i in row.statistics))
            elif value in self.host:
                reference = self.read(on_device[0])
                arguments.append(self.graph.call_function(to_device_of, (self.read(value), reference)))
            else:
                arguments.append(self.read(value))
        return arguments, not on_device

    def _add_engine_node(self, node: ir.Node) -> None:
        # Imported here: it needs torch's compiler, 1 s and 40 MB that most networks do without.
        from lowbit.network.engine_node import engine_node

        engine, values = engine_node(node, self.program)
        target = self._place(f"engine.{node.name or node.op_type}", engine)
        inputs = tuple(self.read(value) for value in values)
        call = self.graph.create_node("call_module", target, inputs, name=self._name(node))
        self._add_results(node, call, [v for v in node.outputs if v.name], on_host=self.host.issuperset(values))

    def _cast(self, argument: Any, value: ir.Value | None, dtype: torch.dtype) -> Any:
        """An argument or result of an unsigned type as another type; anything else as it is."""
        if value is None or value.dtype not in _UNSIGNED or not isinstance(argument, fx.Node):
            return argument
        return self.graph.call_function(to_type, (argument, dtype))

    def _add_results(
        self, node: ir.Node, call: fx.Node, outputs: Sequence[ir.Value], on_host: bool, unsigned: bool = False
    ) -> None:
        call.meta.update(op=node.op_type, node=node.name)
        for i, value in enumerate(outputs):
            if not value.name or not (value.uses() or value.is_graph_output()):
                continue
            result = call
            if len(outputs) > 1:
                result = self.graph.create_node("call_function", operator.getitem, (call, i), name=value.name)
            if unsigned and value.dtype is not None:
                result = self._cast(result, value, TORCH_TYPES[value.dtype])
            result.meta.update(op=node.op_type, node=node.name)
            result.meta["value"] = value.name
            self.nodes[value] = result
            if on_host:
                result.meta["on_host"] = True
                self.host.add(value)

    def read(self, value: ir.Value, on_host: bool = False, buffer: bool = False) -> fx.Node:
        """The fx node of a value; a constant gets one at its first use, of the kind that the use needs."""
        if value in self.nodes:
            return self.nodes[value]
        constant = constant_of(value)
        if constant is None:
            raise ModelError(f"value '{value.name}' is used before any node computes it: sort the graph's nodes first.")
        if on_host and _small_integers(value):
            dtype = TORCH_TYPES[constant.dtype]
            return self.graph.call_function(host_constant, (constant.numpy().tolist(), dtype))
        if isinstance(constant, ir.ExternalTensor) and constant.dtype is ir.DataType.FLOAT and constant.size:
            tensor = _mapped(constant)
        else:
            tensor = to_tensor(constant.numpy())
        if tensor.is_floating_point() and tensor.element_size() > 1 and not buffer:
            # A single number is part of a formula (an epsilon, a scale, a mask's −3.4e38): no step may move it.
            tensor = nn.Parameter(tensor, requires_grad=tensor.dim() > 0)
        key = self._place(value.name or "constant", tensor)
        self.keys[value.name or ""] = key
        result = self.graph.create_node("get_attr", key, name=value.name)
        result.meta["value"] = value.name
        self.nodes[value] = result
        return result

    def _place(self, name: str, content: Tensor | nn.Module) -> str:
        """Put a tensor or module where its name says, in nested containers on '.', and return the key that it got."""
        parts = name.split(".")
        if not _possible(self.root, parts):
            held = {*self.root._parameters, *self.root._buffers, *self.root._modules}
            parts = [_identifier(name, held | _RESERVED)]
        container = self.root
        for part in parts[:-1]:
            if part not in container._modules:
                container.add_module(part, nn.Module())
            container = container.get_submodule(part)
        if isinstance(content, nn.Parameter):
            container.register_parameter(parts[-1], content)
        elif isinstance(content, Tensor):
            container.register_buffer(parts[-1], content)
        else:
            container.add_module(parts[-1], content)
        return ".".join(parts)

    def _name(self, node: ir.Node) -> str:
        """What the generated code calls the result: the value's name where there is one output, else the node's."""
        named = node.outputs[0].name if len(node.outputs) == 1 else node.name
        return named or node.op_type


def _mapped(tensor: ir.ExternalTensor) -> Tensor:
    """A weight that stays in its file until it is read; writing to it leaves the file alone."""
    shape = tuple(tensor.shape.numpy())
    return torch.from_numpy(np.memmap(tensor.path, np.float32, "c", tensor.offset or 0, shape or (1,)).reshape(shape))


def _possible(root: nn.Module, parts: Sequence[str]) -> bool:
    """Whether nested containers can hold a tensor under this name, and generated code can read it."""
    if (
        parts[0] in _RESERVED
        or any(map(keyword.iskeyword, parts))
        or not all(p and p.isprintable() and not set(p) & set('"\\') for p in parts)
    ):
        return False
    container: nn.Module = root
    for part in parts[:-1]:
        if part not in container._modules:
            return not hasattr(container, part)
        container = container.get_submodule(part)
    return not hasattr(container, parts[-1])


def _identifier(name: str, taken: Iterable[str]) -> str:
    """A python name like the given one that is not yet taken."""
    clean = re.sub(r"\W", "_", name)
    clean = clean if clean.isidentifier() and not keyword.iskeyword(clean) else f"_{clean}"
    while clean in taken:
        clean += "_"
    return clean


def _small_integers(value: ir.Value) -> bool:
    constant = constant_of(value)
    return constant is not None and not constant.dtype.is_floating_point() and constant.size <= _LONGEST_LITERAL


def _literal(value: ir.Value) -> Any:
    """A constant scalar or short vector as a python number or tuple; None for anything else."""
    constant = constant_of(value)
    if constant is None or constant.size > _LONGEST_LITERAL or len(constant.shape) > 1 or constant.dtype in _TEXT:
        return None
    numbers = constant.numpy().tolist()
    return tuple(numbers) if isinstance(numbers, list) else numbers


_TEXT = (ir.DataType.STRING,)


def _literal_attribute(attribute: ir.Attr) -> Any:
    """An attribute as fx takes it: numbers, text, tuples; a tensor as (its elements, its torch type)."""
    if attribute.type == ir.AttributeType.TENSOR:
        tensor = attribute.as_tensor()
        return tuple(tensor.numpy().flatten().tolist()), TORCH_TYPES[tensor.dtype]
    value = attribute.value
    return tuple(value) if isinstance(value, (list, tuple)) else value


def _asked(node: ir.Node) -> int:
    """How many outputs, up to the last that has a name."""
    return max((i + 1 for i, value in enumerate(node.outputs) if value.name), default=1)
