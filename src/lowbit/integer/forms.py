"""The integer form of each operator that computes: its node and what it reads → a layer that waits for a scale."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from types import MappingProxyType

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from lowbit.errors import UnsupportedError
from lowbit.graph.layer import number
from lowbit.graph.pads import pads_of
from lowbit.integer.program import Add, AveragePool, Conv, Layer, MaxPool, Multiply
from lowbit.integer.tensors import Ints, Rescale, Tensor
from lowbit.integer.values import Coded, Constant, Waiting, channels_last, onnx_shape

Read = Mapping[int, Coded | Constant]
Triple = tuple[int, int, int]


# ---- products with a weight ----------------------------------------------------------------------------------------


def conv(node: ir.Node, read: Read) -> Waiting:
    data, weight = data_of(read), weight_of(read[1], outputs_axis=0)
    rank = weight.array.ndim - 2
    kernel = weight.array.shape[2:]
    front, _ = _pads(node, onnx_shape(data)[2:], kernel)
    steps = {"strides": _ints(node, "strides", rank), "pads": front, "dilations": _ints(node, "dilations", rank)}
    codes = np.moveaxis(weight.array, 1, -1)  # channels behind the kernel's positions
    codes = codes.reshape(len(codes), *_triple(kernel), codes.shape[-1])
    shape = shape_of(node)
    groups = int(number(node, "group", 1))
    return _product(node, data, codes, weight, read.get(2), shape, channels_last(len(shape)), groups, **steps)


def conv_transpose(node: ir.Node, read: Read) -> Waiting:
    """A convolution with the kernel turned round, over an input that zeros were put into (`layout.spread`)."""
    data, weight = data_of(read), weight_of(read[1], outputs_axis=1)
    if node.attributes.get_string("auto_pad", "NOTSET") != "NOTSET" or "output_shape" in node.attributes:
        raise UnsupportedError("a ConvTranspose with auto_pad or output_shape")
    inputs, outputs, *kernel = weight.array.shape
    groups, rank, shape = int(number(node, "group", 1)), len(kernel), shape_of(node)
    codes = weight.array.reshape(groups, inputs // groups, outputs, *kernel).swapaxes(1, 2)
    codes = np.moveaxis(np.flip(codes, tuple(range(3, 3 + rank))), 2, -1)
    codes = codes.reshape(groups * outputs, *_triple(kernel), inputs // groups)
    if weight.scale is not None and weight.scale.size > 1:
        weight = replace(weight, scale=np.tile(weight.scale.reshape(-1), groups))
    dilations = _ints(node, "dilations", rank)
    given = zip(kernel, dilations, _ints(node, "pads", 2 * rank, 0), strict=False)
    front = [(taps - 1) * dilation - pad for taps, dilation, pad in given]
    if min(front) < 0:
        raise UnsupportedError("a ConvTranspose whose pads are larger than its kernel")
    order, steps = channels_last(len(shape)), {"strides": [1] * rank, "pads": front, "dilations": dilations}
    return _product(node, data, codes, weight, read.get(2), shape, order, groups, **steps)


def gemm(node: ir.Node, read: Read) -> Waiting:
    if number(node, "transA") or number(node, "alpha", 1) != 1 or number(node, "beta", 1) != 1:
        raise UnsupportedError("Gemm with alpha, beta or transA")
    axis = 0 if number(node, "transB") else 1
    return _matrix_product(node, read, axis, read.get(2))


def matmul(node: ir.Node, read: Read) -> Waiting:
    if not isinstance(read[1], Constant) or read[1].array.ndim != 2:
        raise UnsupportedError("MatMul of two activations")
    return _matrix_product(node, read, 1, None)


def _matrix_product(node: ir.Node, read: Read, outputs_axis: int, bias: Coded | Constant | None) -> Waiting:
    data, weight = data_of(read), weight_of(read[1], outputs_axis)
    codes = weight.array if outputs_axis == 0 else weight.array.T
    codes = codes.reshape(len(codes), 1, 1, 1, -1)
    shape = shape_of(node)
    return _product(node, data, codes, weight, bias, shape, tuple(range(len(shape))), 1)


def _product(
    node: ir.Node, data: Tensor, codes: Ints, weight: Constant, bias: Coded | Constant | None,
    shape: tuple[int, ...], order: tuple[int, ...], groups: int,
    strides: Sequence[int] = (), pads: Sequence[int] = (), dilations: Sequence[int] = (),
) -> Waiting:  # fmt: skip
    assert weight.scale is not None
    outputs = len(codes)
    scales = np.broadcast_to(weight.scale.astype(np.float64).reshape(-1), (outputs,))
    products = scales * data.scale  # what one step of the accumulator stands for
    sums = codes.reshape(outputs, -1).astype(np.int64).sum(1)

    def waiting(added: Ints) -> Waiting:
        def finish(output: Tensor, low: int, high: int) -> Layer:
            bias = added - data.zero * sums
            if np.abs(bias).max(initial=0) >= 2**31:
                raise UnsupportedError("a bias that does not fit in 32 bits")
            rescale = Rescale.of(products / output.scale)
            return Conv(
                output.name, data, output, np.ascontiguousarray(codes.astype(np.int8)), bias.astype(np.int32), rescale,
                _triple(strides), _triple(pads, 0), _triple(dilations), groups, low, high,
                weight_scale=scales,
            )  # fmt: skip

        def add_bias(constant: Constant) -> Waiting:
            return waiting(added + _bias_codes(constant, products))

        return Waiting(finish, shape, order, add_bias=add_bias)

    if bias is not None and not isinstance(bias, Constant):
        raise UnsupportedError("a bias that is computed")
    return waiting(np.zeros(outputs, np.int64) if bias is None else _bias_codes(bias, products))


def _bias_codes(bias: Constant, products: NDArray[np.float64]) -> Ints:
    """int64, (outputs,): the bias in steps of the accumulator; the file's own codes where it holds them."""
    if bias.scale is not None and bias.array.dtype == np.int32:
        scale = np.broadcast_to(bias.scale.astype(np.float64).reshape(-1), products.shape)
        if np.allclose(scale, products, rtol=1e-5, atol=0):
            return np.broadcast_to(bias.array.reshape(-1), products.shape).astype(np.int64)
    return np.rint(np.broadcast_to(bias.real().reshape(-1), products.shape) / products).astype(np.int64)


