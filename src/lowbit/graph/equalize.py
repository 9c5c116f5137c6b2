"""Cross-layer equalization: a positive scale moved through an activation from one layer to the next.

relu(s·x) = s·relu(x) for s > 0, so channel i of a layer may be divided by s_i and the weights that read it multiplied
by s_i: the same network, with ranges that fit few bits. Exact through Relu, pooling and the like; a ReLU6 has a
ceiling, which does not scale.
Source: Nagel et al. 2019 (arXiv 1906.04721), eq. 8-11.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from lowbit.graph.changed import Changed
from lowbit.graph.homogeneous import passes_scale, relu_ceiling
from lowbit.graph.layer import Layer, linear_before, linear_layer
from lowbit.graph.weights import only_reader

LARGEST_STEP = 1e4  # a channel is never scaled by more in one step: a dead channel must not become infinite


def equalize_weights(program: ir.Model, rounds: int = 20) -> Changed:
    """Give both layers of each pair the same range of weights, channel by channel; needs no data.

    s_i = √(r1_i / r2_i), r1 the largest weight of output channel i of the first layer, r2 of input channel i of the
    second; repeated over all pairs until nothing moves by more than 0.1 %, at most `rounds` times.
    """
    pairs, kept = pairs_of(program)
    for _ in range(rounds):
        moved = 0.0
        for first, second in pairs:
            r1, r2 = np.abs(first.by_output()).max(1), np.abs(second.by_input()).max(1)
            scale = bounded_step(np.sqrt(np.divide(r1, r2, out=np.ones_like(r1), where=(r1 > 0) & (r2 > 0))))
            first.scale_outputs(1 / scale)
            second.scale_inputs(scale)
            moved = max(moved, float(np.abs(np.log(scale)).max(initial=0)))
        if moved < 1e-3:
            break
    done = [f"weights of '{first.node.name}' → '{second.node.name}' equalized" for first, second in pairs]
    return Changed(tuple(done), tuple(kept))


def pairs_of(program: ir.Model) -> tuple[list[tuple[Layer, Layer]], list[str]]:
    """All pairs of layers between which a scale passes, and in words those that fail nearly.

    Nobody but the second layer sees what passes between the two.
    """
    pairs: list[tuple[Layer, Layer]] = []
    kept: list[str] = []
    for node in program.graph:
        second = linear_layer(node)
        if second is None:
            continue
        axis, value, reader = second.channel_axis(node.inputs[0]), node.inputs[0], node
        while value is not None and axis is not None and only_reader(value) is reader:
            step = value.producer()
            if step is None or not passes_scale(step, axis):
                break
            value, reader = step.inputs[0], step
        first, step = linear_before(value), None if value is None else value.producer()
        if first is None and step is not None and relu_ceiling(step) is not None:
            kept.append(f"'{node.name}' kept: '{step.name}' has a ceiling, which does not scale")
        elif first is not None and only_reader(value) is not reader:
            kept.append(f"'{first.node.name}' → '{node.name}' kept: what passes has other readers")
        elif first is not None and (first.outputs != second.inputs or axis != first.channel_axis(first.output)):
            kept.append(f"'{first.node.name}' → '{node.name}' kept: their channels do not correspond")
        elif first is not None and axis is not None:
            pairs.append((first, second))
    return pairs, kept


def bounded_step(scale: np.ndarray) -> np.ndarray:
    """At most LARGEST_STEP, at least its inverse."""
    clipped: np.ndarray = np.clip(scale, 1 / LARGEST_STEP, LARGEST_STEP)
    return clipped
