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
from lowbit.graph.channels import LARGEST_FACTOR
from lowbit.graph.layer import Layer, linear_before, linear_layer
from lowbit.graph.weights import constant, set_constant

NORMS = frozenset({"LayerNormalization", "RMSNormalization", "SimplifiedLayerNormalization"})


def smooth(program: ir.Model, maxima: Mapping[str, np.ndarray]) -> Changed:
    """Divide each activation that MatMuls and Gemms read by s, multiply their weights by s, where that is free.

    maxima   largest absolute value of each channel (last axis), (channels,), by the name of the activation
    """
    done: list[str] = []
    for value, layers, maker in list(_found(program)):
        seen = maxima.get(str(value.name))
        if seen is not None and seen.shape == (layers[0].inputs,):
            scale = balance(seen, np.concatenate([layer.by_input() for layer in layers], axis=1))
            _divide(maker, scale)
            for layer in layers:
                layer.scale_inputs(scale)
            done.append(f"'{value.name}' smoothed into {', '.join(repr(layer.node.name) for layer in layers)}")
    return Changed(tuple(done))


def smoothable(program: ir.Model) -> list[str]:
    """The activations that `smooth` wants the maxima of."""
    return [str(value.name) for value, _, _ in _found(program)]


def balance(maxima: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """What to divide each channel by, (channels,): √(x / w), scaled to a geometric mean of one: eq. 4 with α = ½.

    maxima    (channels,) largest absolute activation
    weights   (channels, n) the weights that read each channel
    Channels that are always zero, or that nobody reads, keep 1.
    """
    x, w = np.abs(np.asarray(maxima, dtype=np.float64)), np.abs(weights).max(1)
    alive = (x > 0) & (w > 0)
    scale = np.ones_like(x)
    scale[alive] = x[alive] ** 0.5 / w[alive] ** 0.5
    if alive.any():
        scale[alive] /= np.exp(np.log(scale[alive]).mean())
    bounded: np.ndarray = np.clip(scale, 1 / LARGEST_FACTOR, LARGEST_FACTOR)
    return bounded


def _found(program: ir.Model) -> Iterator[tuple[ir.Value, list[Layer], ir.Node | Layer]]:
    """(activation, MatMuls and Gemms that alone read it, what makes it and can divide it by channel)."""
    for value in [value for node in program.graph for value in node.outputs]:
        layers = [layer for layer in map(linear_layer, value.consumers()) if layer is not None and _reads(layer, value)]
        if layers and len(value.uses()) == len(layers) and not value.is_graph_output():
            maker = _maker(value, layers[0].inputs)
            if maker is not None:
                yield value, layers, maker


def _reads(layer: Layer, value: ir.Value) -> bool:
    return layer.kind.reads == "channels" and layer.node.inputs[0] is value


def _maker(value: ir.Value, channels: int) -> ir.Node | Layer | None:
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
    return layer if layer is not None and layer.kind.reads == "channels" else None


def _rank(value: ir.Value) -> int:
    return -1 if value.shape is None else int(value.shape.rank())


def _divide(maker: ir.Node | Layer, scale: np.ndarray) -> None:
    if isinstance(maker, Layer):
        maker.scale_outputs(1 / scale)
        return
    for index, value in enumerate(maker.inputs):
        array = constant(value)
        if array is not None:
            set_constant(maker, index, array / scale, f"{maker.name}.smoothed_{index}")
