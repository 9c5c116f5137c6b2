"""Rewrites that keep an engine's optimizer from undoing the integers. Each is exact, in place, on the written graph.

All were read off onnxruntime's optimized graphs (1.31, CPU) and timed there; other engines read them as the same
operations.
"""

from collections.abc import Collection

import numpy as np
import onnx_ir as ir
from onnx_ir.passes import common

from lowbit.graph.links import made_by, remove_node
from lowbit.graph.recognize import silu_input
from lowbit.graph.weights import set_constant, shared_constant


def keep_bias_apart(program: ir.Model) -> None:
    """Keep what is added behind a quantized MatMul out of a Gemm: a bias gets the rank of the output, or Add is Sum.

    onnxruntime fuses MatMul + Add into a float Gemm before it looks for quantized MatMuls, and the layer then runs
    slower than in float (128×384×1536, one thread: 1.28 ms, float 0.60; with the bias apart 0.20). It does so with a
    one-dimensional bias at any rank, (n,) → (1, …, 1, n) prevents it, and with anything added to a matrix (`as_sum`).
    """
    for node in program.graph:
        if node.op_type != "Add" or not any(_is_quantized_matmul(v) for v in node.inputs):
            continue
        for index, value in enumerate(node.inputs):
            other = node.inputs[1 - index]
            if value is None or other is None or not _is_quantized_matmul(other):
                continue
            rank = len(other.shape) if other.shape is not None else 0
            if rank <= 2:
                as_sum(program, node)
            elif value.const_value is not None and len(value.const_value.shape) == 1:
                shaped = value.const_value.numpy().reshape((1,) * (rank - 1) + (-1,))
                node.replace_input_with(index, shared_constant(program.graph, f"{value.name}_ranked", shaped))


def as_sum(program: ir.Model, add: ir.Node) -> None:
    """Write an Add as Sum: the same operation, which onnxruntime fuses with nothing but a Gemm without bias.

    Behind such a Gemm the Sum gets a third operand, 0: only a Sum of two is fused, and the Gemm would run in float.
    """
    add.op_type = "Sum"
    makers = [v.producer() for v in add.inputs if v is not None]
    if any(p is not None and p.op_type == "Gemm" and (len(p.inputs) < 3 or p.inputs[2] is None) for p in makers):
        add.resize_inputs(3)
        add.replace_input_with(2, shared_constant(program.graph, "lowbit_zero", np.zeros((), np.float32)))


def fit_kernel_of_blocks(program: ir.Model) -> None:
    """Products with weights in blocks as onnxruntime's MatMulNBits takes them: weights (K, N), no Relu or Clip behind.

    Gemm(x, wᵀ) gets its weights transposed. In front of a Relu or Clip onnxruntime looks for QuantizeLinear alone and
    leaves the product in float; Max and Min compute the same.
    """
    for node in list(program.graph):
        decode = made_by(node.inputs[1], "DequantizeLinear") if node.op_type in ("MatMul", "Gemm") else None
        if decode is None or not decode.attributes.get_int("block_size", 0):
            continue
        if node.attributes.get_int("transB", 0):
            for value in decode.inputs:
                if value is not None and value.const_value is not None:
                    tensor = value.const_value
                    turned = np.ascontiguousarray(tensor.numpy().T)
                    value.const_value = ir.Tensor(turned, dtype=tensor.dtype, name=value.name)
                    value.shape = ir.Shape(turned.shape)
            decode.attributes["axis"] = ir.AttrInt64("axis", 0)
            del node.attributes["transB"]
        readers = list(node.outputs[0].uses())
        if len(readers) == 1 and readers[0].node.op_type in ("Relu", "Clip"):
            _as_maximum(program, readers[0].node)


def _as_maximum(program: ir.Model, clip: ir.Node) -> None:
    zero = shared_constant(program.graph, "lowbit_zero", np.zeros((), np.float32)) if clip.op_type == "Relu" else None
    ends = [zero, None] if clip.op_type == "Relu" else [*clip.inputs[1:], None, None][:2]
    value = clip.inputs[0]
    nodes: list[ir.Node] = []
    for op, end in zip(("Max", "Min"), ends, strict=True):
        if end is not None:
            nodes.append(ir.node(op, [value, end], name=f"{clip.name}_{op.lower()}"))
            value = nodes[-1].outputs[0]
    if not nodes:
        return
    assert value is not None
    program.graph.insert_before(clip, nodes)
    remove_node(clip, value)