# ---- element by element --------------------------------------------------------------------------------------------


def add(a: Coded, b: Coded | Constant, sign: int = 1) -> Waiting:
    """a + sign · b; b's elements repeat along a."""
    first, (second, codes) = a.tensor, _operand(a, b)

    def finish(output: Tensor, low: int, high: int) -> Layer:
        ratios = np.array([first.scale, sign * second.scale]) / output.scale
        shift = min(40, 30 - int(np.frexp(np.abs(ratios).max())[1]))
        if shift < 1:
            raise UnsupportedError(f"an operand's scale is {np.abs(ratios).max():g} times the output's")
        multipliers = tuple(int(m) for m in np.rint(ratios * 2.0**shift))
        return Add(output.name, first, second, output, (multipliers[0], multipliers[1]), shift, low, high, codes)

    return Waiting(finish, a.shape, first.order)


def multiply(a: Coded, b: Coded | Constant) -> Waiting:
    first, (second, codes) = a.tensor, _operand(a, b)

    def finish(output: Tensor, low: int, high: int) -> Layer:
        rescale = Rescale.of(first.scale * second.scale / output.scale)
        return Multiply(output.name, first, second, output, rescale, low, high, codes)

    return Waiting(finish, a.shape, first.order)


def _operand(a: Coded, b: Coded | Constant) -> tuple[Tensor, Ints | None]:
    """b as a tensor whose elements repeat along a's memory, and its codes where it is a constant."""
    if isinstance(b, Coded):
        return b.tensor, None
    if b.scale is None:  # a bias that a step of the recipe has corrected: 16 bits hold it
        step = float(np.abs(b.array).max(initial=0)) / (2**15 - 1) or 1.0
        b = Constant(np.rint(b.array / step).astype(np.int16), np.array(step))
    if b.scale is None or b.scale.size != 1:
        raise UnsupportedError("an operand with several scales")
    offset = 128 if b.array.dtype == np.uint8 else 0
    codes = np.asarray(b.array.astype(np.int16) - offset)
    zero = 0 if b.zero is None else int(b.zero.reshape(())) - offset
    bits = 16 if b.array.dtype == np.int16 else 8
    rank, order = len(a.shape), a.tensor.order
    full = codes.reshape((1,) * (rank - codes.ndim) + codes.shape).transpose(order)
    if not repeats(full.shape, a.tensor.shape):
        full = np.broadcast_to(full, a.tensor.shape)
    full = np.ascontiguousarray(full.astype(np.int8 if bits == 8 else np.int16))
    return Tensor("", full.shape, order, float(b.scale.reshape(())), zero, bits), full


