"""Why a layer, a weight, a bias or a constant stays in float: all sentences that the ledger says about it.

Each function gives the sentence, or an empty one where nothing stands in the way.
"""

from collections.abc import Mapping

import numpy as np
import onnx_ir as ir

from lowbit.graph.layer import RECURRENT, Layer, layers_of, number
from lowbit.graph.recognize import is_of_silu
from lowbit.graph.weights import float_constant
from lowbit.network.operators_recurrent import is_standard
from lowbit.network.weights import SMALLEST_WEIGHT, has_one_scale_an_output
from lowbit.numerics import TENSOR
from lowbit.numerics.grids import is_whole
from lowbit.recipe import TensorSpec
from lowbit.targets import COMPUTING, Role, Target

BY_RULE = "by rule"
SENTINEL = 1e8  # attention masks write −1e9 … −3.4e38 for "never": no such constant may stretch a range


def layer_in_float(node: ir.Node, role: Role, weights: TensorSpec, activations: TensorSpec, target: Target) -> str:
    """Why a node cannot have this role, under a recipe that asks for these formats."""
    if role in (Role.CONVOLVE, Role.MULTIPLY):
        return _product_in_float(node, weights, activations, target)
    if role is Role.FOLLOW and activations.format is None:
        return BY_RULE
    if "SiLU" in target.in_float and is_of_silu(node):
        return f"{node.op_type} of a SiLU, which target '{target.name}' computes faster in float"
    if role is Role.ABSORB and any(v is not None and v.const_value is None for v in node.inputs[1:]):
        return f"{node.op_type} at computed bounds, which no range can absorb"
    if role in COMPUTING or node.op_type == "Pad":
        constants = [c for v in node.inputs if (c := float_constant(v)) is not None and c.size]
        if any(np.abs(c).max() >= SENTINEL for c in constants):
            return f"{node.op_type} with a constant of 1e8 or more, as in a mask, which must not stretch a range"
    return ""


def _product_in_float(node: ir.Node, weights: TensorSpec, activations: TensorSpec, target: Target) -> str:
    layer = next(layers_of(node), None)
    if (activations if layer is None else weights).format is None:
        return BY_RULE
    if layer is None:
        return f"{node.op_type} of two activations, which target '{target.name}' computes in float"
    if float_constant(node.inputs[0]) is not None:
        return f"{node.op_type} of two constants"
    if node.op_type in RECURRENT and not is_standard(node):
        return f"{node.op_type} with other activations, clips or peepholes"
    if node.op_type == "RNN" and "Relu" in node.attributes.get_strings("activations", ()) and not activations.dynamic:
        return "RNN with Relu, whose states have no bound"
    if layer.weight.ndim < 2:
        return f"{node.op_type} with a vector, which is not worth an integer kernel"
    if number(node, "alpha", 1) != 1 or number(node, "beta", 1) != 1 or number(node, "transA"):
        return f"{node.op_type} with alpha, beta or transA, for which there is no integer kernel"
    if node.op_type == "Gemm" and not layer.has_own_bias:
        return "Gemm without a bias of its own, one number an output (pass 'fuse_gemm' makes one)"
    return ""


def measured_in_float(node: ir.Node, target: Target) -> str:
    """Why a node has no integer kernel that measures the range of each input: at most its weights are stored."""
    if node.op_type not in target.dynamic:
        return f"target '{target.name}' has no fast kernel of {node.op_type} that measures the range of each input"
    if node.op_type not in RECURRENT:
        return ""
    if not is_standard(node) or number(node, "layout"):
        return f"{node.op_type} with other activations, clips, peepholes or layout 1 has no integer kernel"
    layers = list(layers_of(node))
    if len(layers) < 2 or (
        len(node.inputs) > 3 and node.inputs[3] is not None and float_constant(node.inputs[3]) is None
    ):
        return f"{node.op_type} with computed weights or biases has no integer kernel"
    if (states := layers[1].weight.shape[layers[1].summed_axis]) < target.dynamic[node.op_type]:
        least = target.dynamic[node.op_type]
        return f"{node.op_type} of {states} states, which target '{target.name}' computes faster in float under {least}"
    return ""


def weight_in_float(layer: Layer, spec: TensorSpec, role: Role) -> str:
    """Why a weight of a node that has this role is not stored in low bits."""
    if spec.format is None:
        return BY_RULE
    few = role is Role.STORE and layer.weight.size < SMALLEST_WEIGHT
    return f"{layer.weight.size} values are too few to store in low bits" if few else ""


def bias_in_float(bias: ir.Value, layer: Layer, weights: TensorSpec, activations: TensorSpec) -> str:
    """Why a bias is not stored in int32, at the product of the scales of these weights and activations."""
    kinds = [kind for kind in (weights.format, activations.format) if kind is not None and is_whole(kind.grid)]
    if (
        activations.dynamic
        or len(kinds) < 2
        or kinds[1].block != TENSOR
        or not has_one_scale_an_output(kinds[0].block, layer.weight.shape, layer.output_axis)
        or (layer.node.op_type == "ConvTranspose" and number(layer.node, "group", 1) > 1)  # a scale for several outputs
    ):
        return "no single scale belongs to the products that it is added to"
    return "a bias that several layers share has no single scale" if len(bias.uses()) > 1 else ""


def constant_in_float(value: ir.Value, program: ir.Model, reasons: Mapping[str, str]) -> str:
    """Why a constant has no quantizer.

    reasons   what placing noted: value or node name → why it stays in float
    """
    if value.const_value is None or not value.const_value.dtype.is_floating_point():
        return "not a floating-point tensor"
    if value.graph is not program.graph:
        return "inside the body of an If or a Loop, where nothing is quantized"
    readers = [use.node for use in value.uses()]
    noted = [reasons[str(name)] for name in (value.name, *(n.name for n in readers)) if name in reasons]
    if noted or not readers:
        return noted[0] if noted else "unused"
    return f"read by {', '.join(sorted({n.op_type for n in readers}))}, which computes in float on this target"


def nothing_quantized(reasons: Mapping[str, str]) -> str:
    """Why a placement has no site."""
    return "; ".join(sorted(set(reasons.values()))) or "no operator of it computes in integers"
