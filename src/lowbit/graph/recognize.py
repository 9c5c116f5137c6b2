"""Operators that exporters spell out, put back: LayerNormalization, Gelu, HardSwish, GlobalAveragePool.

Exact up to rounding.
Engines have kernels for them, and their insides must not be quantized one multiplication at a time.
"""

from __future__ import annotations

import math

import numpy as np
import onnx_ir as ir
from onnx_ir.passes import common

from lowbit.graph.changed import Changed
from lowbit.graph.links import made_by, only_reader, remove_node
from lowbit.graph.weights import constant, scalar

DEEPEST_PRODUCT = 4  # Mul and Div nested in one of the forms below


def recognize_operators(program: ir.Model) -> Changed:
    """Replace the spelled-out forms by the one operator; values that others read stay."""
    done: list[str] = []
    for graph in program.graphs():
        for node in reversed(list(graph)):
            if node.graph is None or node.domain not in ("", "ai.onnx"):
                continue
            for match in (_layer_norm, _gelu, _hard_swish, _global_pool):
                found = match(node)
                if found is not None:
                    node.prepend(found)
                    found.name = node.name
                    remove_node(node, found.outputs[0])
                    done.append(f"{found.op_type} '{node.name}' recognised")
                    common.RemoveUnusedNodesPass()(program)
                    break
    return Changed(tuple(done))


def silu_input(node: ir.Node) -> ir.Value | None:
    """x where the node is the Mul of x · sigmoid(x), and nobody else reads the sigmoid."""
    for x, gate in (node.inputs, node.inputs[::-1]) if node.op_type == "Mul" and len(node.inputs) == 2 else ():
        sigmoid = made_by(gate, "Sigmoid")
        if sigmoid is not None and sigmoid.inputs[0] is x and only_reader(sigmoid.outputs[0]) is node:
            return x
    return None


def is_of_silu(node: ir.Node) -> bool:
    """Whether the node is the Sigmoid or the Mul of a SiLU."""
    mul = only_reader(node.outputs[0]) if node.op_type == "Sigmoid" else node
    return mul is not None and silu_input(mul) is not None


def _split(node: ir.Node | None) -> tuple[ir.Value, np.ndarray] | None:
    """(computed input, constant input) of an operator of two inputs of which one is constant."""
    if node is None or len(node.inputs) != 2:
        return None
    for computed, fixed in (node.inputs, reversed(node.inputs)):
        array = constant(fixed)
        if array is not None and computed is not None and constant(computed) is None:
            return computed, array
    return None


def _plus(value: ir.Value | None, number: float) -> ir.Value | None:
    """x where the value is x + number."""
    parts = _split(made_by(value, "Add"))
    return parts[0] if parts and parts[1].size == 1 and _close(float(parts[1].reshape(())), number) else None


def _factors(value: ir.Value | None, depth: int = 0) -> tuple[list[ir.Value], float]:
    """The computed factors of a tree of Mul and Div, and the product of its constant ones.

    What several nodes read is a factor as a whole: x in x·gate(x) may be a product itself.
    """
    node = made_by(value, "Mul", "Div")
    if node is None or value is None or depth > DEEPEST_PRODUCT:
        return ([] if value is None else [value]), 1.0
    factors: list[ir.Value] = []
    product = 1.0
    for index, operand in enumerate(node.inputs):
        number = scalar(operand)
        if number == 0 and node.op_type == "Div":
            return [value], 1.0  # a division by 0 is no factor
        if number is not None:
            product = product * number if node.op_type == "Mul" or index == 0 else product / number
        elif node.op_type == "Mul" or index == 0:
            shared = operand is not None and len(operand.uses()) > 1
            more, times = ([operand], 1.0) if operand is not None and shared else _factors(operand, depth + 1)
            factors, product = factors + more, product * times
        else:
            return [value], 1.0
    return factors, product


def _close(a: float, b: float) -> bool:
    return math.isclose(a, b, rel_tol=1e-4)


def _gelu(node: ir.Node) -> ir.Node | None:
    """0.5·x·(1 + erf(x/√2)), or with tanh(√(2/π)·(x + 0.044715·x³))."""
    if node.op_type != "Mul":
        return None
    factors, product = _factors(node.outputs[0])
    if len(factors) != 2 or not _close(product, 0.5):
        return None
    for x, gate in (factors, factors[::-1]):
        inner = _plus(gate, 1.0)
        erf, tanh = made_by(inner, "Erf"), made_by(inner, "Tanh")
        if erf is not None:
            inside, scale = _factors(erf.inputs[0])
            if inside == [x] and _close(scale, math.sqrt(0.5)):
                return ir.node("Gelu", [x])
        if tanh is not None and _is_tanh_argument(tanh.inputs[0], x):
            return ir.node("Gelu", [x], {"approximate": "tanh"})
    return None


def _is_tanh_argument(value: ir.Value | None, x: ir.Value) -> bool:
    inside, scale = _factors(value)
    if len(inside) != 1 or not _close(scale, math.sqrt(2 / math.pi)):
        return False
    add = made_by(inside[0], "Add")
    if add is None or x not in add.inputs:
        return False
    cubic = add.inputs[1] if add.inputs[0] is x else add.inputs[0]
    factors, scale = _factors(cubic)
    cube = made_by(factors[0], "Pow") if len(factors) == 1 else None
    cubed = cube is not None and cube.inputs[0] is x and scalar(cube.inputs[1]) == 3
    return _close(scale, 0.044715) and (cubed or (len(factors) == 3 and all(factor is x for factor in factors)))


