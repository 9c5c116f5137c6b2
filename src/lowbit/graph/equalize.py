"""Cross-layer equalization: a positive scale moved through an activation from one layer to the next.

relu(s·x) = s·relu(x) for s > 0, so channel i of a layer may be divided by s_i and the weights that read it multiplied
by s_i: the same network, with ranges that fit few bits. Exact through Relu, pooling and the like; a ReLU6 has a
ceiling, which does not scale.
Source: Nagel et al. 2019 (arXiv 1906.04721), eq. 8-11.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from lowbit.graph.changed import Changed
from lowbit.graph.homogeneous import passes_scale, relu_ceiling
from lowbit.graph.layer import Layer, linear_before, linear_layer
from lowbit.graph.weights import only_reader

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
    def ceilings(self) -> list[ir.Node]:
        """The ReLU6 between the two."""
        return [node for node in self.between if relu_ceiling(node) not in (None, float("inf"))]

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
            scale = bounded_step(np.sqrt(np.divide(r1, r2, out=np.ones_like(r1), where=(r1 > 0) & (r2 > 0))))
            pair.move(scale)
            moved = max(moved, float(np.abs(np.log(scale)).max(initial=0)))
        if moved < 1e-3:
            break
    return Changed(tuple(f"weights of {pair} equalized" for pair in pairs), tuple(kept))


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


def bounded_step(scale: np.ndarray) -> np.ndarray:
    """At most LARGEST_STEP, at least its inverse."""
    clipped: np.ndarray = np.clip(scale, 1 / LARGEST_STEP, LARGEST_STEP)
    return clipped
