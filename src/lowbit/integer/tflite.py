"""The integer program as a TensorFlow Lite file: the same codes, for LiteRT and TFLite Micro.

Source: TFLite's schema, and its 8-bit quantization specification (int8 activations with a zero point, weights symmetric
for each output channel, NHWC). Written through the generated schema of the package `tflite`.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from lowbit.errors import UnsupportedError
from lowbit.integer.program import (
    Add,
    AveragePool,
    Conv,
    Copy,
    Ints,
    Layer,
    MaxPool,
    Multiply,
    Program,
    Rounding,
    Table,
    Tensor,
)
from lowbit.integer.reference import spatial
from lowbit.integer.tflite_moves import moves

# The version of each operator that reads int8, by which old runtimes refuse what they would compute wrongly.
_VERSIONS = {"CONV_2D": 3, "DEPTHWISE_CONV_2D": 3, "FULLY_CONNECTED": 12, "RESHAPE": 1}
_INT8_VERSION = 2
_WIDE = {"CONV_2D": 4, "DEPTHWISE_CONV_2D": 5, "FULLY_CONNECTED": 7, "ADD": 4, "SUB": 5, "MUL": 4, "RESHAPE": 1}
_INT16_VERSION = 3
_SAME, _VALID = 0, 1
_NONE, _RELU, _RELU6 = 0, 1, 3
_OPTIONS = {
    "CONV_2D": "Conv2DOptions",
    "DEPTHWISE_CONV_2D": "DepthwiseConv2DOptions",
    "FULLY_CONNECTED": "FullyConnectedOptions",
    "ADD": "AddOptions",
    "SUB": "SubOptions",
    "MUL": "MulOptions",
    "AVERAGE_POOL_2D": "Pool2DOptions",
    "MAX_POOL_2D": "Pool2DOptions",
    "MEAN": "ReducerOptions",
    "RESHAPE": "ReshapeOptions",
    "CONCATENATION": "ConcatenationOptions",
    "STRIDED_SLICE": "StridedSliceOptions",
    "TRANSPOSE": "TransposeOptions",
    "PAD": "PadOptions",
    "PADV2": "PadV2Options",
    "QUANTIZE": "QuantizeOptions",
}


def write_tflite(program: Program) -> bytes:
    """The flatbuffer; UnsupportedError names the layers that TFLite has no operator for."""
    if uneven := [t.name for t in program.tensors() if t.bits > 8 and t.zero]:
        raise UnsupportedError(f"'{uneven[0]}': 16-bit codes in TFLite have no zero point. Quantize to int16.")
    writer = _Writer(program.rounding)
    inputs, wrong = [writer.tensor(tensor) for tensor in program.inputs], []
    for layer in program.layers:
        try:
            _STEPS[type(layer)](writer, layer)
        except UnsupportedError as error:
            wrong.append(f"'{layer.name}': {error}")
    if wrong:
        raise UnsupportedError(f"these have no operator in TFLite: {'; '.join(wrong)}. Export them as C.")
    outputs = [writer.read(tensor) for tensor in program.outputs]
    return writer.file(inputs, outputs)


class _Writer:
    """A model with one subgraph, built from its leaves up.

    tensors, buffers, operators   offsets of finished tables; codes is (operator, version) → index
    known                         (name, shape) → index of a tensor: a view in another shape is another tensor
    """

    def __init__(self, rounding: Rounding) -> None:
        self.rounding = rounding
        try:
            import flatbuffers
            import tflite
        except ImportError as error:
            raise UnsupportedError("TFLite files need its schema: pip install 'lowbit[tflite]'.") from error
        self.schema: Any = tflite
        self.builder: Any = flatbuffers.Builder(1 << 16)
        self.tensors: list[int] = []
        self.buffers: list[int] = [self._table("Buffer")]  # the first is that of all tensors without data
        self.operators: list[int] = []
        self.codes: dict[tuple[str, int], int] = {}
        self.known: dict[tuple[str, tuple[int, ...]], int] = {}
        self.latest: dict[str, Tensor] = {}
        self.wide: set[int] = set()  # tensors of 16-bit codes

    # ---- tensors -------------------------------------------------------------------------------------------------

    def tensor(self, tensor: Tensor) -> int:
        """The index of an activation."""
        key = tensor.name, tensor.shape
        if key not in self.known:
            scales, zeros = np.array([tensor.scale]), np.array([tensor.zero])
            self.known[key] = self._tensor(tensor.name, tensor.shape, tensor.dtype, 0, scales, zeros, 0)
            self.latest.setdefault(tensor.name, tensor)
            if tensor.bits > 8:
                self.wide.add(self.known[key])
        return self.known[key]

    def read(self, tensor: Tensor) -> int:
        """The same, reshaped where it was made in another shape."""
        made = self.latest.get(tensor.name)
        if made is not None and made.shape != tensor.shape and (tensor.name, tensor.shape) not in self.known:
            source = self.tensor(made)
            shape = self.constant(f"{tensor.name}/shape", np.array(tensor.shape, np.int32))
            self.operator("RESHAPE", [source, shape], [self.tensor(tensor)])
        return self.tensor(tensor)

    def constant(self, name: str, array: Ints, scales: "np.ndarray | None" = None, axis: int = 0, zero: int = 0) -> int:
        """The index of a constant; scales along an axis make it quantized."""
        data = self.builder.CreateNumpyVector(np.ascontiguousarray(array).reshape(-1).view(np.uint8))
        self.buffers.append(self._table("Buffer", Data=data))
        zeros = None if scales is None else np.full(len(scales), zero)
        return self._tensor(name, array.shape, array.dtype, len(self.buffers) - 1, scales, zeros, axis)

    def _tensor(
        self, name: str, shape: Sequence[int], dtype: np.dtype[Any], buffer: int,
        scales: "np.ndarray | None", zeros: "np.ndarray | None", axis: int,
    ) -> int:  # fmt: skip
        fields: dict[str, Any] = {}
        if scales is not None and zeros is not None:
            scale = self.builder.CreateNumpyVector(scales.astype(np.float32))
            zero = self.builder.CreateNumpyVector(zeros.astype(np.int64))
            quantization = {"Scale": scale, "ZeroPoint": zero, "QuantizedDimension": axis}
            fields["Quantization"] = self._table("QuantizationParameters", **quantization)
        kind = getattr(self.schema.TensorType, dtype.name.upper())
        fields |= {"Name": self.builder.CreateString(name), "Type": kind, "Buffer": buffer}
        fields["Shape"] = self.builder.CreateNumpyVector(np.array(shape, np.int32))
        self.tensors.append(self._table("Tensor", **fields))
        return len(self.tensors) - 1

    # ---- operators -----------------------------------------------------------------------------------------------

    def operator(self, name: str, inputs: Sequence[int], outputs: Sequence[int], **options: Any) -> None:
        wide = outputs[0] in self.wide
        key = name, _WIDE.get(name, _INT16_VERSION) if wide else _VERSIONS.get(name, _INT8_VERSION)
        if wide and name in ("ADD", "SUB"):
            options["PotScaleInt16"] = False  # scales need not be powers of two
        code = self.codes.setdefault(key, len(self.codes))
        kind = _OPTIONS[name]
        fields = {
            "Inputs": self.builder.CreateNumpyVector(np.array(inputs, np.int32)),
            "Outputs": self.builder.CreateNumpyVector(np.array(outputs, np.int32)),
            "BuiltinOptions": self._table(kind, **options),
            "BuiltinOptionsType": getattr(self.schema.BuiltinOptions, kind),
            "OpcodeIndex": code,
        }
        self.operators.append(self._table("Operator", **fields))

    def file(self, inputs: Sequence[int], outputs: Sequence[int]) -> bytes:
        builder = self.builder
        codes = []
        for name, version in self.codes:
            number = getattr(self.schema.BuiltinOperator, name)
            codes.append(
                self._table("OperatorCode", DeprecatedBuiltinCode=min(number, 127), BuiltinCode=number, Version=version)
            )
        fields = {
            "Tensors": self._vector(self.tensors),
            "Inputs": builder.CreateNumpyVector(np.array(inputs, np.int32)),
            "Outputs": builder.CreateNumpyVector(np.array(outputs, np.int32)),
            "Operators": self._vector(self.operators),
            "Name": builder.CreateString("main"),
        }
        subgraph = self._table("SubGraph", **fields)
        fields = {
            "Version": 3,
            "OperatorCodes": self._vector(codes),
            "Subgraphs": self._vector([subgraph]),
            "Description": builder.CreateString("lowbit"),
            "Buffers": self._vector(self.buffers),
        }
        builder.Finish(self._table("Model", **fields), b"TFL3")
        return bytes(builder.Output())

    def _table(self, kind: str, **fields: Any) -> int:
        """A table of the schema; vectors, strings and tables in it are offsets that are finished already."""
        getattr(self.schema, f"{kind}Start")(self.builder)
        for name, value in fields.items():
            getattr(self.schema, f"{kind}Add{name}")(self.builder, value)
        return int(getattr(self.schema, f"{kind}End")(self.builder))

    def _vector(self, offsets: Sequence[int]) -> int:
        self.builder.StartVector(4, len(offsets), 4)
        for offset in reversed(offsets):
            self.builder.PrependUOffsetTRelative(offset)
        return int(self.builder.EndVector())


# ---- layers --------------------------------------------------------------------------------------------------------


def _conv(writer: _Writer, layer: Conv) -> None:
    rows = layer.weight.reshape(len(layer.weight), -1).astype(np.int64)
    bias = layer.bias + layer.input.zero * rows.sum(1)
    if layer.weight.shape[1] != 1:
        raise UnsupportedError("a convolution over depth")
    bias_scale = layer.weight_scale.astype(np.float32) * np.float32(layer.input.scale)
    kind = np.int32 if layer.input.bits <= 8 else np.int64
    biases = writer.constant(f"{layer.name}/bias", bias.astype(kind), bias_scale)
    weight, scales = layer.weight[:, 0], layer.weight_scale
    activation = _activation(layer)
    if len(layer.input.shape) == 2 and writer.rounding == "once":  # LiteRT's own kernel for it rounds once
        flat = writer.constant(f"{layer.name}/weight", rows.astype(np.int8), scales)
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


def _padded(writer: _Writer, layer: Conv | MaxPool, kernel: Sequence[int], fill: int) -> tuple[int, int]:
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


def _binary(writer: _Writer, layer: Add | Multiply) -> None:
    name = "MUL" if isinstance(layer, Multiply) else "ADD" if layer.multipliers[1] > 0 else "SUB"
    first = writer.read(layer.a)
    if layer.constant is None:
        second = writer.read(layer.b)
    else:
        array = layer.constant.astype(layer.a.dtype)
        second = writer.constant(f"{layer.name}/b", array, np.array([layer.b.scale]), zero=layer.b.zero)
    options = {"FusedActivationFunction": _activation(layer)}
    writer.operator(name, [first, second], [writer.tensor(layer.output)], **options)


def _average(writer: _Writer, layer: AveragePool) -> None:
    data, output = _four(layer.input), layer.output
    if (layer.low, layer.high) != output.ends:
        raise UnsupportedError("an average with a clip behind it")
    if layer.kernel[1:] == data.shape[1:3] and output.size == data.shape[3]:
        whole = replace(output, shape=(1, 1, 1, data.shape[3]))
        axes = writer.constant(f"{layer.name}/axes", np.array([1, 2], np.int32))
        writer.operator("MEAN", [writer.read(data), axes], [writer.tensor(whole)], KeepDims=True)
        return
    if layer.count_padding and any(layer.pads):
        raise UnsupportedError("an average that counts its padding")
    same = replace(output, name=f"{layer.name}/pooled", shape=_four(output).shape, scale=data.scale, zero=data.zero)
    equal = (data.scale, data.zero) == (output.scale, output.zero)
    target = _four(output) if equal else same
    options = {"Padding": _VALID if not any(layer.pads) else _SAME, "StrideH": layer.strides[1]}
    options |= {"StrideW": layer.strides[2], "FilterHeight": layer.kernel[1], "FilterWidth": layer.kernel[2]}
    writer.operator("AVERAGE_POOL_2D", [writer.read(data)], [writer.tensor(target)], **options)
    if not equal:
        writer.operator("QUANTIZE", [writer.tensor(target)], [writer.tensor(_four(output))])


def _largest(writer: _Writer, layer: MaxPool) -> None:
    if layer.dilations != (1, 1, 1):
        raise UnsupportedError("a dilated maximum")
    data, padding = _padded(writer, layer, layer.kernel[1:], layer.input.ends[0])
    options = {"Padding": padding, "StrideH": layer.strides[1], "StrideW": layer.strides[2]}
    options |= {"FilterHeight": layer.kernel[1], "FilterWidth": layer.kernel[2]}
    writer.operator("MAX_POOL_2D", [data], [writer.tensor(_four(layer.output))], **options)


def _table(writer: _Writer, layer: Table) -> None:
    raise UnsupportedError("a table of codes")


def _copy(writer: _Writer, layer: Copy) -> None:
    """Codes in other places, as the operators of TFLite that move them so."""
    sources = [writer.read(tensor) for tensor in layer.sources]
    for name, order, constants, options, output in moves(layer):
        given = [writer.constant(f"{layer.name}/{index}", array) for index, array in enumerate(constants)]
        writer.operator(name, [*(sources[i] for i in order), *given], [writer.tensor(output)], **options)


_STEPS: Mapping[type[Layer], Callable[[_Writer, Any], None]] = {
    Conv: _conv,
    Add: _binary,
    Multiply: _binary,
    AveragePool: _average,
    MaxPool: _largest,
    Table: _table,
    Copy: _copy,
}
