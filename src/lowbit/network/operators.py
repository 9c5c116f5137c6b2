"""The operator table: ONNX operator → the torch function that computes it, and whether it only moves values.

Semantics are those of opset 21 up to the newest that the `onnx` package knows. A row's function takes the operator's
inputs in ONNX's order (None where an optional one is absent) and its attributes as keywords under their ONNX names. One
with the keyword `outputs` is told how many values are asked for: of one it returns the tensor, of more a tuple.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

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


@dataclass(frozen=True)
class Operator:
    """One row.

    function   computes the operator
    shares     moves values: each output value is an input value, between two (Resize) or a filling (Pad, Trilu), so
               that data input and output can have one scale
    literals   inputs that the function takes as python numbers where they are constant: shapes, axes, bounds
    statistics float inputs that are kept as buffers, not parameters: no gradient step may move them
    on_host    the result describes a shape and stays in main memory, wherever the model runs
    type_from  (input, attribute): the function is told this input's ONNX type, as torch's is coarser
    forms      which nodes the function computes; the others run in onnxruntime. None: all
    """

    function: Callable[..., Any]
    shares: bool = False
    literals: tuple[int, ...] = ()
    statistics: tuple[int, ...] = ()
    on_host: bool = False
    type_from: tuple[int, str] | None = None
    forms: Callable[[ir.Node], bool] | None = None


def _shares(function: Callable[..., Any], literals: tuple[int, ...] = ()) -> Operator:
    return Operator(function, True, literals)


def _has_one_output(node: ir.Node) -> bool:
    return not any(value.name for value in node.outputs[1:])


def _infers(node: ir.Node) -> bool:
    """Whether a normalization has its statistics given."""
    return node.attributes.get_int("training_mode", 0) == 0


OPERATORS: dict[str, Operator] = {
    # convolution, products
    "Conv": Operator(spatial.conv),
    "ConvTranspose": Operator(spatial.conv_transpose),
    "Gemm": Operator(reduce.gemm),
    "MatMul": Operator(torch.matmul),
    "Einsum": Operator(reduce.einsum),
    # pooling
    "MaxPool": Operator(spatial.max_pool, True, forms=_has_one_output),
    "GlobalMaxPool": _shares(spatial.global_max_pool),
    "MaxUnpool": _shares(spatial.max_unpool, literals=(2,)),
    "AveragePool": Operator(spatial.average_pool),
    "GlobalAveragePool": Operator(spatial.global_average_pool),
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
    "Concat": _shares(shape.concat),
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
    # Values only move, but a source often is a mask of −1e9 or −inf, which must not widen the other's range.
    "Where": Operator(torch.where),
    "ScatterElements": Operator(index.scatter_elements),
    "ScatterND": Operator(index.scatter_nd),
    # resizing and sampling
    "Resize": Operator(resize.resize, True, literals=(1, 2, 3), forms=resize.is_separable),
    "GridSample": Operator(resize.grid_sample),
    "AffineGrid": Operator(resize.affine_grid, literals=(1,)),
    # arithmetic
    "Add": Operator(torch.add),
    "Sub": Operator(torch.sub),
    "Mul": Operator(torch.mul),
    "Div": Operator(elementwise.divide),
    "Mod": Operator(elementwise.modulo),
    "Pow": Operator(elementwise.power),
    "Sum": Operator(elementwise.total),
    "Mean": Operator(elementwise.mean_of),
    "Max": Operator(elementwise.maximum),
    "Min": Operator(elementwise.minimum),
    "Neg": Operator(torch.neg),
    "Abs": Operator(torch.abs),
    "Sign": Operator(torch.sign),
    "Reciprocal": Operator(torch.reciprocal),
    "Sqrt": Operator(torch.sqrt),
    "Exp": Operator(torch.exp),
    "Log": Operator(torch.log),
    "Erf": Operator(torch.erf),
    "Floor": Operator(torch.floor),
    "Ceil": Operator(torch.ceil),
    "Round": Operator(torch.round),
    "Clip": Operator(elementwise.clip, literals=(1, 2)),
    "Sin": Operator(torch.sin),
    "Cos": Operator(torch.cos),
    "Tan": Operator(torch.tan),
    "Asin": Operator(torch.asin),
    "Acos": Operator(torch.acos),
    "Atan": Operator(torch.atan),
    "Sinh": Operator(torch.sinh),
    "Cosh": Operator(torch.cosh),
    "Asinh": Operator(torch.asinh),
    "Acosh": Operator(torch.acosh),
    "Atanh": Operator(torch.atanh),
    # activations
    "Relu": Operator(torch.relu),
    "LeakyRelu": Operator(elementwise.leaky_relu),
    "PRelu": Operator(elementwise.prelu),
    "ThresholdedRelu": Operator(elementwise.thresholded_relu),
    "Elu": Operator(elementwise.elu),
    "Celu": Operator(elementwise.celu),
    "Selu": Operator(elementwise.selu),
    "Gelu": Operator(elementwise.gelu),
    "Swish": Operator(elementwise.swish),
    "SwiGLU": Operator(elementwise.swiglu),
    "Mish": Operator(F.mish),
    "HardSwish": Operator(F.hardswish),
    "HardSigmoid": Operator(elementwise.hard_sigmoid),
    "Sigmoid": Operator(torch.sigmoid),
    "Tanh": Operator(torch.tanh),
    "Softplus": Operator(elementwise.softplus),
    "Softsign": Operator(F.softsign),
    "Shrink": Operator(elementwise.shrink),
    "Softmax": Operator(reduce.softmax),
    "LogSoftmax": Operator(reduce.log_softmax),
    # reductions
    "ReduceSum": Operator(reduce.reduce_sum, literals=(1,)),
    "ReduceMean": Operator(reduce.reduce_mean, literals=(1,)),
    "ReduceMax": _shares(reduce.reduce_max, literals=(1,)),
    "ReduceMin": _shares(reduce.reduce_min, literals=(1,)),
    "ReduceProd": Operator(reduce.reduce_prod, literals=(1,)),
    "ReduceL1": Operator(reduce.reduce_l1, literals=(1,)),
    "ReduceL2": Operator(reduce.reduce_l2, literals=(1,)),
    "ReduceLogSum": Operator(reduce.reduce_log_sum, literals=(1,)),
    "ReduceLogSumExp": Operator(reduce.reduce_log_sum_exp, literals=(1,)),
    "ReduceSumSquare": Operator(reduce.reduce_sum_square, literals=(1,)),
    "CumSum": Operator(reduce.cumulative_sum, literals=(1,)),
    # normalization
    "BatchNormalization": Operator(normalization.batch_normalization, statistics=(3, 4), forms=_infers),
    "InstanceNormalization": Operator(normalization.instance_normalization),
    "LayerNormalization": Operator(normalization.layer_normalization, forms=_has_one_output),
    "GroupNormalization": Operator(normalization.group_normalization),
    "RMSNormalization": Operator(normalization.rms_normalization),
    "MeanVarianceNormalization": Operator(normalization.mean_variance_normalization),
    "LpNormalization": Operator(normalization.lp_normalization),
    "LRN": Operator(normalization.lrn),
    # attention and recurrence
    "Attention": Operator(attention.attention),
    "RotaryEmbedding": Operator(attention.rotary_embedding),
    "LSTM": Operator(recurrent.lstm, forms=recurrent.is_standard),
    "GRU": Operator(recurrent.gru, forms=recurrent.is_standard),
    "RNN": Operator(recurrent.rnn, forms=recurrent.is_standard),
    # comparison, logic
    "Equal": Operator(torch.eq),
    "Greater": Operator(torch.gt),
    "GreaterOrEqual": Operator(torch.ge),
    "Less": Operator(torch.lt),
    "LessOrEqual": Operator(torch.le),
    "And": Operator(torch.logical_and),
    "Or": Operator(torch.logical_or),
    "Xor": Operator(torch.logical_xor),
    "Not": Operator(torch.logical_not),
    "IsNaN": Operator(torch.isnan),
    # indices and shapes
    "ArgMax": Operator(reduce.argmax),
    "ArgMin": Operator(reduce.argmin),
    "NonZero": Operator(index.non_zero),
    "OneHot": Operator(index.one_hot, literals=(1,)),
    "Shape": Operator(shape.shape, on_host=True),
    "Size": Operator(shape.size, on_host=True),
    "ConstantOfShape": Operator(shape.constant_of_shape, literals=(0,)),
    "Range": Operator(shape.number_range),
    # casts
    "Cast": Operator(cast.cast),
    "CastLike": Operator(cast.cast_like, type_from=(1, "to")),
}


def row_of(node: ir.Node) -> Operator | None:
    """The row that computes a node; None where none does."""
    row = OPERATORS.get(node.op_type) if node.domain in ("", "ai.onnx") else None
    return row if row is None or row.forms is None or row.forms(node) else None


def shares_scale(node: ir.Node) -> bool:
    """Whether a node moves values, so that its data inputs and outputs can have one scale.

    Cubic resizing does not: it overshoots, and engines compute it in float.
    """
    row = OPERATORS.get(node.op_type) if node.domain in ("", "ai.onnx") else None
    return row is not None and row.shares and node.attributes.get_string("mode") != "cubic"
