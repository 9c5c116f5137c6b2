"""Smoothing: outlier channels of an activation moved into the weights that read it. Exact but for float rounding.

X·W = (X / s)·(s·W) for any s > 0 per channel. The division by s is free where the activation is made by something that
scales channel by channel: a LayerNormalization, a Mul by a constant, or a linear layer.
Source: Xiao et al. 2022 (arXiv 2211.10438), eq. 4.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np
import onnx_ir as ir

from lowbit.graph.changed import Changed
from lowbit.graph.equalize import balance
from lowbit.graph.linear import Linear, linear_before, linear_layer
from lowbit.graph.weights import add_constant, constant, set_constant

NORMS = frozenset({"LayerNormalization", "RMSNormalization", "SimplifiedLayerNormalization"})


def smooth(
    program: ir.Model, maxima: Mapping[str, np.ndarray], *, strength: float = 0.5, insert: bool = False
) -> Changed:
    """Divide each activation that MatMuls and Gemms read by s, multiply their weights by s.

    maxima     largest absolute value of each channel (last axis), (channels,), by the name of the activation
    strength   α of eq. 4: s = max|X|^α / max|W|^(1-α)
    insert     where nothing before can take the division, put a Mul there (one elementwise operator more); without it
               such activations are left. Other readers of the activation, a residual for one, keep the original
    """
    done: list[str] = []
    kept: list[str] = []
    for value, layers, taker, reason in list(_found(program)):
        seen = maxima.get(str(value.name))
        if taker is None and not insert:
            kept.append(f"'{value.name}' kept: {reason}")
            continue
        if seen is None or seen.shape != (layers[0].inputs,):
            continue
        weights = np.concatenate([layer.by_input() for layer in layers], axis=1)
        scale = balance(seen, weights, strength)
        if taker is None:
            _insert_mul(value, layers, 1 / scale)
        else:
            _divide(taker, scale)
        for layer in layers:
            layer.scale_inputs(scale)
        done.append(f"'{value.name}' smoothed into {', '.join(repr(layer.node.name) for layer in layers)}")
    return Changed(tuple(done), tuple(kept))


def smoothable(program: ir.Model) -> list[str]:
    """The activations that can be smoothed without an operator more: what `maxima` is wanted of."""
    return [str(value.name) for value, _, taker, _ in _found(program) if taker is not None]


def _found(program: ir.Model) -> Iterator[tuple[ir.Value, list[Linear], ir.Node | Linear | None, str]]:
    """(activation, MatMuls and Gemms that read it, what can take the division or None, why none)."""
    for value in [value for node in program.graph for value in node.outputs]:
        layers = [layer for layer in map(linear_layer, value.consumers()) if layer is not None and _reads(layer, value)]
        if layers:
            everyone = len(value.uses()) == len(layers) and not value.is_graph_output()
            taker = _taker(value, layers[0].inputs) if everyone else None
            yield value, layers, taker, "nothing before it scales by channel" if everyone else "it has other readers"


def _reads(layer: Linear, value: ir.Value) -> bool:
    """Whether a MatMul or Gemm reads the value as its activation."""
    return layer.node.op_type in ("MatMul", "Gemm") and layer.node.inputs[0] is value


def _taker(value: ir.Value, channels: int) -> ir.Node | Linear | None:
    """What makes the value and can be made to divide it by channel: a norm, a constant Mul, a linear layer."""
    producer = value.producer()
    if producer is None:
        return None
    if producer.op_type in NORMS or producer.op_type == "Mul":
        parts = [constant(v) for v in producer.inputs[1 if producer.op_type in NORMS else 0 :]]
        given = [part for part in parts if part is not None]
        axis = producer.attributes.get("axis")
        last = axis is None or axis.as_int() in (-1, _rank(value) - 1)
        fits = bool(given) and given[0].shape[-1:] == (channels,) and all(p.size == channels for p in given)
        return producer if fits and last else None
    layer = linear_before(value)
    return layer if layer is not None and layer.node.op_type in ("MatMul", "Gemm") else None


def _rank(value: ir.Value) -> int:
    return -1 if value.shape is None else int(value.shape.rank())


def _divide(taker: ir.Node | Linear, scale: np.ndarray) -> None:
    if isinstance(taker, Linear):
        taker.scale_outputs(1 / scale)
        return
    for index, value in enumerate(taker.inputs):
        array = constant(value)
        if array is not None:
            set_constant(taker, index, array / scale, f"{taker.name}.smoothed_{index}")


def _insert_mul(value: ir.Value, layers: list[Linear], factor: np.ndarray) -> None:
    graph = layers[0].node.graph
    assert isinstance(graph, ir.Graph)
    dtype = layers[0].weight.dtype
    name = f"{value.name}_smoothed"
    node = ir.node("Mul", [value, add_constant(graph, f"{name}_factor", factor.astype(dtype))], name=name)
    node.outputs[0].name, node.outputs[0].shape, node.outputs[0].type = name, value.shape, value.type
    producer = value.producer()
    assert producer is not None
    producer.append(node)
    for layer in layers:
        layer.node.replace_input_with(0, node.outputs[0])
