"""Is this a model that native code may safely be given? Structure only; asked before anything parses it further.

onnx's checker, its shape inference and onnxruntime are C++: a missing input, a cycle or a wrong element count can
take the process down. Everything here is therefore checked on the plain protobuf message first.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import onnx
import onnx_ir as ir

from lowbit.errors import InputError, UnsupportedError
from lowbit.graph.check_attributes import impossible_attribute
from lowbit.graph.check_tensors import check_shape, check_tensor
from lowbit.graph.opset import OLDEST_OPSET

DEEPEST_NESTING = 24

_ATTRIBUTE_FIELDS = {
    onnx.AttributeProto.FLOAT: "f",
    onnx.AttributeProto.INT: "i",
    onnx.AttributeProto.STRING: "s",
    onnx.AttributeProto.TENSOR: "t",
    onnx.AttributeProto.GRAPH: "g",
    onnx.AttributeProto.TYPE_PROTO: "tp",
}


@dataclass
class _Check:
    """What all parts of one check share."""

    source: str
    folder: Path | None
    opsets: dict[str, int]
    functions: set[tuple[str, str]] = field(default_factory=set)

    def refuse(self, reason: str) -> InputError:
        return InputError(f"{self.source}: {reason}")


def check_model(proto: onnx.ModelProto, source: str, folder: Path | None = None) -> None:
    """InputError (one line: source, what, where) unless the message is a well-formed ONNX model.

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
    _check_graph(proto.graph, set(), check, depth=0)


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
        names = set(function.input)
        if len(names) != len(function.input):
            raise check.refuse(f"the function '{function.name}' has two inputs of one name.")
        _check_nodes(
            function.node, names, set(names), inner, depth=1, where=f"function '{function.name}'", in_function=True
        )
        _check_outputs(function.output, names, inner, f"function '{function.name}'")
    _refuse_recursion(calls, check)


def _refuse_recursion(calls: dict[tuple[str, str], set[tuple[str, str]]], check: _Check) -> None:
    done: set[tuple[str, str]] = set()
    while ready := [key for key, called in calls.items() if key not in done and not (called & set(calls)) - done]:
        done.update(ready)
    if stuck := [name for domain, name in calls if (domain, name) not in done]:
        raise check.refuse(f"the function '{stuck[0]}' calls itself.")


def _check_graph(graph: onnx.GraphProto, outer: set[str], check: _Check, depth: int) -> None:
    where = f"graph '{graph.name}'" if graph.name else "the graph"
    if depth > DEEPEST_NESTING:
        raise check.refuse(f"graphs are nested deeper than {DEEPEST_NESTING}.")
    if graph.sparse_initializer:
        raise UnsupportedError(f"{check.source}: sparse initialisers; store the weights densely.")
    own: set[str] = set()
    for port in graph.input:
        if not port.name or port.name in own:
            raise check.refuse(f"{where} has an input without a name or two named '{port.name}'.")
        own.add(port.name)
        if depth == 0 or port.HasField("type"):
            _check_type(port, check)
        if depth == 0 and not port.type.HasField("tensor_type"):
            kind = str(port.type.WhichOneof("value")).replace("_", " ")
            raise UnsupportedError(f"{check.source}: the input '{port.name}' is a {kind}; lowbit feeds plain tensors.")
    initializers: set[str] = set()
    for tensor in graph.initializer:
        if not tensor.name or tensor.name in initializers:
            raise check.refuse(f"{where} has an initialiser without a name or two named '{tensor.name}'.")
        initializers.add(tensor.name)
        check_tensor(tensor, check.folder, f"{check.source}: initialiser '{tensor.name}'")
    names = outer | own | initializers
    _check_nodes(graph.node, names, own | initializers, check, depth, where)
    for port in graph.output:
        if depth == 0 and port.HasField("type"):
            _check_type(port, check)
    _check_outputs([port.name for port in graph.output], names, check, where)


def _check_type(port: onnx.ValueInfoProto, check: _Check) -> None:
    kind = port.type.WhichOneof("value")
    if kind != "tensor_type":
        if kind is None:
            raise check.refuse(f"'{port.name}' has no type.")
        return
    tensor = port.type.tensor_type
    try:
        dtype = ir.DataType(tensor.elem_type)
    except ValueError:
        raise check.refuse(f"'{port.name}' has the unknown element type {tensor.elem_type}.") from None
    if dtype == ir.DataType.UNDEFINED:
        raise check.refuse(f"'{port.name}' has no element type.")
    dims = [dim.dim_value for dim in tensor.shape.dim if dim.HasField("dim_value")]
    check_shape(dims, 8 if dtype == ir.DataType.STRING else dtype.bitwidth, f"{check.source}: '{port.name}'")


def _check_nodes(
    nodes: Iterable[onnx.NodeProto],
    names: set[str],
    own: set[str],
    check: _Check,
    depth: int,
    where: str,
    in_function: bool = False,
) -> None:
    """Add to `names` what the nodes produce; each name once, each input known, no node waiting for itself.

    names   all that the nodes may read: of this graph and of those around it
    own     the inputs and initialisers of this graph, which no node may produce again
    """
    waiting: list[onnx.NodeProto] = []
    produced: set[str] = set()
    for node in nodes:
        _check_node(node, check, where, in_function)
        for output in filter(None, node.output):
            if output in produced or output in own:
                raise check.refuse(f"{where}: '{output}' is produced twice (node '{node.name}', {node.op_type}).")
            produced.add(output)
        waiting.append(node)
    for node in waiting:
        for name in _reads(node):
            if name not in names and name not in produced:
                raise check.refuse(f"{where}: node '{node.name}' ({node.op_type}) reads '{name}', which nothing makes.")
    _refuse_cycles(waiting, names, produced, check, where)
    names |= produced
    for node in waiting:
        for attribute in node.attribute:
            if attribute.HasField("t"):
                check_tensor(
                    attribute.t, check.folder, f"{check.source}: attribute '{attribute.name}' of '{node.name}'"
                )
            for tensor in attribute.tensors:
                check_tensor(tensor, check.folder, f"{check.source}: attribute '{attribute.name}' of '{node.name}'")
            if attribute.sparse_tensors or attribute.HasField("sparse_tensor"):
                raise UnsupportedError(f"{check.source}: node '{node.name}' holds a sparse tensor.")
            for graph in [attribute.g] if attribute.HasField("g") else attribute.graphs:
                _check_graph(graph, set(names), check, depth + 1)


