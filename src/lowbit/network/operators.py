"""The operator table: ONNX operator → the torch function that computes it, and how its scales relate.

Semantics are those of opset 21 up to the newest that the `onnx` package knows. A row's function takes the operator's
inputs in ONNX's order (None where an optional one is absent) and its attributes as keywords under their ONNX names. One
with the keyword `outputs` is told how many values are asked for: of one it returns the tensor, of more a tuple.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import onnx_ir as ir
import torch
import torch.nn.functional as F

from lowbit.network import operators_attention as attention
from lowbit.network import operators_cast as cast
from lowbit.network import operators_elementwise as elementwise
from lowbit.network import operators_index as index
from lowbit.network import operators_normalization as normalization
from lowbit.network import operators_recurrent as recurrent
from lowbit.network import operators_reduce as reduce
from lowbit.network import operators_resize as resize
from lowbit.network import operators_shape as shape
from lowbit.network import operators_spatial as spatial

Scales = Literal["shares", "free", "none"]


@dataclass(frozen=True)
class Operator:
    """One row.

    function   computes the operator
    scales     "shares": every output value is a value of a data input (or zero), so input and output have one scale;
               "free": the output has its own range; "none": integers, booleans, shapes: nothing to quantize
    data       the inputs that share their scale with the output; () means all of them
    literals   inputs that the function takes as python numbers where they are constant: shapes, axes, bounds
    statistics float inputs that are kept as buffers, not parameters: no gradient step may move them
    on_host    the result describes a shape and stays in main memory, wherever the model runs
    type_from  (input, attribute): the function is told this input's ONNX type, as torch's is coarser
    """

    function: Callable[..., Any]
    scales: Scales = "free"
    data: tuple[int, ...] = (0,)
    literals: tuple[int, ...] = ()
    statistics: tuple[int, ...] = ()
    on_host: bool = False
    type_from: tuple[int, str] | None = None


def _shares(function: Callable[..., Any], literals: tuple[int, ...] = (), data: tuple[int, ...] = (0,)) -> Operator:
    return Operator(function, "shares", data, literals)


def _free(function: Callable[..., Any], literals: tuple[int, ...] = ()) -> Operator:
    return Operator(function, "free", literals=literals)


def _none(function: Callable[..., Any], literals: tuple[int, ...] = ()) -> Operator:
    return Operator(function, "none", literals=literals)


OPERATORS: dict[str, Operator] = {
    # convolution, products
    "Conv": _free(spatial.conv),
    "ConvTranspose": _free(spatial.conv_transpose),
    "Gemm": _free(reduce.gemm),
    "MatMul": _free(torch.matmul),
    "Einsum": _free(reduce.einsum),
    "Col2Im": _free(spatial.col2im, literals=(1, 2)),
    # pooling
    "MaxPool": _shares(spatial.max_pool),
    "GlobalMaxPool": _shares(spatial.global_max_pool),
    "MaxUnpool": _shares(spatial.max_unpool, literals=(2,)),
    "AveragePool": _free(spatial.average_pool),
    "GlobalAveragePool": _free(spatial.global_average_pool),
    # moving values
    "Identity": _shares(shape.identity),
    "Dropout": _shares(elementwise.dropout, literals=(1, 2)),
    "Reshape": _shares(shape.reshape, literals=(1,)),
    "Flatten": _shares(shape.flatten),
    "Transpose": _shares(shape.transpose),
    "Squeeze": _shares(shape.squeeze, literals=(1,)),
    "Unsqueeze": _shares(shape.unsqueeze, literals=(1,)),
    "Slice": _shares(shape.slice_axes, literals=(1, 2, 3, 4)),
    "Split": _shares(shape.split, literals=(1,)),
    "Concat": _shares(shape.concat, data=()),
    "Pad": _shares(shape.pad, literals=(1, 2, 3)),
    "Expand": _shares(shape.expand, literals=(1,)),
    "Tile": _shares(shape.tile, literals=(1,)),
    "DepthToSpace": _shares(shape.depth_to_space),
    "SpaceToDepth": _shares(shape.space_to_depth),
    "Trilu": _shares(shape.trilu, literals=(1,)),
    "ReverseSequence": _shares(shape.reverse_sequence),
    "Gather": _shares(index.gather, literals=(1,)),
    "GatherElements": _shares(index.gather_elements),
    "GatherND": _shares(index.gather_nd),
    "TopK": _shares(index.top_k, literals=(1,)),
    # Free, though values only move: a source often is a mask of −1e9 or −inf, which must not widen the other's range.
    "Where": _free(torch.where),
    "ScatterElements": _free(index.scatter_elements),
    "ScatterND": _free(index.scatter_nd),
    # resizing and sampling
    "Resize": _shares(resize.resize, literals=(1, 2, 3)),
    "GridSample": _free(resize.grid_sample),
    "AffineGrid": _free(resize.affine_grid, literals=(1,)),
    # arithmetic
    "Add": _free(torch.add),
    "Sub": _free(torch.sub),
    "Mul": _free(torch.mul),
    "Div": _free(elementwise.divide),
    "Mod": _free(elementwise.modulo),
    "Pow": _free(elementwise.power),
    "Sum": _free(elementwise.total),
    "Mean": _free(elementwise.mean_of),
    "Max": _free(elementwise.maximum),
    "Min": _free(elementwise.minimum),
    "Neg": _free(torch.neg),
    "Abs": _free(torch.abs),
    "Sign": _free(torch.sign),
    "Reciprocal": _free(torch.reciprocal),
    "Sqrt": _free(torch.sqrt),
    "Exp": _free(torch.exp),
    "Log": _free(torch.log),
    "Erf": _free(torch.erf),
    "Floor": _free(torch.floor),
    "Ceil": _free(torch.ceil),
    "Round": _free(torch.round),
    "Clip": _free(elementwise.clip, literals=(1, 2)),
    "Sin": _free(torch.sin),
    "Cos": _free(torch.cos),
    "Tan": _free(torch.tan),
    "Asin": _free(torch.asin),
    "Acos": _free(torch.acos),
    "Atan": _free(torch.atan),
    "Sinh": _free(torch.sinh),
    "Cosh": _free(torch.cosh),
    "Asinh": _free(torch.asinh),
    "Acosh": _free(torch.acosh),
    "Atanh": _free(torch.atanh),
    # activations
    "Relu": _free(torch.relu),
    "LeakyRelu": _free(elementwise.leaky_relu),
    "PRelu": _free(elementwise.prelu),
    "ThresholdedRelu": _free(elementwise.thresholded_relu),
    "Elu": _free(elementwise.elu),
    "Celu": _free(elementwise.celu),
    "Selu": _free(elementwise.selu),
    "Gelu": _free(elementwise.gelu),
    "Swish": _free(elementwise.swish),
    "SwiGLU": _free(elementwise.swiglu),
    "Mish": _free(F.mish),
    "HardSwish": _free(F.hardswish),
    "HardSigmoid": _free(elementwise.hard_sigmoid),
    "Sigmoid": _free(torch.sigmoid),
    "Tanh": _free(torch.tanh),
    "Softplus": _free(elementwise.softplus),
    "Softsign": _free(F.softsign),
    "Shrink": _free(elementwise.shrink),
    "Softmax": _free(reduce.softmax),
    "LogSoftmax": _free(reduce.log_softmax),
    # reductions
    "ReduceSum": _free(reduce.reduce_sum, literals=(1,)),
    "ReduceMean": _free(reduce.reduce_mean, literals=(1,)),
    "ReduceMax": _shares(reduce.reduce_max, literals=(1,)),
    "ReduceMin": _shares(reduce.reduce_min, literals=(1,)),
    "ReduceProd": _free(reduce.reduce_prod, literals=(1,)),
    "ReduceL1": _free(reduce.reduce_l1, literals=(1,)),
    "ReduceL2": _free(reduce.reduce_l2, literals=(1,)),
    "ReduceLogSum": _free(reduce.reduce_log_sum, literals=(1,)),
    "ReduceLogSumExp": _free(reduce.reduce_log_sum_exp, literals=(1,)),
    "ReduceSumSquare": _free(reduce.reduce_sum_square, literals=(1,)),
    "CumSum": _free(reduce.cumulative_sum, literals=(1,)),
    # normalization
    "BatchNormalization": Operator(normalization.batch_normalization, statistics=(3, 4)),
    "InstanceNormalization": _free(normalization.instance_normalization),
    "LayerNormalization": _free(normalization.layer_normalization),
    "GroupNormalization": _free(normalization.group_normalization),
    "RMSNormalization": _free(normalization.rms_normalization),
    "MeanVarianceNormalization": _free(normalization.mean_variance_normalization),
    "LpNormalization": _free(normalization.lp_normalization),
    "LRN": _free(normalization.lrn),
    # attention and recurrence
    "Attention": _free(attention.attention),
    "RotaryEmbedding": _free(attention.rotary_embedding),
    "LSTM": _free(recurrent.lstm),
    "GRU": _free(recurrent.gru),
    "RNN": _free(recurrent.rnn),
    # comparison, logic
    "Equal": _none(torch.eq),
    "Greater": _none(torch.gt),
    "GreaterOrEqual": _none(torch.ge),
    "Less": _none(torch.lt),
    "LessOrEqual": _none(torch.le),
    "And": _none(torch.logical_and),
    "Or": _none(torch.logical_or),
    "Xor": _none(torch.logical_xor),
    "Not": _none(torch.logical_not),
    "IsInf": _none(elementwise.is_inf),
    "IsNaN": _none(torch.isnan),
    # indices and shapes
    "ArgMax": _none(reduce.argmax),
    "ArgMin": _none(reduce.argmin),
    "NonZero": _none(index.non_zero),
    "OneHot": _none(index.one_hot, literals=(1,)),
    "Shape": Operator(shape.shape, "none", on_host=True),
    "Size": Operator(shape.size, "none", on_host=True),
    "ConstantOfShape": _none(shape.constant_of_shape, literals=(0,)),
    "Range": _none(shape.number_range),
    # casts
    "Cast": _none(cast.cast),
    "CastLike": Operator(cast.cast_like, "none", type_from=(1, "to")),
}


def scale_relation(node: ir.Node) -> Scales:
    """How a node's output scale relates to its inputs': its row's answer, or another where its attributes say so.

    Cubic resizing overshoots its input's range, and a pad by anything but zero brings in a foreign value: both are
    free. So are operators outside the table.
    """
    row = OPERATORS.get(node.op_type) if node.domain in ("", "ai.onnx") else None
    if row is None:
        return "free"
    if node.op_type == "Resize" and "mode" in node.attributes and node.attributes["mode"].as_string() == "cubic":
        return "free"
    if node.op_type == "Pad" and len(node.inputs) > 2 and (value := node.inputs[2]) is not None:
        constant = value.const_value
        return "shares" if constant is not None and not constant.numpy().any() else "free"
    return row.scales
