"""Cross-layer equalization: a positive scale moved through an activation from one layer to the next.

relu(s·x) = s·relu(x) for s > 0, so channel i of a layer may be divided by s_i and the weights that read it multiplied
by s_i: the same network, with ranges that fit few bits. Exact through Relu, pooling and the like; through ReLU6 only
where its ceiling is given up (it becomes a Relu), which is stated as approximate.
Source: Nagel et al. 2019 (arXiv 1906.04721), eq. 8-11; with activation maxima, the balance of Xiao et al. 2022
(arXiv 2211.10438), eq. 4, applied to convolutions.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from lowbit.graph.changed import Changed
from lowbit.graph.homogeneous import passes_scale, relu_ceiling, to_relu
from lowbit.graph.linear import Linear, linear_before, linear_layer
from lowbit.graph.weights import only_reader, set_constant

LARGEST_STEP = 1e4  # a channel is never scaled by more in one step: a dead channel must not become infinite


@dataclass(frozen=True)
class Pair:
    """Two layers with only operators between them that pass a scale; nobody else sees what passes.

    between   from the second layer back to the first
    """

    first: Linear
    between: tuple[ir.Node, ...]
    second: Linear

    @property
    def value(self) -> str:
        """The value that the second layer reads."""
        return str(self.second.node.inputs[0].name)  # type: ignore[union-attr]

    def __str__(self) -> str:
        return f"'{self.first.node.name}' → '{self.second.node.name}'"


def equalize_weights(program: ir.Model, *, drop_ceilings: bool = False, rounds: int = 20) -> Changed:
    """Give both layers of each pair the same range of weights, channel by channel; needs no data.

    s_i = √(r1_i / r2_i), r1 the largest weight of output channel i of the first layer, r2 of input channel i of the
    second; repeated over all pairs until nothing moves by more than 0.1 %, at most `rounds` times.
    drop_ceilings   make a ReLU6 between the two a Relu (approximate); otherwise such pairs are left
    """
    pairs, kept, exact = _usable(program, drop_ceilings)
    for _ in range(rounds):
        moved = 0.0
        for pair in pairs:
            r1 = np.abs(pair.first.by_output()).max(1)
            r2 = np.abs(pair.second.by_input()).max(1)
            scale = _positive(np.sqrt(np.divide(r1, r2, out=np.ones_like(r1), where=(r1 > 0) & (r2 > 0))))
            _move(pair, scale)
            moved = max(moved, float(np.abs(np.log(scale)).max(initial=0)))
        if moved < 1e-3:
            break
    return Changed(tuple(f"weights of {pair} equalized" for pair in pairs), tuple(kept), exact)


def equalize_activations(program: ir.Model, maxima: Mapping[str, np.ndarray], *, strength: float = 0.0) -> Changed:
    """Give the channels between the two layers of each pair the same range, at the cost of the second's weights.

    maxima     largest absolute value of each channel, (channels,), by the name of the value that the second layer reads
    strength   0 leaves the activations, 1 makes all their channels alike. A depthwise second layer has one scale a
               channel, so that it costs nothing there: there it is always 1

    s_i = x_i^strength / w_i^(1-strength), x the maxima, w the largest weight that reads channel i.
    At full strength a ReLU6 becomes one ceiling above all channels: those that reached 6 reach it, the others do not,
    on the data seen. So it is stated as approximate; at less strength such pairs are left.
    """
    pairs, kept = pairs_of(program)
    done: list[str] = []
    exact = True
    for pair in pairs:
        seen = maxima.get(pair.value)
        second = pair.second
        full = second.node.op_type == "Conv" and second.groups == second.inputs
        if not full and strength == 0:
            continue
        ceilings = [node for node in pair.between if relu_ceiling(node) not in (None, float("inf"))]
        if seen is None or seen.shape != (second.inputs,):
            kept.append(f"{pair} kept: no maximum of each channel was observed for '{pair.value}'")
            continue
        if ceilings and not (full or strength == 1):
            kept.append(f"{pair} kept: '{ceilings[0].name}' has a ceiling, which does not scale")
            continue
        scale = balance(seen, second.by_input(), 1.0 if full else strength)
        _move(pair, scale)
        for node in ceilings:
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
    return _positive(scale)


def pairs_of(program: ir.Model) -> tuple[list[Pair], list[str]]:
    """All pairs of layers between which a scale passes, and in words those that fail nearly."""
    pairs: list[Pair] = []
    kept: list[str] = []
    for node in program.graph:
        second = linear_layer(node)
        if second is None:
            continue
        axis = _channel_axis(second, second.node.inputs[0])
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
        elif first.outputs != second.inputs or axis is None or axis != _channel_axis(first, first.output):
            kept.append(f"'{first.node.name}' → '{node.name}' kept: their channels do not correspond")
        else:
            pairs.append(Pair(first, tuple(between), second))
    return pairs, kept


def _usable(program: ir.Model, drop_ceilings: bool) -> tuple[list[Pair], list[str], bool]:
    found, kept = pairs_of(program)
    pairs: list[Pair] = []
    exact = True
    for pair in found:
        clipped = [node for node in pair.between if relu_ceiling(node) not in (None, float("inf"))]
        if clipped and not drop_ceilings:
            kept.append(f"{pair} kept: '{clipped[0].name}' has a ceiling, which does not scale")
            continue
        for node in clipped:
            to_relu(node)
            exact = False
        pairs.append(pair)
    return pairs, kept, exact


def _channel_axis(layer: Linear, value: ir.Value | None) -> int | None:
    """Where a layer has its channels in what it reads or makes: axis 1, of a MatMul the last; None if not known."""
    if layer.node.op_type != "MatMul":
        return 1
    return None if value is None or value.shape is None else int(value.shape.rank()) - 1


def _move(pair: Pair, scale: np.ndarray) -> None:
    """Divide the channels between by `scale`: outputs of the first, and multiply what reads them in the second."""
    pair.first.scale_outputs(1 / scale)
    pair.second.scale_inputs(scale)


def _positive(scale: np.ndarray) -> np.ndarray:
    clipped: np.ndarray = np.clip(scale, 1 / LARGEST_STEP, LARGEST_STEP)
    return clipped
