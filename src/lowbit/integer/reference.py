"""The reference: what an integer program computes, by definition. Everything else is held against it byte for byte."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from lowbit.integer import kernels, sequence_kernels
from lowbit.integer.float32 import in_float32
from lowbit.integer.program import Add, AveragePool, Conv, Copy, Layer, MaxPool, Multiply, Program, Table
from lowbit.integer.sequences import HALVES, KINDS, Normalize, Product, Recurrent, Softmax, tanh_table
from lowbit.integer.tensors import Ints

Codes = dict[str, Ints]  # tensor name → (samples, size), as the codes lie in memory


def run(program: Program, inputs: Mapping[str, Ints]) -> Codes:
    """All tensors of the program for these input codes, each (samples, size) int8 or int16 in its order of memory."""
    samples = len(next(iter(inputs.values())))
    held: Codes = {t.name: np.ascontiguousarray(inputs[t.name].reshape(samples, -1), t.dtype) for t in program.inputs}
    for layer in program.layers:
        y = np.empty((samples, layer.output.size), layer.output.dtype)
        _KERNELS[type(layer)](layer, [held[t.name] for t in layer.inputs], y, program)
        held[layer.output.name] = y
    return held


def _convolve(layer: Conv, x: Sequence[Ints], y: Ints, program: Program) -> None:
    outputs = len(layer.weight) // layer.groups
    weight = layer.weight.reshape(layer.groups, outputs, *layer.weight.shape[1:])
    wide = np.int32 if layer.input.bits <= 8 else np.int64
    weight, total = np.ascontiguousarray(np.moveaxis(weight, 1, -1).astype(wide)), np.zeros(len(layer.weight), wide)
    multiplier, shift = layer.rescale.multiplier.astype(np.int64), layer.rescale.shift.astype(np.int64)
    size, out, _, strides, pads, dilations = layer.window
    kernels.convolve(
        x[0], y, weight, total, layer.bias, multiplier, shift, layer.rescale.left, _rule(layer, program),
        size, out, strides, pads, dilations, layer.input.zero, _ends(layer),
    )  # fmt: skip


def _add(layer: Add, x: Sequence[Ints], y: Ints, program: Program) -> None:
    b = x[1] if layer.constant is None else layer.constant.reshape(1, -1)
    zeros, ends = (layer.a.zero, layer.b.zero), _ends(layer)
    if program.rounding == "twice":
        kernels.add_twice(x[0], b, y, zeros, tuple(factor.numbers for factor in layer.factors()), layer.sign, ends)
    else:
        kernels.add(x[0], b, y, zeros, layer.multipliers, layer.shift, ends)


def _multiply(layer: Multiply, x: Sequence[Ints], y: Ints, program: Program) -> None:
    b = x[1] if layer.constant is None else layer.constant.reshape(1, -1)
    kernels.multiply(
        x[0], b, y, (layer.a.zero, layer.b.zero), *layer.rescale.numbers, _rule(layer, program), _ends(layer)
    )


def _rule(layer: Conv | Multiply | Product, program: Program) -> int:
    return kernels.RULES["once" if program.rounding == "onnxruntime" and not in_float32(layer) else program.rounding]


def _average(layer: AveragePool, x: Sequence[Ints], y: Ints, program: Program) -> None:
    if program.rounding == "twice" and layer.whole:
        kernels.mean_twice(x[0], y, layer.output.size, layer.input.zero, layer.factor().numbers, _ends(layer))
        return
    size, out, taps, strides, pads, _ = layer.window
    kernels.average(
        x[0], y, size, out, taps, strides, pads, layer.count_padding, layer.input.zero, layer.multiplier, layer.shift,
        _ends(layer),
    )  # fmt: skip


def _largest(layer: MaxPool, x: Sequence[Ints], y: Ints, program: Program) -> None:
    kernels.largest(x[0], y, *layer.window)


def _look_up(layer: Table, x: Sequence[Ints], y: Ints, program: Program) -> None:
    if layer.input.bits > 8:
        kernels.interpolate(x[0], y, layer.table)
    else:
        y[:] = layer.table[x[0].astype(np.int16) + 128]


def _copy(layer: Copy, x: Sequence[Ints], y: Ints, program: Program) -> None:
    if layer.fill is not None:
        y[:] = layer.fill
    for piece in layer.pieces:
        read = np.add.reduce(np.meshgrid(*_walks(piece.counts, piece.read_steps), indexing="ij")) + piece.read_from
        write = np.add.reduce(np.meshgrid(*_walks(piece.counts, piece.write_steps), indexing="ij")) + piece.write_to
        y[:, write.reshape(-1)] = x[piece.source][:, read.reshape(-1)]


def _product(layer: Product, x: Sequence[Ints], y: Ints, program: Program) -> None:
    rows, columns = layer.output.shape[-2:]
    sizes = layer.output.size // (rows * columns), rows, columns, layer.depth
    zeros = layer.a.zero, layer.b.zero
    sequence_kernels.product(x[0], x[1], y, sizes, zeros, *layer.rescale.numbers, _rule(layer, program), _ends(layer))


def _softmax(layer: Softmax, x: Sequence[Ints], y: Ints, program: Program) -> None:
    sequence_kernels.softmax(x[0], y, layer.length, layer.exponent, layer.factor, HALVES, _ends(layer))


def _normalize(layer: Normalize, x: Sequence[Ints], y: Ints, program: Program) -> None:
    weight, bias = layer.weight.astype(np.int64), layer.bias.astype(np.int64)
    sequence_kernels.normalize(x[0], y, weight, bias, layer.shift, layer.epsilon, _ends(layer))


def _recurrent(layer: Recurrent, x: Sequence[Ints], y: Ints, program: Program) -> None:
    samples, hidden = len(x[0]), layer.hidden
    states = [state.copy() for state in x[1:]] or [np.zeros((samples, hidden), np.int16) for _ in range(2)]
    factors = layer.rescale, layer.again
    multipliers, shifts = (
        tuple(getattr(factor, key).astype(np.int64) for factor in factors) for key in ("multiplier", "shift")
    )
    sequence_kernels.recurrent(
        x[0].reshape(samples, layer.steps, -1), states[0], states[-1], y.reshape(samples, -1, hidden),
        KINDS.index(layer.kind), layer.reverse, (layer.weight, layer.recurrent), (layer.bias, layer.bias_recurrent),
        multipliers, shifts, tuple(factor.left for factor in factors), tanh_table(),
    )  # fmt: skip


def _walks(counts: Sequence[int], steps: Sequence[int]) -> list[Ints]:
    return [np.arange(count) * step for count, step in zip(counts, steps, strict=True)]


def _ends(layer: Conv | Add | Multiply | AveragePool | Product | Softmax | Normalize) -> tuple[int, int, int]:
    return layer.output.zero, layer.low, layer.high


_KERNELS: Mapping[type[Layer], Callable[[Any, Sequence[Ints], Ints, Program], None]] = {
    Conv: _convolve,
    Add: _add,
    Multiply: _multiply,
    AveragePool: _average,
    MaxPool: _largest,
    Table: _look_up,
    Copy: _copy,
    Product: _product,
    Softmax: _softmax,
    Normalize: _normalize,
    Recurrent: _recurrent,
}
