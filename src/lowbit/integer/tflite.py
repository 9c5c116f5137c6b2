"""The integer program as a TensorFlow Lite file: the same codes, for LiteRT and TFLite Micro.

Source: TFLite's schema, and its 8-bit quantization specification (int8 activations with a zero point, weights symmetric
for each output channel, NHWC). Written through the generated schema of the package `tflite`.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from lowbit.errors import UnsupportedError
from lowbit.integer.program import Add, AveragePool, Conv, Copy, Layer, MaxPool, Multiply, Program, Table
from lowbit.integer.tensors import Rescale, Tensor, spatial
from lowbit.integer.tflite_moves import moves
from lowbit.integer.tflite_writer import Writer

_SAME, _VALID = 0, 1
_NONE, _RELU, _RELU6 = 0, 1, 3


def write_tflite(program: Program) -> bytes:
    """The flatbuffer; UnsupportedError names the layers that TFLite has no operator for."""
    if uneven := [t.name for t in program.tensors() if t.bits > 8 and t.zero]:
        raise UnsupportedError(f"'{uneven[0]}': 16-bit codes in TFLite have no zero point. Quantize to int16.")
    writer = Writer(program.rounding)
    inputs, wrong = [writer.tensor(tensor) for tensor in program.inputs], []
    for layer in program.layers:
        try:
            if type(layer) not in _STEPS:
                raise UnsupportedError(f"a layer {type(layer).__name__}")
            _STEPS[type(layer)](writer, layer)
        except UnsupportedError as error:
            wrong.append(f"'{layer.name}': {error}")
    if wrong:
        raise UnsupportedError(f"these have no operator in TFLite: {'; '.join(wrong)}. Export them as C.")
    outputs = [writer.read(tensor) for tensor in program.outputs]
    return writer.file(inputs, outputs)


# ---- layers --------------------------------------------------------------------------------------------------------


def _conv(writer: Writer, layer: Conv) -> None:
    bias = layer.bias_without(layer.input.zero)
    if layer.weight.shape[1] != 1:
        raise UnsupportedError("a convolution over depth")
    bias_scale = layer.weight_scale.astype(np.float32) * np.float32(layer.input.scale)
    kind = np.int32 if layer.input.bits <= 8 else np.int64
    biases = writer.constant(f"{layer.name}/bias", bias.astype(kind), bias_scale)
    weight, scales = layer.weight[:, 0], layer.weight_scale
    activation = _activation(layer)
    if len(layer.input.shape) == 2 and writer.rounding != "twice":  # LiteRT's own kernel for it rounds once
        flat = writer.constant(f"{layer.name}/weight", layer.rows, scales)
        source = writer.latest.get(layer.input.name, layer.input)  # it flattens what it reads
        inputs = [writer.tensor(source), flat, biases]
        writer.operator("FULLY_CONNECTED", inputs, [writer.tensor(layer.output)], FusedActivationFunction=activation)
        return
    data, padding = _padded(writer, layer, weight.shape[1:3], layer.input.zero)
    options = {"Padding": padding, "StrideH": layer.strides[1], "StrideW": layer.strides[2]}
    options |= {"DilationHFactor": layer.dilations[1], "DilationWFactor": layer.dilations[2]}
    channels = layer.input.shape[-1]
    shaped = _four(layer.output)
    if layer.groups == channels and weight.shape[-1] == 1 and channels > 1:
        turned = np.moveaxis(weight[..., 0], 0, -1)[None]
        weights = writer.constant(f"{layer.name}/weight", np.ascontiguousarray(turned), scales, axis=3)
        options |= {"DepthMultiplier": len(weight) // channels, "FusedActivationFunction": activation}
        writer.operator("DEPTHWISE_CONV_2D", [data, weights, biases], [writer.tensor(shaped)], **options)
    else:
        weights = writer.constant(f"{layer.name}/weight", weight, scales)
        options["FusedActivationFunction"] = activation
        writer.operator("CONV_2D", [data, weights, biases], [writer.tensor(shaped)], **options)


def _four(tensor: Tensor) -> Tensor:
    """With height and width, as TFLite's spatial operators want it."""
    d, h, w, c = spatial(tensor)
    if d != 1:
        raise UnsupportedError("positions over depth")
    return replace(tensor, shape=(1, h, w, c))


