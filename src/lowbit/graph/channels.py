"""Channels that one factor scales: where a positive factor can move from the weights before to the weights behind.

relu(s·x) = s·relu(x) for s > 0. So what makes a channel may divide it by s if all that read it multiply by s: the same
network. Channels that an Add, a Concat or a Relu ties together have one factor. A channel that leaves the program, or
that something else reads, keeps the factor 1. A ReLU6 has a ceiling, which does not scale.
Source: Nagel et al. 2019 (arXiv 1906.04721), section 4.1, for pairs of layers; here through residuals and Concat too.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from lowbit.graph.homogeneous import passes_scale, relu_ceiling
from lowbit.graph.layer import Layer, linear_layer
from lowbit.graph.weights import constant, set_constant

Ids = NDArray[np.int64]
Known = tuple[int, Ids]  # axis of the channels, the number of each one's factor

LARGEST_FACTOR = 1e4  # a dead channel must not become infinite


@dataclass(frozen=True)
class Channels:
    """Which channels have one factor.

    values    name of a value → axis of its channels, the number of each channel's factor
    makers    layers that can divide their outputs, with the numbers of these
    readers   layers that multiply what they read, with the numbers of these channels
    ceilings  ReLU6 and the like, with the numbers of what they clip
    free      (factors,) False: the factor is 1
    """

    values: dict[str, Known]
    makers: list[tuple[Layer, Ids]]
    readers: list[tuple[Layer, Ids]]
    ceilings: list[tuple[ir.Node, Ids]]
    free: NDArray[np.bool_]

    def divide(self, factors: NDArray[np.float64]) -> list[str]:
        """Divide each channel by its factor, (factors,), at most LARGEST_FACTOR; the layers whose outputs changed."""
        factors = np.where(self.free, np.clip(factors, 1 / LARGEST_FACTOR, LARGEST_FACTOR), 1.0)
        done = []
        for layer, ids in self.makers:
            if np.any(factors[ids] != 1):
                layer.scale_outputs(1 / factors[ids])
                done.append(str(layer.node.name))
        for layer, ids in self.readers:
            if np.any(factors[ids] != 1):
                layer.scale_inputs(factors[ids])
        return done

    def lift_ceilings(self, factors: NDArray[np.float64]) -> None:
        """Each clip at the largest ceiling that a channel needs: a channel that needs less is not clipped there."""
        for node, ids in self.ceilings:
            ceiling = relu_ceiling(node)
            assert ceiling is not None
            set_constant(node, 2, np.array((ceiling / factors[ids]).max()), f"{node.name}.ceiling")


def channels_of(program: ir.Model) -> Channels:
    """One walk through the program, in order."""
    return _Walk(program).result()


class _Walk:
    """tied: pairs of numbers that are one; fixed: numbers whose factor is 1. Numbers are merged at the end."""

    def __init__(self, program: ir.Model) -> None:
        self.count = 0
        self.values: dict[str, Known] = {}
        self.makers: list[tuple[Layer, Ids]] = []
        self.readers: list[tuple[Layer, Ids]] = []
        self.ceilings: list[tuple[ir.Node, Ids]] = []
        self.tied: list[NDArray[np.int64]] = [np.zeros((2, 0), np.int64)]
        self.fixed: list[Ids] = [np.zeros(0, np.int64)]
        layers = {node: layer for node in program.graph if (layer := linear_layer(node)) is not None}
        adds = {layer.add for layer in layers.values()}
        for node in program.graph:
            if node in layers:
                self._layer(layers[node])
            elif node not in adds:
                self._other(node)
        self._fix(program.graph.outputs)

    def result(self) -> Channels:
        pairs = np.concatenate(self.tied, axis=1)
        ties = coo_array((np.ones(pairs.shape[1]), tuple(pairs)), shape=(self.count, self.count))
        count, names = connected_components(ties, directed=False) if self.count else (0, np.zeros(0, np.int64))
        free = np.ones(count, bool)
        free[names[np.concatenate(self.fixed)]] = False
        makers, readers = ([(layer, names[ids]) for layer, ids in rows] for rows in (self.makers, self.readers))
        ceilings = [(node, names[ids]) for node, ids in self.ceilings]
        values = {name: (axis, names[ids]) for name, (axis, ids) in self.values.items()}
        return Channels(values, makers, readers, ceilings, free)

    def _new(self, count: int) -> Ids:
        self.count += count
        return np.arange(self.count - count, self.count)

    def _known(self, value: ir.Value | None) -> Known | None:
        return None if value is None else self.values.get(str(value.name))

    def _fix(self, values: Sequence[ir.Value | None]) -> None:
        self.fixed += [known[1] for value in values if (known := self._known(value)) is not None]

    def _layer(self, layer: Layer) -> None:
        read, own = layer.node.inputs[0], len(layer.value.uses()) == 1
        known = self._known(read)
        if known is not None and own and known[0] == layer.channel_axis(read) and len(known[1]) == layer.inputs:
            self.readers.append((layer, known[1]))
        else:
            self._fix([read])
        axis = layer.channel_axis(layer.output)
        if axis is not None and own and layer.has_own_bias:
            ids = self._new(layer.outputs)
            self.values[str(layer.output.name)] = axis, ids
            self.makers.append((layer, ids))

    def _other(self, node: ir.Node) -> None:
        known = [self._known(value) for value in node.inputs]
        if any(k is not None for k in known):
            made = self._made(node, known)
            if made is None:
                self._fix(node.inputs)
            else:
                self.values[str(node.outputs[0].name)] = made

    def _made(self, node: ir.Node, known: list[Known | None]) -> Known | None:
        """The channels of what a node makes, in which the factors of its inputs come out; None: they do not."""
        found = [k for k in known if k is not None]
        axis, ids = found[0]
        ranks = {None if v is None or v.shape is None else v.shape.rank() for v in node.inputs}
        if node.op_type in ("Add", "Concat") and len(found) == len(known) > 1 and len(ranks) == 1:
            (rank,) = ranks
            alike = rank is not None and all(k[0] == axis for k in found)
            if alike and node.op_type == "Concat" and node.attributes["axis"].as_int() in (axis, axis - (rank or 0)):
                return axis, np.concatenate([k[1] for k in found])
            if alike and all(len(k[1]) == len(ids) for k in found):
                self.tied += [np.stack([ids, k[1]]) for k in found[1:]]
                return axis, ids
            return None
        if known[0] is None or len(found) > 1:
            return None
        if (ceiling := relu_ceiling(node)) is not None and np.isfinite(ceiling):
            self.ceilings.append((node, ids))
            return axis, ids
        if node.op_type == "Pad":
            return self._padded(node, axis, ids)
        return (axis, ids) if passes_scale(node, axis) or _slices_beside(node, axis) else None

    def _padded(self, node: ir.Node, axis: int, ids: Ids) -> Known | None:
        """Channels of zeros may have any factor."""
        pads = constant(node.inputs[1])
        if pads is None or not passes_scale(node, axis) or (len(node.inputs) > 3 and node.inputs[3] is not None):
            return None
        before, after = int(pads[axis]), int(pads[axis + len(pads) // 2])
        return (axis, np.concatenate([self._new(before), ids, self._new(after)])) if min(before, after) >= 0 else None


def _slices_beside(node: ir.Node, axis: int) -> bool:
    """Whether it takes parts along other axes than the channels'."""
    value = node.inputs[0]
    axes = constant(node.inputs[3]) if node.op_type == "Slice" and len(node.inputs) > 3 else None
    return axes is not None and value is not None and value.shape is not None and axis not in axes % value.shape.rank()


def largest(rows: Iterator[tuple[NDArray[np.float64], Ids]], count: int) -> NDArray[np.float64]:
    """(count,) the largest of the values that belong to each number; 0 where there is none."""
    found = np.zeros(count)
    for values, ids in rows:
        np.maximum.at(found, ids, values)
    return found