def repeats(shape: Sequence[int], along: Sequence[int]) -> bool:
    """Whether an operand's elements simply repeat along the other's memory: axes of 1 in front, equal axes behind."""
    start = next((i for i, size in enumerate(shape) if size != 1), len(shape))
    return tuple(shape[start:]) == tuple(along[start:])


# ---- pooling -------------------------------------------------------------------------------------------------------


def average_pool(node: ir.Node, read: Read) -> Waiting:
    data, rank = data_of(read), len(read[0].shape) - 2  # type: ignore[union-attr]
    positions = onnx_shape(data)[2:]
    if node.op_type == "GlobalAveragePool":
        kernel, strides, pads = list(positions), [1] * rank, [0] * rank
    else:
        kernel, strides = _ints(node, "kernel_shape", rank), _ints(node, "strides", rank)
        pads, behind = _pads(node, positions, kernel)
        counted = number(node, "count_include_pad") and any((*pads, *behind))
        if any(d != 1 for d in _ints(node, "dilations", rank)) or (number(node, "ceil_mode") and counted):
            raise UnsupportedError("an average with dilations, or with ceil_mode and counted padding")
    counted = bool(number(node, "count_include_pad"))
    return _average(data, shape_of(node), channels_last(rank + 2), kernel, strides, pads, counted)


def reduce_mean(node: ir.Node, read: Read) -> Waiting:
    """A mean over axes that lie beside each other in memory is an average over a line of positions."""
    data, rank = data_of(read), len(read[0].shape)  # type: ignore[union-attr]
    axes = read.get(1)
    if axes is not None and not isinstance(axes, Constant):
        raise UnsupportedError("axes that are computed")
    over = {int(axis) % rank for axis in (range(rank) if axes is None else axes.array.reshape(-1))} - {0}
    places = [place for place, axis in enumerate(data.order) if axis in over]
    shape = shape_of(node)
    if places != list(range(places[0], places[-1] + 1)):
        raise UnsupportedError("a mean over axes that do not lie together")
    sizes = data.shape
    parts = sizes[: places[0]], sizes[places[0] : places[-1] + 1], sizes[places[-1] + 1 :]
    outer, line, inner = (int(np.prod(part)) for part in parts)
    view = replace(data, shape=(1, outer, line, inner))
    keeps = len(shape) == rank
    order = data.order if keeps else tuple(sorted(range(len(shape))))
    kept = [axis for axis in data.order if axis not in over]
    if not keeps and kept != sorted(kept):
        raise UnsupportedError("a mean that leaves axes in another order")
    return _average(view, shape, order, (1, line), (1, line), (0, 0), False)


def _average(
    data: Tensor, shape: tuple[int, ...], order: tuple[int, ...],
    kernel: Sequence[int], strides: Sequence[int], pads: Sequence[int], counted: bool,
) -> Waiting:  # fmt: skip
    def finish(output: Tensor, low: int, high: int) -> Layer:
        multiplier, shift = _small_ratio(data.scale / output.scale)
        return AveragePool(
            output.name, data, output, _triple(kernel), _triple(strides), _triple(pads, 0), counted, multiplier, shift,
            low, high,
        )  # fmt: skip

    return Waiting(finish, shape, order)