def _padded(writer: Writer, layer: Conv | MaxPool, kernel: Sequence[int], fill: int) -> tuple[int, int]:
    """(tensor, padding): TFLite knows SAME and VALID, what is padded otherwise is padded first."""
    data, output = _four(layer.input), _four(layer.output)
    total, front = [], []
    for axis in (1, 2):
        reach = (kernel[axis - 1] - 1) * layer.dilations[axis] + 1
        total.append(max(0, (output.shape[axis] - 1) * layer.strides[axis] + reach - data.shape[axis]))
        front.append(layer.pads[axis])
    whole = [-(-data.shape[axis] // layer.strides[axis]) == output.shape[axis] for axis in (1, 2)]
    if not any(total) and not any(front):
        return writer.read(data), _VALID
    if all(whole) and front == [t // 2 for t in total]:
        return writer.read(data), _SAME
    behind = [max(0, t - f) for t, f in zip(total, front, strict=True)]
    pads = np.array([[0, 0], [front[0], behind[0]], [front[1], behind[1]], [0, 0]], np.int32)
    shape = tuple(int(size + before + after) for size, (before, after) in zip(data.shape, pads, strict=True))
    wide = replace(data, name=f"{layer.name}/padded", shape=shape)
    paddings = writer.constant(f"{layer.name}/pads", pads)
    if fill == data.zero:
        writer.operator("PAD", [writer.read(data), paddings], [writer.tensor(wide)])
    else:
        scale = np.array([data.scale])
        value = writer.constant(f"{layer.name}/fill", np.array([fill], data.dtype), scale, zero=data.zero)
        writer.operator("PADV2", [writer.read(data), paddings, value], [writer.tensor(wide)])
    return writer.tensor(wide), _VALID


def _activation(layer: Conv | Add | Multiply) -> int:
    """TFLite's fused activation that clips the codes as the layer does."""
    output = layer.output
    six = output.zero + round(6 / output.scale)
    ends = {
        _NONE: output.ends,
        _RELU: (max(output.zero, output.ends[0]), output.ends[1]),
        _RELU6: (max(output.zero, output.ends[0]), min(six, output.ends[1])),
    }
    for activation, clipped in ends.items():
        if clipped == (layer.low, layer.high):
            return activation
    raise UnsupportedError(f"codes clipped to {layer.low} … {layer.high}, which is neither ReLU nor ReLU6")


def _binary(writer: Writer, layer: Add | Multiply) -> None:
    name = "MUL" if isinstance(layer, Multiply) else "ADD" if layer.multipliers[1] > 0 else "SUB"
    first = writer.read(layer.a)
    if layer.constant is None:
        second = writer.read(layer.b)
    else:
        if layer.b.bits != layer.a.bits:
            raise UnsupportedError("a constant of 16 bits beside 8-bit codes")
        array = layer.constant.astype(layer.a.dtype)
        second = writer.constant(f"{layer.name}/b", array, np.array([layer.b.scale]), zero=layer.b.zero)
    options = {"FusedActivationFunction": _activation(layer)}
    writer.operator(name, [first, second], [writer.tensor(layer.output)], **options)


def _average(writer: Writer, layer: AveragePool) -> None:
    data, output = _four(layer.input), layer.output
    if layer.kernel[1:] == data.shape[1:3] and output.size == data.shape[3]:
        whole = replace(output, shape=(1, 1, 1, data.shape[3]))
        axes = writer.constant(f"{layer.name}/axes", np.array([1, 2], np.int32))
        writer.operator("MEAN", [writer.read(data), axes], [writer.tensor(whole)], KeepDims=True)
        return
    if layer.count_padding or not any(layer.pads):
        return _conv(writer, _as_product(layer))
    if (layer.low, layer.high) != output.ends:
        raise UnsupportedError("an average with padding that does not count and a clip behind it")
    same = replace(output, name=f"{layer.name}/pooled", shape=_four(output).shape, scale=data.scale, zero=data.zero)
    equal = (data.scale, data.zero) == (output.scale, output.zero)
    target = _four(output) if equal else same
    options = {"Padding": _VALID if not any(layer.pads) else _SAME, "StrideH": layer.strides[1]}
    options |= {"StrideW": layer.strides[2], "FilterHeight": layer.kernel[1], "FilterWidth": layer.kernel[2]}
    writer.operator("AVERAGE_POOL_2D", [writer.read(data)], [writer.tensor(target)], **options)
    if not equal:
        writer.operator("QUANTIZE", [writer.tensor(target)], [writer.tensor(_four(output))])


def _as_product(layer: AveragePool) -> Conv:
    """The depthwise convolution with ones: AVERAGE_POOL_2D rounds in the scale of its input, which is too coarse."""
    channels, places = layer.input.shape[-1], int(np.prod(layer.kernel))
    scales = np.full(channels, 1 / places)
    return Conv(
        layer.name, layer.input, layer.output, np.ones((channels, *layer.kernel, 1), np.int8),
        np.full(channels, -layer.input.zero * places, np.int32),
        Rescale.of(scales * layer.input.scale / layer.output.scale), layer.strides, layer.pads, (1, 1, 1), channels,
        layer.low, layer.high, scales,
    )  # fmt: skip


def _largest(writer: Writer, layer: MaxPool) -> None:
    if layer.dilations != (1, 1, 1):
        raise UnsupportedError("a dilated maximum")
    data, padding = _padded(writer, layer, layer.kernel[1:], layer.input.ends[0])
    options = {"Padding": padding, "StrideH": layer.strides[1], "StrideW": layer.strides[2]}
    options |= {"FilterHeight": layer.kernel[1], "FilterWidth": layer.kernel[2]}
    writer.operator("MAX_POOL_2D", [data], [writer.tensor(_four(layer.output))], **options)


def _table(writer: Writer, layer: Table) -> None:
    raise UnsupportedError("a table of codes")


def _copy(writer: Writer, layer: Copy) -> None:
    """Codes in other places, as the operators of TFLite that move them so."""
    sources = [writer.read(tensor) for tensor in layer.sources]
    made = -1
    for name, order, constants, options, output in moves(layer):
        given = [writer.constant(f"{layer.name}/{index}", array) for index, array in enumerate(constants)]
        read = [sources[i] if i >= 0 else made for i in order]
        made = writer.tensor(output)
        writer.operator(name, [*read, *given], [made], **options)


_STEPS: Mapping[type[Layer], Callable[[Writer, Any], None]] = {
    Conv: _conv,
    Add: _binary,
    Multiply: _binary,
    AveragePool: _average,
    MaxPool: _largest,
    Table: _table,
    Copy: _copy,
}
