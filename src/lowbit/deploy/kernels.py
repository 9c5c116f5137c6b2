"""Where onnxruntime may use integer kernels, and where not: rewrites that hold it to what a placement says. Exact.

It makes an integer kernel of any operator between DequantizeLinear and QuantizeLinear, and none of an integer layer
with a Relu or Clip behind it that no range absorbs. Read off its optimized graphs (1.31, CPU); other engines read the
same operations. TensorRT fuses a Relu with the kernel in front of it, so there it stays.
"""

from collections.abc import Callable, Collection, Mapping
from types import MappingProxyType

import numpy as np
import onnx_ir as ir

from lowbit.deploy.attention import fuse_attention
from lowbit.deploy.lookup import join_rows
from lowbit.deploy.rewrites import as_sum, fuse_silu, multiply_to_float
from lowbit.deploy.zero_points import move_zero_points
from lowbit.graph.homogeneous import clip_bounds
from lowbit.graph.links import only_reader
from lowbit.graph.weights import add_constant

_INTEGER_KERNELS = frozenset(
    {
        *("Conv", "ConvTranspose", "Gemm", "MatMul"),
        *("Add", "Mul", "Sigmoid", "LeakyRelu", "AveragePool", "GlobalAveragePool", "Softmax"),
    }
)
# It moves QuantizeLinear and DequantizeLinear across operators that only move values, and reads past clips.
_PASSED = frozenset(
    {
        *("Relu", "Clip", "MaxPool", "Resize", "Slice", "Concat"),
        *("Reshape", "Flatten", "Transpose", "Squeeze", "Unsqueeze"),
    }
)


def keep_float_apart(program: ir.Model, integer: Collection[str]) -> None:
    """Keep in float what lies between integers and is not named in `integer`, the nodes that compute in them.

    onnxruntime's WeightBiasQuantization gives a float Conv, ConvTranspose or Gemm between Q/DQ weights of 8 bits per
    tensor, and its selectors give any Add or Sigmoid there an integer kernel. LeakyRelu of slope 1 is the identity:
    no engine sees through it, and it is fused into the convolution or the Gemm before it, so it takes no time. An Add
    becomes a Sum, which has no integer kernel.
    """
    for node in list(program.graph):
        if node.op_type not in _INTEGER_KERNELS or node.name in integer or not _reads_integers(node):
            continue
        last = node
        if node.op_type == "MatMul" and (add := _bias_behind(node)) is not None:
            last = add  # the two become one Gemm
        value = last.outputs[0]
        if not _is_quantized_next(value):
            continue
        if node.op_type == "Add":
            as_sum(program, node)
            continue
        result = ir.Value(name=f"{value.name}_kept_float", shape=value.shape, type=value.type)
        value.replace_all_uses_with(result)
        program.graph.insert_after(last, ir.node("LeakyRelu", [value], {"alpha": 1.0}, outputs=[result]))


def keep_kernels_from_clips(program: ir.Model, integer: Collection[str]) -> None:
    """Take away Relu and Clip from behind integer kernels where no range absorbs them.

    onnxruntime leaves a kernel in float, weights decoded at every call, where such a clip is the only reader and the
    quantizer behind it is wider (a Concat shares its scale with negative values) or missing. Clipping the codes behind
    that quantizer gives the same codes; in front of float an identity comes between.
    """
    for clip in list(program.graph):
        value = clip.inputs[0] if clip.op_type in ("Relu", "Clip") else None
        kernel = None if value is None else value.producer()
        if value is None or kernel is None or kernel.name not in integer or clip.outputs[0].is_graph_output():
            continue
        readers = [use.node for use in clip.outputs[0].uses()]
        if len(readers) != 1:
            continue
        if readers[0].op_type == "QuantizeLinear":
            bounds, zero = clip_bounds(clip), readers[0].inputs[2]
            eight = zero is not None and zero.dtype in (ir.DataType.UINT8, ir.DataType.INT8)
            if bounds is not None and bounds[0] <= bounds[1] and eight:
                _clip_codes(program, clip, readers[0], bounds)
        else:
            between = ir.Value(name=f"{value.name}_unclipped", shape=value.shape, type=value.type)
            program.graph.insert_before(clip, ir.node("LeakyRelu", [value], {"alpha": 1.0}, outputs=[between]))
            clip.replace_input_with(0, between)


_INTEGERS = (keep_kernels_from_clips, keep_float_apart)
_ONNXRUNTIME = (join_rows, fuse_silu, fuse_attention, multiply_to_float, *_INTEGERS)

REWRITES: Mapping[str, tuple[Callable[[ir.Model, Collection[str]], None], ...]] = MappingProxyType(
    {
        "onnxruntime": _ONNXRUNTIME,
        "onnxruntime-avx2": _ONNXRUNTIME,
        "generic": (join_rows, *_INTEGERS),
        "integer": (join_rows, *_INTEGERS),
        "openvino": (*_INTEGERS, move_zero_points),
        "tensorrt": (keep_float_apart,),
    }
)
"""Target → rewrites in order, in place on the written program, given the names of the integer nodes.

The proof runs every file in onnxruntime: float layers are kept apart for all.
"""


def _clip_codes(program: ir.Model, clip: ir.Node, quantize: ir.Node, clipped: tuple[float, float]) -> None:
    """Quantize(clip(x)) → clip(Quantize(x)) with the codes of the bounds: rounding is monotone, so these are equal."""
    scale, zero = (v.const_value.numpy() for v in quantize.inputs[1:3])  # type: ignore[union-attr]
    held = np.iinfo(zero.dtype)
    lo, hi = (float(np.clip(np.rint(end / scale) + zero, held.min, held.max)) for end in clipped)
    codes = quantize.outputs[0]
    ends = (("lo", lo), ("hi", hi))
    bounds = [add_constant(program.graph, f"{codes.name}_{name}", np.array(end, zero.dtype)) for name, end in ends]
    result = ir.Value(name=codes.name, shape=codes.shape, type=codes.type)
    codes.replace_all_uses_with(result)
    codes.name = f"{codes.name}_unclipped"
    program.graph.insert_after(quantize, ir.node("Clip", [codes, *bounds], outputs=[result]))
    quantize.replace_input_with(0, clip.inputs[0])
    program.graph.remove(clip, safe=True)


def _reads_integers(node: ir.Node) -> bool:
    """Whether the activations that the node reads are decoded integers, if need be behind a move."""
    data = node.inputs if node.op_type in ("Add", "Mul", "Concat") else node.inputs[:1]
    read = [v.producer() for v in data if v is not None and v.const_value is None]
    return bool(read) and all(
        p is not None and (p.op_type == "DequantizeLinear" or (p.op_type in _PASSED and _reads_integers(p)))
        for p in read
    )


def _is_quantized_next(value: ir.Value) -> bool:
    """Whether only one node reads the value and quantizes it, if need be behind clips and moves."""
    readers = [use.node for use in value.uses()]
    if len(readers) != 1:
        return False
    reader = readers[0]
    return reader.op_type == "QuantizeLinear" or (
        reader.op_type in _PASSED and any(_is_quantized_next(output) for output in reader.outputs)
    )


def _bias_behind(matmul: ir.Node) -> ir.Node | None:
    """The Add of a constant that alone reads a MatMul."""
    add = only_reader(matmul.outputs[0])
    if add is None or add.op_type != "Add":
        return None
    return add if any(v is not None and v.const_value is not None for v in add.inputs) else None
