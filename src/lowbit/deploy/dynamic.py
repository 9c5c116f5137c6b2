"""Products whose activations are quantized at each input: integer operators in place of decoded values. Exact.

    y = (q − z) · w · (s_x · s_w) + b     q, s_x, z = DynamicQuantizeLinear(x)

as MatMulInteger or ConvInteger, Cast, Mul and Add: the form that onnxruntime fuses into DynamicQuantizeMatMul, or into
MatMulIntegerToFloat where several layers read q. An LSTM becomes its DynamicQuantizeLSTM, which quantizes by itself,
a GRU or RNN a Scan.
"""

from collections.abc import Collection

import numpy as np
import onnx_ir as ir

from lowbit.deploy.scan import run_as_scan
from lowbit.graph.layer import number
from lowbit.graph.links import made_by, remove_node
from lowbit.graph.weights import add_constant

_INTEGER = {"MatMul": "MatMulInteger", "Gemm": "MatMulInteger", "Conv": "ConvInteger"}


def multiply_integers(program: ir.Model, recurrent: Collection[str]) -> None:
    """Rewrite, in place, each layer whose weights are decoded and whose activations are quantized where it reads.

    recurrent   names of LSTMs, GRUs and RNNs that quantize their states themselves
    """
    decodes: set[ir.Node] = set()
    for node in list(program.graph):
        data, *weights = (made_by(value, "DequantizeLinear") for value in [*node.inputs, None, None, None][:3])
        if node.op_type in _INTEGER and data is not None and weights[0] is not None:
            encode = made_by(data.inputs[0], "DynamicQuantizeLinear")
            if encode is not None:
                _multiply(program.graph, node, encode, weights[0])
                decodes |= {data, weights[0]}
        elif node.name in recurrent and (found := [w for w in weights if w is not None]):
            if node.op_type == "LSTM":
                _run_lstm(program, node)
            else:
                run_as_scan(program.graph, node, found)
            decodes |= set(found)
    program.graph.remove([decode for decode in decodes if not decode.outputs[0].uses()], safe=True)


def _multiply(graph: ir.Graph, node: ir.Node, encode: ir.Node, decode: ir.Node) -> None:
    codes, scale, zero = decode.inputs
    assert codes is not None
    assert zero is not None
    assert zero.const_value is not None
    bias = node.inputs[2] if len(node.inputs) > 2 else None
    made: list[ir.Node] = []

    def add(op: str, *inputs: ir.Value | None, **attributes: int) -> ir.Value:
        made.append(ir.node(op, list(inputs), attributes))
        return made[-1].outputs[0]

    if number(node, "transB"):
        codes = add("Transpose", codes)
    zeros = [zero] if np.any(zero.const_value.numpy()) else []
    products = add(_INTEGER[node.op_type], encode.outputs[0], codes, encode.outputs[2], *zeros)
    made[-1].name = node.name
    if node.op_type == "Conv":
        made[-1].attributes.update(node.attributes)
        rank = decode.outputs[0].shape.rank() - 2  # type: ignore[union-attr]
        scale, bias = (_along_channels(graph, value, rank) for value in (scale, bias))
    result = add("Mul", add("Cast", products, to=int(ir.DataType.FLOAT)), add("Mul", encode.outputs[1], scale))
    if bias is not None:
        result = add("Add", result, bias)
    graph.insert_before(node, made)
    remove_node(node, result)


def _along_channels(graph: ir.Graph, value: ir.Value | None, axes: int) -> ir.Value | None:
    """(n,) → (n, 1, …), with as many positions as a convolution has."""
    if value is None or value.const_value is None or not value.const_value.numpy().ndim:
        return value
    return add_constant(graph, f"{value.name}_channels", value.const_value.numpy().reshape(-1, *[1] * axes))


def _run_lstm(program: ir.Model, node: ir.Node) -> None:
    """LSTM → DynamicQuantizeLSTM: weights turned to (direction, inputs, gates), a scale and a zero for each gate."""
    program.graph.opset_imports["com.microsoft"] = 1
    inputs: list[ir.Value | None] = [*node.inputs, *[None] * (8 - len(node.inputs))]
    for index in (1, 2):
        decode = made_by(node.inputs[index], "DequantizeLinear")
        assert decode is not None
        codes, scale, _ = decode.inputs
        assert codes is not None
        assert scale is not None
        assert scale.const_value is not None
        directions, gates, _ = decode.outputs[0].shape.numpy()  # type: ignore[union-attr]
        turn = ir.node("Transpose", [codes], {"perm": [0, 2, 1]})
        program.graph.insert_before(node, [turn])
        scales = np.broadcast_to(scale.const_value.numpy(), (directions, gates))
        inputs[index] = turn.outputs[0]
        inputs.append(add_constant(program.graph, f"{scale.name}_gates", scales))
        inputs.append(add_constant(program.graph, f"{scale.name}_zeros", np.zeros((directions, gates), np.int8)))
    for index, value in enumerate(inputs):
        if index >= len(node.inputs):
            node.resize_inputs(index + 1)
        node.replace_input_with(index, value)
    node.op_type, node.domain = "DynamicQuantizeLSTM", "com.microsoft"
    node.attributes.pop("layout", None)
