"""The same program in fewer bytes: short names where nobody reads them, no notes, nothing that an engine infers. Exact.

Of a quantized network of 50 kB half is graph. Names of inputs, outputs and nodes stay, and so do the names of the
user's values: the quantized weight `w` is now the initialiser `w`, the value `x` is what its readers see after
quantization. Whatever lowbit put in between has a name of one or two letters.
"""

from collections.abc import Container, Iterator, Mapping
from itertools import count, product
from string import ascii_letters

import numpy as np
import onnx
import onnx_ir as ir
from onnx_ir.passes import common

from lowbit.graph.fold import quiet
from lowbit.graph.notes import drop_notes
from lowbit.graph.weights import drop_unread

_SMALL = 1 << 14  # larger constants are not compared: hashing them takes time and they are rarely equal
_NODE_BYTES = 32  # that a node of two inputs takes in a file
_STANDARD = ("", "ai.onnx")
# Said in the operators' descriptions, not in their schemas: one along each axis, no padding.
_ALONG_AXES = {"strides": 1, "dilations": 1, "pads": 0}


def compact(written: ir.Model, original: ir.Model) -> ir.Model:
    """A copy of the written program that computes the same bits.

    original   the program before integers were put in: its names are the user's
    """
    program = written.clone()
    drop_notes(program)
    _multiply_bias_scales(program)
    with quiet():
        # Small initialisers that hold the same become one: scales in front of and behind a pooling.
        common.DeduplicateInitializersPass(_SMALL)(program)
    _drop_inferable(program)
    _drop_default_attributes(program)
    _shorten_names(program, original)
    return program


def _multiply_bias_scales(program: ir.Model) -> None:
    """The scales of a bias, those of its layer's input and weight multiplied, are computed when the file is loaded.

    Only where float32 gives the same bits. onnxruntime and OpenVINO fold the product before they look for integer
    layers: same kernels, same outputs; 7 % of a keyword network's file, 3 % of MobileNet 0.25's.
    """
    for node in list(program.graph):
        scaled = [found for value in node.inputs[:3] if (found := _scale(value)) is not None]
        if len(scaled) < 3:
            continue
        (_, data, data_scale), (_, weight, weight_scale), (decode, _, scale) = scaled
        if scale.nbytes > _NODE_BYTES and np.array_equal(data_scale * weight_scale, scale):
            multiply = ir.node("Mul", [data, weight])
            program.graph.insert_before(decode, multiply)
            decode.replace_input_with(1, multiply.outputs[0])
    drop_unread(program)


def _scale(value: ir.Value | None) -> tuple[ir.Node, ir.Value, np.ndarray] | None:
    """The DequantizeLinear that a value comes from, and its scale where that is a constant."""
    decode = None if value is None else value.producer()
    scale = decode.inputs[1] if decode is not None and decode.op_type == "DequantizeLinear" else None
    if decode is None or scale is None or scale.const_value is None:
        return None
    return decode, scale, scale.const_value.numpy()


def _drop_inferable(program: ir.Model) -> None:
    """Types of initialisers, which say theirs, and of what standard operators compute: 6 % of a file of 50 kB."""
    for graph in program.graphs():
        given = {*graph.inputs, *graph.outputs}
        results = (value for node in graph if node.domain in _STANDARD for value in node.outputs)
        for value in (*graph.initializers.values(), *results):
            if value not in given:
                value.shape, value.type = None, None


def _drop_default_attributes(program: ir.Model) -> None:
    """Attributes that say what holds without them."""
    version = program.graph.opset_imports.get("", 0)
    for node in program.graph.all_nodes():
        if node.domain not in _STANDARD or not onnx.defs.has(node.op_type, version):
            continue
        schema = onnx.defs.get_schema(node.op_type, version)
        for name, attribute in list(node.attributes.items()):
            if attribute.is_ref() or name not in schema.attributes:
                continue
            default = schema.attributes[name].default_value
            by_schema = default.type and ir.to_proto(attribute) == default
            along = name in _ALONG_AXES and all(number == _ALONG_AXES[name] for number in attribute.as_ints())
            if by_schema or along:
                del node.attributes[name]


def _shorten_names(program: ir.Model, original: ir.Model) -> None:
    """What lowbit put in has names of a letter or two; the user's names go to what now stands for the user's values."""
    users = dict.fromkeys(str(value.name) for value in _values(original))  # in order: a file has the same bytes again
    nodes = {node.name for node in original.graph.all_nodes()}
    for node in program.graph.all_nodes():
        if node.name not in nodes:
            node.name = None
    written = {str(value.name): value for value in _values(program)}
    heirs = {user: heir for user in users if (heir := _heir(user, written, users)) is not None}
    short = (name for name in _short_names() if name not in users and name not in written)
    for name, value in written.items():
        if name not in users or name in heirs:
            value.name = next(short)
    for user, value in heirs.items():
        value.name = user


def _heir(user: str, written: Mapping[str, ir.Value], users: Container[str]) -> ir.Value | None:
    """The value that takes over a user's name: a weight's codes, an activation as it is after quantization."""
    before = written.get(user)
    if before is not None and (before.is_graph_input() or before.is_graph_output() or before.is_initializer()):
        return None
    names = (name for name in (f"{user}_codes", f"{user}_dequantized") if name not in users)
    return next((written[name] for name in names if name in written), None)


def _values(program: ir.Model) -> Iterator[ir.Value]:
    for graph in program.graphs():
        yield from graph.inputs
        yield from graph.initializers.values()
        for node in graph:
            yield from node.outputs


def _short_names() -> Iterator[str]:
    """a, b, … Z, aa, ab, …"""
    for length in count(1):
        yield from map("".join, product(ascii_letters, repeat=length))
