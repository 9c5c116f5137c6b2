"""Is this a model that native code may safely be given? Structure only; asked before anything parses it further.

Shape inference and onnxruntime are C++: a missing input, a cycle or a wrong element count can end the process. Sizes,
paths, numbers and nesting are checked here on the plain message. onnx's checker holds each node against the definition
of its operator. (It does not judge whole models: it refuses nodes out of order and outputs without a shape, which
engines run, and accepts negative sizes.) onnx_ir finds names that nothing makes, and cycles.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from typing import Any

import onnx
import onnx_ir as ir

from lowbit.errors import InputError, UnsupportedError
from lowbit.graph.check_attributes import impossible_attribute
from lowbit.graph.check_tensors import check_shape, check_tensor
from lowbit.graph.opset import OLDEST_OPSET

DEEPEST_NESTING = 24


@dataclass
class _Check:
    """What all parts of one check share."""

    source: str
    folder: Path | None
    opsets: dict[str, int]
    functions: set[tuple[str, str]] = field(default_factory=set)

    @cached_property
    def context(self) -> onnx.checker.C.CheckerContext:
        """What onnx's checker must know of the model; it counts opsets in 32 bits."""
        context = onnx.checker.C.CheckerContext()
        context.ir_version = onnx.IR_VERSION
        context.opset_imports = {domain: min(version, (1 << 31) - 1) for domain, version in self.opsets.items()}
        return context

    def refuse(self, reason: str) -> InputError:
        return InputError(f"{self.source}: {reason}")


def check_model(proto: onnx.ModelProto, source: str, folder: Path | None = None) -> None:
    """InputError (one line: source, what, where) unless onnx_ir may read the message.

    folder   where external data may lie; None where the model came as bytes
    """
    if not proto.HasField("graph"):
        raise InputError(f"{source}: not an ONNX model (it has no graph).")
    _refuse_broken_text(proto, source)
    check = _Check(source, folder, _opsets(proto.opset_import, source))
    version = check.opsets.get("", None)
    if version is None and any(node.domain in ("", "ai.onnx") for node in proto.graph.node):
        raise check.refuse("no opset is declared for the default domain.")
    if version is not None and version < OLDEST_OPSET:
        raise check.refuse(f"opset {version}; lowbit reads opset {OLDEST_OPSET} and newer. Export the model again.")
    newest = onnx.defs.onnx_opset_version()
    if version is not None and version > newest:
        raise check.refuse(f"opset {version} is newer than the installed onnx package knows ({newest}).")
    _check_functions(proto.functions, check)
    if not proto.graph.output:
        raise check.refuse("the graph has no outputs.")
    if not proto.graph.node:
        raise check.refuse("the graph has no nodes: there is nothing to run.")
    _check_graph(proto.graph, check, depth=0)


def check_wiring(program: ir.Model, source: str) -> None:
    """InputError unless every value that is read is made, by a node that does not wait for itself; sorts the nodes."""
    for graph in program.graphs():
        for node in graph:
            if lost := next((value for value in node.inputs if value is not None and not _is_made(value)), None):
                what = f"node '{node.name}' ({node.op_type}) reads '{lost.name}', which nothing makes"
                raise InputError(f"{source}: {what}.")
        if lost := next((value for value in graph.outputs if not _is_made(value)), None):
            raise InputError(f"{source}: the output '{lost.name}' is made by no node.")
    wholes: list[ir.Graph | ir.Function] = [program.graph, *program.functions.values()]
    for whole in wholes:
        try:
            whole.sort()
        except ValueError:
            raise InputError(f"{source}: the graph has a cycle: {_cycle(whole)}.") from None


def _is_made(value: ir.Value) -> bool:
    return value.producer() is not None or value.is_graph_input() or value.is_initializer()


def _cycle(graph: ir.Graph | ir.Function) -> str:
    try:
        TopologicalSorter({node: node.predecessors() for node in graph}).prepare()
    except CycleError as error:
        node = next(node for node in graph if node in error.args[1])
        return f"node '{node.name}' ({node.op_type}) waits for its own result"
    return "a node waits for its own result, by way of a subgraph"


def _refuse_broken_text(message: Any, source: str) -> None:
    """A string that is not UTF-8 is handed out as bytes by protobuf; no name may be one."""
    for field_, value in message.ListFields():
        if field_.message_type is not None:
            for inner in value if field_.is_repeated else (value,):
                _refuse_broken_text(inner, source)
        elif field_.type == field_.TYPE_STRING:
            for text in value if field_.is_repeated else (value,):
                if not isinstance(text, str):
                    raise InputError(f"{source}: damaged: '{field_.name}' is {text[:40]!r}, which is not text.")


def _opsets(imports: Iterable[onnx.OperatorSetIdProto], source: str) -> dict[str, int]:
    opsets: dict[str, int] = {}
    for entry in imports:
        domain = "" if entry.domain == "ai.onnx" else entry.domain
        if opsets.get(domain, entry.version) != entry.version:
            raise InputError(f"{source}: two opsets are declared for the domain '{domain}'.")
        opsets[domain] = entry.version
    return opsets


def _check_functions(functions: Iterable[onnx.FunctionProto], check: _Check) -> None:
    calls: dict[tuple[str, str], set[tuple[str, str]]] = {}
    for function in functions:
        key = (function.domain, function.name)
        if key in calls:
            raise check.refuse(f"the function '{function.name}' is defined twice.")
        calls[key] = {(node.domain, node.op_type) for node in function.node}
    check.functions = set(calls)
    for function in functions:
        inner = _Check(check.source, check.folder, _opsets(function.opset_import, check.source), check.functions)
        where = f"function '{function.name}'"
        _refuse_twice(function.input, inner, where, "inputs")
        _refuse_twice(function.output, inner, where, "outputs")
        _refuse_made_twice(function.node, set(function.input), inner, where)
        _check_nodes(function.node, inner, depth=1, where=where, in_function=True)
    try:
        TopologicalSorter({key: called & set(calls) for key, called in calls.items()}).prepare()
    except CycleError as error:
        raise check.refuse(f"the function '{error.args[1][0][1]}' calls itself.") from None