def keep_residuals_apart(program: ir.Model) -> None:
    """Write the Add in front of a LayerNormalization as Sum: the same operation, which onnxruntime does not fuse.

    Its fused SkipLayerNormalization takes 0.21 ms for 128×384, where Add and LayerNormalization take 0.04.
    """
    for node in program.graph:
        add = made_by(node.inputs[0], "Add") if node.op_type == "LayerNormalization" else None
        if add is not None and add.outputs[0].dtype == ir.DataType.FLOAT:
            as_sum(program, add)


def fuse_silu(program: ir.Model, integer: Collection[str] = ()) -> None:
    """Write x · sigmoid(x) of a decoded x as one QuickGelu of onnxruntime, which computes just that in float.

    It fuses the two itself, but not behind a DequantizeLinear: each reader of one gets a copy first, and then the two
    do not read the same x. Sigmoid and Mul take 0.4 ns a value where QuickGelu takes 0.14.
    """
    for node in list(program.graph):
        x = silu_input(node)
        if x is None or made_by(x, "DequantizeLinear") is None:
            continue
        sigmoids = [p for v in node.inputs if v is not None and v is not x and (p := v.producer()) is not None]
        silu = ir.node("QuickGelu", [x], {"alpha": 1.0}, domain="com.microsoft", name=node.name)
        program.graph.insert_before(node, [silu])
        remove_node(node, silu.outputs[0])
        program.graph.remove(sigmoids, safe=True)
        program.graph.opset_imports["com.microsoft"] = 1


def multiply_to_float(program: ir.Model, integer: Collection[str]) -> None:
    """Write an integer MatMul with a float output as onnxruntime's MatMulIntegerToFloat, with the bias behind it.

    onnxruntime makes the same of it, but leaves the bias in an Add: 128×384×1536, one thread: 0.208 ms with the bias
    inside, 0.196 without, and 0.021 for the Add.
    """
    for node in list(program.graph):
        data, weight = (_decode(value) for value in node.inputs[:2]) if node.op_type == "MatMul" else (None, None)
        if data is None or weight is None or node.name not in integer or not _by_output(weight):
            continue
        readers = [use.node for use in node.outputs[0].uses()]
        if any(reader.op_type == "QuantizeLinear" for reader in readers) or node.outputs[0].is_graph_output():
            continue  # its output is in integers too; the name of an output is the user's
        (x, x_scale, x_zero), (w, w_scale, w_zero) = data.inputs, weight.inputs
        centred = w_zero is None or (w_zero.const_value is not None and not np.any(w_zero.const_value.numpy()))
        bias = _added(readers[0], node.outputs[0], w) if len(readers) == 1 else None
        last = node if bias is None else readers[0]
        inputs = [x, w, x_scale, w_scale, x_zero, None if centred else w_zero, bias]
        product = ir.node("MatMulIntegerToFloat", inputs, domain="com.microsoft", name=node.name)
        program.graph.insert_before(node, product)
        remove_node(last, product.outputs[0])
        if last is not node:
            program.graph.remove(node, safe=True)
        program.graph.opset_imports["com.microsoft"] = 1
    common.RemoveUnusedNodesPass()(program)


def _decode(value: ir.Value | None) -> ir.Node | None:
    """The DequantizeLinear of 8-bit codes that makes a value."""
    node = made_by(value, "DequantizeLinear")
    codes = None if node is None else node.inputs[0]
    return node if codes is not None and codes.dtype in (ir.DataType.UINT8, ir.DataType.INT8) else None


def _by_output(decode: ir.Node) -> bool:
    """Whether a matrix (inputs, outputs) has one scale, or one for each output."""
    codes, scale = decode.inputs[:2]
    if codes is None or codes.shape is None or len(codes.shape) != 2 or scale is None or scale.const_value is None:
        return False
    return scale.const_value.size == 1 or decode.attributes.get_int("axis", 1) in (1, -1)


def _added(reader: ir.Node, product: ir.Value, weight: ir.Value | None) -> ir.Value | None:
    """The constant for each output that the reader adds to a product, as a row."""
    if reader.op_type not in ("Add", "Sum") or len(reader.inputs) != 2 or weight is None or weight.shape is None:
        return None
    index = 1 if reader.inputs[0] is product else 0
    bias = reader.inputs[index]
    array = None if bias is None or bias.const_value is None else bias.const_value.numpy()
    if array is None or array.shape[-1:] != (weight.shape[1],) or array.size != array.shape[-1] or array.ndim > 3:
        return None
    if array.ndim > 1:
        set_constant(reader, index, array.reshape(-1), f"{reader.name}_bias")
    return reader.inputs[index]


def _is_quantized_matmul(value: ir.Value | None) -> bool:
    product = made_by(value, "MatMul")
    return product is not None and all(made_by(v, "DequantizeLinear") is not None for v in product.inputs)
