"""Cross-layer equalization: a positive scale moved through an activation from one layer to the next.

relu(s·x) = s·relu(x) for s > 0, so channel i of a layer may be divided by s_i and the weights that read it multiplied
by s_i: the same network, with ranges that fit few bits. Exact through Relu, pooling and the like; a ReLU6 has a
ceiling, which does not scale.
Source: Nagel et al. 2019 (arXiv 1906.04721), eq. 8-11; with activation maxima, the balance of Xiao et al. 2022
(arXiv 2211.10438), eq. 4, applied to convolutions.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from lowbit.graph.changed import Changed
from lowbit.graph.homogeneous import passes_scale, relu_ceiling
from lowbit.graph.layer import Layer, linear_before, linear_layer
from lowbit.graph.weights import only_reader, set_constant

LARGEST_STEP = 1e4  # a channel is never scaled by more in one step: a dead channel must not become infinite


@dataclass(frozen=True)
class Pair:
    """Two layers with only operators between them that pass a scale; nobody else sees what passes.

    between   from the second layer back to the first
    """

    first: Layer
    between: tuple[ir.Node, ...]
    second: Layer

    @property
    def value(self) -> str:
        """The value that the second layer reads."""
        return str(self.second.node.inputs[0].name)  # type: ignore[union-attr]

    @property
    def ceilings(self) -> list[ir.Node]:
        """The ReLU6 between the two."""
        return [node for node in self.between if relu_ceiling(node) not in (None, float("inf"))]

    @property
    def depthwise(self) -> bool:
        """Whether the second layer reads each channel alone."""
        return self.second.groups == self.second.inputs > 1

    def move(self, scale: np.ndarray) -> None:
        """Divide the channels between the two by `scale`, (channels,)."""
        self.first.scale_outputs(1 / scale)
        self.second.scale_inputs(scale)

    def __str__(self) -> str:
        return f"'{self.first.node.name}' → '{self.second.node.name}'"


def equalize_weights(program: ir.Model, rounds: int = 20) -> Changed:
    """Give both layers of each pair the same range of weights, channel by channel; needs no data.

    s_i = √(r1_i / r2_i), r1 the largest weight of output channel i of the first layer, r2 of input channel i of the
    second; repeated over all pairs until nothing moves by more than 0.1 %, at most `rounds` times.
    """
    found, kept = pairs_of(program)
    kept += [f"{p} kept: '{p.ceilings[0].name}' has a ceiling, which does not scale" for p in found if p.ceilings]
    pairs = [pair for pair in found if not pair.ceilings]
    for _ in range(rounds):
        moved = 0.0
        for pair in pairs:
            r1 = np.abs(pair.first.by_output()).max(1)
            r2 = np.abs(pair.second.by_input()).max(1)
            scale = _bounded(np.sqrt(np.divide(r1, r2, out=np.ones_like(r1), where=(r1 > 0) & (r2 > 0))))
            pair.move(scale)
            moved = max(moved, float(np.abs(np.log(scale)).max(initial=0)))
        if moved < 1e-3:
            break
    return Changed(tuple(f"weights of {pair} equalized" for pair in pairs), tuple(kept))


def equalizable(program: ir.Model) -> dict[str, int]:
    """The activations that `equalize_channels` wants the maxima of → axis of their channels."""
    return {pair.value: 1 for pair in pairs_of(program)[0] if pair.depthwise}


def equalize_channels(program: ir.Model, maxima: Mapping[str, np.ndarray]) -> Changed:
    """Give all channels before a depthwise layer the same range: it has one scale a channel, so it loses nothing.

    maxima   largest absolute value of each channel, (channels,), by the name of the value that the second layer reads

    A ReLU6 becomes one ceiling above all channels: those that reached 6 reach it, the others do not, on the data seen.
    So it is stated as approximate.
    """
    pairs, kept = pairs_of(program)
    done: list[str] = []
    exact = True
    for pair in pairs:
        seen = maxima.get(pair.value)
        if not pair.depthwise or seen is None or seen.shape != (pair.second.inputs,):
            continue
        scale = balance(seen, pair.second.by_input(), 1.0)
        pair.move(scale)
        for node in pair.ceilings:
            exact = False
            set_constant(node, 2, np.array((seen / scale).max()), f"{node.name}.ceiling")
        done.append(f"channels of '{pair.value}' equalized between {pair}")
    return Changed(tuple(done), tuple(kept), exact)


def balance(maxima: np.ndarray, weights: np.ndarray, strength: float) -> np.ndarray:
    """What to divide each channel by, (channels,): x^strength / w^(1-strength), scaled to a geometric mean of one.

    maxima    (channels,) largest absolute activation
    weights   (channels, n) the weights that read each channel
    Channels that are always zero, or that nobody reads, keep 1.
    """
    x, w = np.abs(np.asarray(maxima, dtype=np.float64)), np.abs(weights).max(1)
    alive = (x > 0) & (w > 0)
    scale = np.ones_like(x)
    scale[alive] = x[alive] ** strength / w[alive] ** (1 - strength)
    if alive.any():
        scale[alive] /= np.exp(np.log(scale[alive]).mean())
    return _bounded(scale)


def pairs_of(program: ir.Model) -> tuple[list[Pair], list[str]]:
    """All pairs of layers between which a scale passes, and in words those that fail nearly."""
    pairs: list[Pair] = []
    kept: list[str] = []
    for node in program.graph:
        second = linear_layer(node)
        if second is None:
            continue
        axis = second.channel_axis(node.inputs[0])
        value, between = node.inputs[0], list[ir.Node]()
        alone = only_reader(value) is node
        while alone and value is not None and axis is not None and passes_scale(value.producer(), axis):
            step = value.producer()
            assert step is not None
            between.append(step)
            value = step.inputs[0]
            alone = only_reader(value) is step
        first = linear_before(value)
        if first is None:
            continue
        if not alone:
            kept.append(f"'{first.node.name}' → '{node.name}' kept: what passes has other readers")
        elif first.outputs != second.inputs or axis is None or axis != first.channel_axis(first.output):
            kept.append(f"'{first.node.name}' → '{node.name}' kept: their channels do not correspond")
        else:
            pairs.append(Pair(first, tuple(between), second))
    return pairs, kept


def _bounded(scale: np.ndarray) -> np.ndarray:
    clipped: np.ndarray = np.clip(scale, 1 / LARGEST_STEP, LARGEST_STEP)
    return clipped