def _reads(node: onnx.NodeProto) -> set[str]:
    return {name for name in node.input if name}


def _captured(node: onnx.NodeProto) -> set[str]:
    """Names that a node's subgraphs read from the graphs around them."""
    found: set[str] = set()
    for attribute in node.attribute:
        for graph in [attribute.g] if attribute.HasField("g") else attribute.graphs:
            inside = {port.name for port in graph.input} | {tensor.name for tensor in graph.initializer}
            read = {port.name for port in graph.output}
            for inner in graph.node:
                inside.update(inner.output)
                read |= _reads(inner) | _captured(inner)
            found |= read - inside
    return found


def _refuse_cycles(nodes: list[onnx.NodeProto], names: set[str], produced: set[str], check: _Check, where: str) -> None:
    """Nodes may come in any order, but some order must run them."""
    needs = {i: {n for n in _reads(node) | _captured(node) if n in produced} for i, node in enumerate(nodes)}
    readers: dict[str, list[int]] = {}
    for index, needed in needs.items():
        for name in needed:
            readers.setdefault(name, []).append(index)
    ready = [index for index, needed in needs.items() if not needed]
    left = len(nodes)
    while ready:
        left -= 1
        for name in filter(None, nodes[ready.pop()].output):
            for reader in readers.get(name, ()):
                needs[reader].discard(name)
                if not needs[reader]:
                    ready.append(reader)
            readers.pop(name, None)
    if left:
        stuck = next(node for index, node in enumerate(nodes) if needs[index])
        raise check.refuse(f"{where} has a cycle: node '{stuck.name}' ({stuck.op_type}) waits for its own result.")


def _check_node(node: onnx.NodeProto, check: _Check, where: str, in_function: bool) -> None:
    label = f"{where}: node '{node.name}' ({node.op_type})"
    if not node.op_type:
        raise check.refuse(f"{where}: node '{node.name}' has no operator.")
    names = [attribute.name for attribute in node.attribute]
    if len(set(names)) != len(names) or "" in names:
        raise check.refuse(f"{label} has an attribute without a name or twice the same.")
    for attribute in node.attribute:
        if attribute.ref_attr_name:
            if not in_function:
                raise check.refuse(f"{label} refers to an attribute of a function that it is not in.")
            continue
        wanted = _ATTRIBUTE_FIELDS.get(attribute.type)
        if wanted is not None and not attribute.HasField(wanted):
            raise check.refuse(f"{label}: attribute '{attribute.name}' does not hold what its type declares.")
    domain = "" if node.domain == "ai.onnx" else node.domain
    if (node.domain, node.op_type) in check.functions:
        return
    if domain not in check.opsets:
        raise check.refuse(f"{label} is of the domain '{domain}', for which no opset is declared.")
    if domain == "":
        _check_signature(node, check, label)


def _check_signature(node: onnx.NodeProto, check: _Check, label: str) -> None:
    """Counts of inputs and outputs, required inputs and attributes, attribute types: as the operator defines them."""
    try:
        schema = onnx.defs.get_schema(node.op_type, check.opsets[""], "")
    except onnx.defs.SchemaError:
        raise check.refuse(f"{label} does not exist in opset {check.opsets['']}.") from None
    inputs, outputs = len(node.input), len(node.output)
    if not schema.min_input <= inputs <= schema.max_input:
        raise check.refuse(f"{label} has {inputs} inputs; the operator takes {schema.min_input} to {schema.max_input}.")
    if not schema.min_output <= outputs <= schema.max_output:
        raise check.refuse(
            f"{label} has {outputs} outputs; the operator makes {schema.min_output} to {schema.max_output}."
        )
    single = onnx.defs.OpSchema.FormalParameterOption.Single
    for index, formal in enumerate(schema.inputs):
        if formal.option == single and (index >= inputs or not node.input[index]):
            raise check.refuse(f"{label} lacks its input '{formal.name}'.")
    for attribute in node.attribute:
        known = schema.attributes.get(attribute.name)
        if known is not None and int(known.type.value) != attribute.type:
            raise check.refuse(f"{label}: attribute '{attribute.name}' has the wrong type.")
    if wrong := impossible_attribute(node):
        raise check.refuse(f"{label}: {wrong}.")
    given = {attribute.name for attribute in node.attribute}
    for name, known in schema.attributes.items():
        if known.required and name not in given:
            raise check.refuse(f"{label} lacks its attribute '{name}'.")


def _check_outputs(outputs: Iterable[str], names: set[str], check: _Check, where: str) -> None:
    seen: set[str] = set()
    for name in outputs:
        if name not in names:
            raise check.refuse(f"{where}: the output '{name}' is made by no node.")
        if name in seen:
            raise check.refuse(f"{where} has two outputs named '{name}'.")
        seen.add(name)
