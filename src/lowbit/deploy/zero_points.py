"""Zero points moved into biases: the codes stay, and the file decodes them as x + c instead of x.

OpenVINO corrects each sum of a convolution for the zero point of what it reads; a bias costs it nothing. Codes q mean
x = (q - z) · s, and q · s is x + c with c = z · s. So the layer that makes x adds c to its bias, and a layer that reads
x + c subtracts what c adds to its sums. A convolution that pads keeps the zero point, because it pads with 0.

Exact but for the rounding of a bias to units of its layer's sums.
"""

from collections.abc import Collection

import numpy as np
import onnx_ir as ir

from lowbit.graph.links import made_by, only_reader
from lowbit.graph.weights import add_constant, constant, scalar, set_constant

_LARGEST = np.iinfo(np.int32).max


def move_zero_points(program: ir.Model, integer: Collection[str]) -> None:
    """In place. Values that hold x + c have `_raised` in their names: they are not the user's any more."""
    for encode in [node for node in program.graph if node.op_type == "QuantizeLinear"]:
        decode = only_reader(encode.outputs[0])
        if decode is None or decode.op_type != "DequantizeLinear" or decode.outputs[0].is_graph_output():
            continue
        codes = _codes_of_biases(encode, decode, integer)
        for bias, moved in codes.items():
            set_constant(bias, 0, moved, f"{bias.outputs[0].name}_raised")
        if codes:
            _start_at_zero(program, encode, decode)


def _codes_of_biases(encode: ir.Node, decode: ir.Node, integer: Collection[str]) -> dict[ir.Node, np.ndarray]:
    """DequantizeLinear of a bias → its codes where x + c is decoded; empty where a neighbour cannot take c."""
    x, c = encode.inputs[0], (scalar(encode.inputs[1]) or 0.0) * (scalar(encode.inputs[2]) or 0.0)
    if x is None or only_reader(x) is not encode or not c:
        return {}
    readers = [use.node for use in decode.outputs[0].uses()]
    found: dict[ir.Node, np.ndarray] = {}
    for node, gain in ((x.producer(), np.asarray(c)), *((n, _gain(n, -c)) for n in readers)):
        layer = None if node is None else _convolution(node)
        bias = _bias(layer) if layer is not None and layer.name in integer else None
        if bias is None or gain is None:
            return {}
        codes, unit = constant(bias.inputs[0]), constant(bias.inputs[1])
        assert codes is not None
        found[bias] = found.get(bias, codes) + np.rint(gain / np.asarray(unit, np.float64))
    return found if all(np.abs(codes).max() <= _LARGEST for codes in found.values()) else {}


def _gain(reader: ir.Node, c: float) -> np.ndarray | None:
    """What c added to an input adds to each channel that the reader makes; None where that differs by position."""
    if reader.op_type == "Add":
        return np.asarray(c)
    decode = made_by(reader.inputs[1], "DequantizeLinear") if reader.op_type == "Conv" else None
    pads, auto = reader.attributes.get_ints("pads", ()), reader.attributes.get_string("auto_pad", "NOTSET")
    if decode is None or any(pads) or auto not in ("NOTSET", "VALID"):
        return None
    codes, scale = (constant(value) for value in decode.inputs[:2])
    if codes is None or scale is None or (len(decode.inputs) > 2 and np.any(constant(decode.inputs[2]))):
        return None
    return np.asarray(c * codes.sum(axis=tuple(range(1, codes.ndim)), dtype=np.float64) * scale)


def _convolution(node: ir.Node) -> ir.Node | None:
    """The layer whose bias goes into what a node makes: a convolution, or that of a term that only this Add reads."""
    if node.op_type == "Conv":
        return node
    term = _unrounded_term(node)
    return None if term is None else term.producer()


def _unrounded_term(node: ir.Node) -> ir.Value | None:
    """What a convolution hands to this Add alone."""
    terms = node.inputs if node.op_type == "Add" else ()
    for term in terms:
        if made_by(term, "Conv") is not None and only_reader(term) is node:
            return term
    return None


def _bias(layer: ir.Node) -> ir.Node | None:
    """The DequantizeLinear of constant codes that makes a layer's bias, and no other layer's."""
    value = layer.inputs[2] if len(layer.inputs) > 2 else None
    decode = None if value is None or len(value.uses()) != 1 else made_by(value, "DequantizeLinear")
    if decode is None or constant(decode.inputs[0]) is None:
        return None
    return decode if constant(decode.inputs[1]) is not None else None


def _start_at_zero(program: ir.Model, encode: ir.Node, decode: ir.Node) -> None:
    """Codes from 0, and names for what they mean now: x, what it is decoded to, and terms of sums beside it."""
    x, zero, decoded = encode.inputs[0], encode.inputs[2], decode.outputs[0]
    assert x is not None
    start = add_constant(program.graph, f"{x.name}_start", np.zeros_like(constant(zero)))
    for node in (encode, decode):
        node.replace_input_with(2, start)
    x.name, decoded.name = f"{x.name}_raised", f"{x.name}_raised_dequantized"
    for neighbour in (x.producer(), *(use.node for use in decoded.uses())):
        term = None if neighbour is None else _unrounded_term(neighbour)
        if term is not None and not str(term.name).endswith("_raised"):
            term.name = f"{term.name}_raised"