def _check_graph(graph: onnx.GraphProto, check: _Check, depth: int) -> None:
    where = f"graph '{graph.name}'" if graph.name else "the graph"
    if depth > DEEPEST_NESTING:
        raise check.refuse(f"graphs are nested deeper than {DEEPEST_NESTING}.")
    if graph.sparse_initializer:
        raise UnsupportedError(f"{check.source}: sparse initialisers; store the weights densely.")
    inputs, stored = [port.name for port in graph.input], [tensor.name for tensor in graph.initializer]
    if "" in (*inputs, *stored):
        raise check.refuse(f"{where} has an input or an initialiser without a name.")
    _refuse_twice(inputs, check, where, "inputs")
    _refuse_twice(stored, check, where, "initialisers")
    _refuse_twice([port.name for port in graph.output], check, where, "outputs")
    _refuse_made_twice(graph.node, {*inputs, *stored}, check, where)
    for port in graph.output:
        if depth == 0 and port.HasField("type"):
            _check_type(port, check)
    for port in graph.input:
        if depth == 0 or port.HasField("type"):
            _check_type(port, check)
        if depth == 0 and not port.type.HasField("tensor_type"):
            kind = str(port.type.WhichOneof("value")).replace("_", " ")
            raise UnsupportedError(f"{check.source}: the input '{port.name}' is a {kind}; lowbit feeds plain tensors.")
    for tensor in graph.initializer:
        check_tensor(tensor, check.folder, f"{check.source}: initialiser '{tensor.name}'")
    _check_nodes(graph.node, check, depth, where)


def _refuse_twice(names: Iterable[str], check: _Check, where: str, what: str) -> None:
    if twice := [name for name, count in Counter(names).items() if count > 1]:
        raise check.refuse(f"{where} has two {what} named '{twice[0]}'.")


def _refuse_made_twice(nodes: Iterable[onnx.NodeProto], given: set[str], check: _Check, where: str) -> None:
    made = set(given)
    for node in nodes:
        for output in filter(None, node.output):
            if output in made:
                raise check.refuse(f"{where}: '{output}' is produced twice (node '{node.name}', {node.op_type}).")
            made.add(output)


def _check_type(port: onnx.ValueInfoProto, check: _Check) -> None:
    kind = port.type.WhichOneof("value")
    if kind != "tensor_type":
        if kind is None:
            raise check.refuse(f"'{port.name}' has no type.")
        return
    tensor = port.type.tensor_type
    dims = [dim.dim_value for dim in tensor.shape.dim if dim.HasField("dim_value")]
    check_shape(dims, tensor.elem_type, f"{check.source}: '{port.name}'")


def _check_nodes(
    nodes: Iterable[onnx.NodeProto], check: _Check, depth: int, where: str, in_function: bool = False
) -> None:
    for node in nodes:
        label = f"{where}: node '{node.name}' ({node.op_type})"
        _check_node(node, check, label, in_function)
        for attribute in node.attribute:
            for tensor in [attribute.t] if attribute.HasField("t") else attribute.tensors:
                check_tensor(tensor, check.folder, f"{check.source}: attribute '{attribute.name}' of '{node.name}'")
            if attribute.sparse_tensors or attribute.HasField("sparse_tensor"):
                raise UnsupportedError(f"{check.source}: node '{node.name}' holds a sparse tensor.")
            for graph in [attribute.g] if attribute.HasField("g") else attribute.graphs:
                _check_graph(graph, check, depth + 1)


def _check_node(node: onnx.NodeProto, check: _Check, label: str, in_function: bool) -> None:
    """Inputs, outputs and attributes as the operator's definition has them, and numbers that it can mean."""
    if not in_function and any(attribute.ref_attr_name for attribute in node.attribute):
        raise check.refuse(f"{label} refers to an attribute of a function that it is not in.")
    if (node.domain, node.op_type) in check.functions:
        return
    try:
        onnx.checker.check_node(_bare(node), check.context)
    except onnx.checker.ValidationError as error:
        # GroupNormalization of opset 18 to 20 is deprecated: engines run it, and it is raised to that of 21.
        if "is deprecated" not in str(error) or not node.input or not all(node.input):
            raise check.refuse(f"{label}: {str(error).splitlines()[0]}") from None
    if node.domain in ("", "ai.onnx") and (wrong := impossible_attribute(node)):
        raise check.refuse(f"{label}: {wrong}.")


def _bare(node: onnx.NodeProto) -> onnx.NodeProto:
    """The node without what its tensors and graphs hold, which is checked apart, and without the alias "ai.onnx"."""
    heavy = any(attribute.HasField("t") or attribute.HasField("g") for attribute in node.attribute)
    if not heavy and node.domain != "ai.onnx":
        return node
    domain = "" if node.domain == "ai.onnx" else node.domain
    bare = onnx.NodeProto(op_type=node.op_type, domain=domain, input=node.input, output=node.output)
    for attribute in node.attribute:
        if attribute.HasField("t"):
            empty = onnx.TensorProto(name="t", data_type=onnx.TensorProto.FLOAT, dims=[0])
            bare.attribute.add(name=attribute.name, type=attribute.type, t=empty)
        elif attribute.HasField("g"):
            bare.attribute.add(name=attribute.name, type=attribute.type, g=onnx.GraphProto(name="g"))
        else:
            bare.attribute.add().CopyFrom(attribute)
    return bare