def _hard_swish(node: ir.Node) -> ir.Node | None:
    """x·clip(x + 3, 0, 6)/6, or x times a HardSigmoid of slope 1/6."""
    if node.op_type not in ("Mul", "Div"):
        return None
    factors, product = _factors(node.outputs[0])
    if len(factors) != 2:
        return None
    for x, gate in (factors, factors[::-1]):
        sigmoid = made_by(gate, "HardSigmoid")
        if sigmoid is not None and sigmoid.inputs[0] is x and _close(product, 1.0):
            slope, offset = sigmoid.attributes.get("alpha"), sigmoid.attributes.get("beta")
            if slope is not None and _close(slope.as_float(), 1 / 6) and (offset is None or offset.as_float() == 0.5):
                return ir.node("HardSwish", [x])
        clip = made_by(gate, "Clip")
        if clip is not None and _close(product, 1 / 6) and _plus(clip.inputs[0], 3.0) is x:
            bounds = [scalar(bound) for bound in clip.inputs[1:3]]
            if bounds == [0.0, 6.0]:
                return ir.node("HardSwish", [x])
    return None


def _global_pool(node: ir.Node) -> ir.Node | None:
    """The mean over all positions of an image: engines pool in integers, but do not reduce in them."""
    x = node.inputs[0] if node.op_type == "ReduceMean" and len(node.inputs) > 1 else None
    axes = None if x is None else constant(node.inputs[1])
    rank = None if x is None or x.shape is None else x.shape.rank()
    if x is None or axes is None or rank is None or rank < 3 or sorted(axes.reshape(-1) % rank) != list(range(2, rank)):
        return None
    assert x.shape is not None
    pool = ir.node("GlobalAveragePool", [x])
    keep = node.attributes.get("keepdims")
    if keep is None or keep.as_int():
        return pool
    pool.name, pool.outputs[0].name = f"{node.name}_pool", f"{node.outputs[0].name}_pool"
    pool.outputs[0].shape, pool.outputs[0].type = ir.Shape((*x.shape.dims[:2], *[1] * (rank - 2))), x.type
    node.prepend(pool)
    return ir.node("Flatten", [pool.outputs[0]])


def _layer_norm(node: ir.Node) -> ir.Node | None:
    """(x − mean)/√(var + ε)·γ + β over the last axes."""
    with_beta = _split(node) if node.op_type == "Add" else None
    with_gamma = _split(made_by(with_beta[0], "Mul")) if with_beta else None
    if with_beta is None or with_gamma is None:
        return None
    divided = made_by(with_gamma[0], "Div")
    root = made_by(divided.inputs[1], "Sqrt") if divided is not None else None
    if divided is None or root is None:
        return None
    deviation = made_by(divided.inputs[0], "Sub")
    with_epsilon = _split(made_by(root.inputs[0], "Add"))
    if deviation is None or with_epsilon is None or with_epsilon[1].size != 1:
        return None
    x, variance = deviation.inputs[0], made_by(with_epsilon[0], "ReduceMean")
    axes = _mean_axes(made_by(deviation.inputs[1], "ReduceMean"), x)
    if x is None or variance is None or axes is None or _mean_axes(variance, variance.inputs[0]) != axes:
        return None
    if not _is_square_of_deviation(variance.inputs[0], x, axes):
        return None
    gamma, beta = with_gamma[1], with_beta[1]
    if gamma.shape != beta.shape or gamma.ndim != len(axes):
        return None
    mul, add = made_by(with_beta[0], "Mul"), node
    assert mul is not None
    scale = next(value for value in mul.inputs if constant(value) is not None)
    bias = next(value for value in add.inputs if constant(value) is not None)
    epsilon = float(with_epsilon[1].reshape(()))
    return ir.node("LayerNormalization", [x, scale, bias], {"axis": min(axes), "epsilon": epsilon})


def _mean_axes(node: ir.Node | None, x: ir.Value | None) -> list[int] | None:
    """The trailing axes, counted from the end, over which the node is the mean of x with its dimensions kept."""
    if node is None or x is None or node.inputs[0] is not x or len(node.inputs) < 2:
        return None
    keep, axes = node.attributes.get("keepdims"), constant(node.inputs[1])
    if axes is None or (keep is not None and not keep.as_int()):
        return None
    rank = None if x.shape is None else x.shape.rank()
    if rank is None and (axes >= 0).any():
        return None
    ends = sorted(int(axis) - rank if axis >= 0 and rank is not None else int(axis) for axis in axes.reshape(-1))
    return ends if ends == list(range(-len(ends), 0)) else None


def _is_square_of_deviation(value: ir.Value | None, x: ir.Value, axes: list[int]) -> bool:
    power = made_by(value, "Pow", "Mul")
    if power is None:
        return False
    squared = power.inputs[0] is power.inputs[1] if power.op_type == "Mul" else scalar(power.inputs[1]) == 2
    deviation = made_by(power.inputs[0], "Sub")
    if not squared or deviation is None or deviation.inputs[0] is not x:
        return False
    return _mean_axes(made_by(deviation.inputs[1], "ReduceMean"), x) == axes