def _small_ratio(ratio: float) -> tuple[int, int]:
    """ratio ≈ multiplier / 2^shift, 30 bits; powers of two exactly as (1, shift)."""
    mantissa, exponent = np.frexp(ratio)
    if mantissa == 0.5 and exponent <= 1:
        return 1, int(1 - exponent)
    if not -20 < exponent <= 16:
        raise UnsupportedError(f"an average whose input has {ratio:g} times the scale of its output")
    return round(mantissa * 2.0**30), int(30 - exponent)


def max_pool(node: ir.Node, read: Read) -> MaxPool:
    data, rank = data_of(read), len(read[0].shape) - 2  # type: ignore[union-attr]
    if len(node.outputs) > 1 and node.outputs[1].uses():
        raise UnsupportedError("the places of the largest values are asked for")
    positions, shape = onnx_shape(data)[2:], shape_of(node)
    if node.op_type == "GlobalMaxPool":
        kernel, strides, pads, dilations = list(positions), [1] * rank, [0] * rank, [1] * rank
    else:
        kernel, strides, dilations = (_ints(node, name, rank) for name in ("kernel_shape", "strides", "dilations"))
        pads, _ = _pads(node, positions, kernel)
    order = channels_last(len(shape))
    output = replace(data, name=str(node.outputs[0].name), shape=tuple(shape[axis] for axis in order), order=order)
    return MaxPool(output.name, data, output, _triple(kernel), _triple(strides), _triple(pads, 0), _triple(dilations))


# ---- attributes ----------------------------------------------------------------------------------------------------


def _pads(node: ir.Node, positions: Sequence[int], kernel: Sequence[int]) -> tuple[list[int], list[int]]:
    rank, auto = len(kernel), node.attributes.get_string("auto_pad") or "NOTSET"
    strides, dilations = _ints(node, "strides", rank), _ints(node, "dilations", rank)
    return pads_of(positions, kernel, strides, dilations, auto, _ints(node, "pads", 2 * rank, 0))


def _ints(node: ir.Node, name: str, count: int, default: int = 1) -> list[int]:
    attribute = node.attributes.get(name)
    return [default] * count if attribute is None else [int(n) for n in attribute.as_ints()]


def _triple(numbers: Sequence[int], default: int = 1) -> Triple:
    """Depth, height, width; axes that are not there come first."""
    if len(numbers) > 3:
        raise UnsupportedError(f"{len(numbers)} axes of positions; there can be 3")
    d, h, w = (*[default] * (3 - len(numbers)), *map(int, numbers))
    return d, h, w


def shape_of(node: ir.Node) -> tuple[int, ...]:
    shape = node.outputs[0].shape
    if shape is None or not all(isinstance(d, int) for d in shape):
        raise UnsupportedError(f"an output of unknown shape {shape}")
    return tuple(int(d) for d in shape)  # type: ignore[arg-type]


def data_of(read: Read, index: int = 0) -> Tensor:
    data = read[index]
    if not isinstance(data, Coded) or data.function is not None:
        raise UnsupportedError("its input is not quantized")
    return data.tensor


def weight_of(weight: Coded | Constant, outputs_axis: int) -> Constant:
    if not isinstance(weight, Constant) or weight.scale is None:
        raise UnsupportedError("a weight that is not stored in integers")
    if weight.zero is not None and np.any(weight.zero):
        raise UnsupportedError("weights with a zero point; they have to be symmetric")
    if weight.array.dtype != np.int8:
        raise UnsupportedError(f"weights in {weight.array.dtype}; they have to be int8")
    if weight.axis is not None and weight.axis % weight.array.ndim != outputs_axis and weight.scale.size > 1:
        raise UnsupportedError("weights with a scale for each input; it has to be one for each output")
    return weight


ORDERED: Mapping[str, Callable[[ir.Node, Read], Waiting]] = MappingProxyType(
    {"Gemm": gemm, "MatMul": matmul, "ReduceMean": reduce_mean}
)
"""Operator → its form; it reads its input in ONNX's order, or as it lies."""

OVER_POSITIONS: Mapping[str, Callable[[ir.Node, Read], Waiting]] = MappingProxyType(
    {"Conv": conv, "AveragePool": average_pool, "GlobalAveragePool": average_pool}
)
"""Operator → its form; it reads its input channels last."""
