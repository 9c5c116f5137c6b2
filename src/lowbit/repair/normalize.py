"""Channels and rows of what an integer product reads, normalized where that makes its rounding errors small enough.

The channels that stand out belong to the network, not to its inputs: made-up inputs tell them as well as real ones
(MiniLM's outputs, STS-B's test set: 18.4 dB as they are, 26.9 with what 64 random tokens tell). How large a row is,
only its input tells, so only products that measure their ranges have their rows normalized.
"""

from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from typing import Any

import numpy as np
import onnx_ir as ir

from lowbit.engines.compile import ENGINES, Batch
from lowbit.graph.layer import RECURRENT, Layer, layers_of, linear_layer
from lowbit.graph.normalize import SMALLEST, by_input, normalize
from lowbit.graph.smooth import balance
from lowbit.recipe import TensorSpec

BATCHES = 4  # that are looked at
LEAST_ROWS = 64  # to tell channels apart: the largest of 2 normal numbers a channel differ by chance
# dB of noise that it must save, because each costs operators: a factor for each channel one, for each row five.
CHANNELS_COST, ROWS_COST = 1.0, 3.0
Array = np.ndarray[Any, Any]
Specs = Callable[[ir.Node], TensorSpec]


def normalize_inputs(program: ir.Model, specs: Specs, batches: Iterable[Batch]) -> list[str]:
    """Normalize what MatMuls, Gemms and recurrent layers quantize, in place. What was done.

    specs   what the recipe says of a node's activations
    """
    found = {str(value.name): (value, layers) for value, layers in _found(program.graph, specs)}
    if not found:
        return []
    run = ENGINES["onnxruntime"].compile(program, outputs=list(found))
    seen: dict[str, list[Array]] = {name: [] for name in found}
    for batch in islice(batches, BATCHES):
        for name, array in run(dict(batch)).items():
            if name in seen and array.size and np.isfinite(array).all():
                seen[name].append(array)
    # All by the weights as they are: factors that go into the layer of an attention's values change its outputs' sizes.
    chosen = {
        name: _chosen(seen[name], value, layers, all(specs(layer.node).dynamic for layer in layers))
        for name, (value, layers) in found.items()
    }
    done = []
    for name, (value, layers) in reversed(found.items()):  # what a layer makes is another value afterwards
        channels, rows, saved = chosen[name]
        if channels is not None or rows:
            normalize(program.graph, value, layers, channels, rows)
            what = " and ".join(["channels"] * (channels is not None) + ["rows"] * rows)
            done.append(f"{what} of '{name}' normalized: {saved:.0f} dB less noise in what reads it")
    return done


def _chosen(
    arrays: list[Array], value: ir.Value, layers: list[Layer], measured: bool
) -> tuple[Array | None, bool, float]:
    """Factors of the channels, whether rows are normalized, and the dB that both save."""
    shape, weights = value.shape, np.concatenate([by_input(layer) for layer in layers], axis=1)
    if not arrays or shape is None or not weights.any():
        return None, False, 0.0
    own = all(len(layer.value.uses()) == 1 for layer in layers)  # a weight that others read stays as it is
    own = own and sum(array.size for array in arrays) >= LEAST_ROWS * len(weights)
    largest = np.max([np.abs(array).reshape(-1, len(weights)).max(0) for array in arrays], axis=0)
    factors = [None, balance(largest, weights)] if own else [None]
    # A sample of one row has its own range already; a recurrent layer has one for all its steps.
    several = measured and shape.rank() > 2 and all(layer.node.op_type == "MatMul" for layer in layers)
    ways = [(channels, rows) for channels in factors for rows in ((False, True) if several else (False,))]
    noise = [_noise_db(arrays, weights, *way) for way in ways]
    costs = [CHANNELS_COST * (channels is not None) + ROWS_COST * rows for channels, rows in ways]
    best = min(range(len(ways)), key=lambda way: noise[way] + costs[way])
    return *ways[best], noise[0] - noise[best]


def _noise_db(arrays: list[Array], weights: Array, channels: Array | None, rows: bool) -> float:
    """Power of the noise in the products, up to a factor, when activations are rounded to steps of their range.

    arrays    (…, inputs) each measured for itself
    weights   (inputs, outputs)
    """
    factors = np.ones(len(weights)) if channels is None else channels
    scaled, noise = weights * factors[:, None], 0.0
    for array in arrays:
        x = array.reshape(-1, len(weights)) / factors
        size = np.maximum(np.abs(x).max(1, keepdims=True), SMALLEST) if rows else np.ones((len(x), 1))
        span = max((x / size).max(), 0) - min((x / size).min(), 0)
        noise += float(np.square(span * size).mean() * np.square(scaled).sum())
    return float(10 * np.log10(max(noise, SMALLEST)))


def _found(graph: ir.Graph, specs: Specs) -> Iterator[tuple[ir.Value, list[Layer]]]:
    """(value, the layers that quantize it), where a product with constant weights reads it."""
    for value in [*graph.inputs, *(value for node in graph for value in node.outputs)]:
        readers = [use.node for use in value.uses() if use.idx == 0]
        layers = [layer for node in readers if (layer := _reading(node, specs(node))) is not None]
        if layers and value.dtype is ir.DataType.FLOAT:
            yield value, layers


def _reading(node: ir.Node, activations: TensorSpec) -> Layer | None:
    """The weight that a MatMul, a Gemm or a measuring recurrent layer multiplies with what it quantizes."""
    if activations.format is None:
        return None
    if node.op_type in RECURRENT and activations.dynamic:
        return next((layer for layer in layers_of(node) if layer.index == 1), None)
    layer = linear_layer(node) if node.op_type in ("MatMul", "Gemm") else None
    return layer if layer is not None and layer.weight.ndim == 2 else None
