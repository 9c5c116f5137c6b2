"""A flatbuffer of TFLite's schema, built from its leaves up: tensors, operators and their versions, the file."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from lowbit.errors import UnsupportedError
from lowbit.integer.tensors import Ints, Rounding, Tensor

# The version of each operator that reads int8, by which old runtimes refuse what they would compute wrongly.
_VERSIONS = {"CONV_2D": 3, "DEPTHWISE_CONV_2D": 3, "FULLY_CONNECTED": 12, "RESHAPE": 1}
_INT8_VERSION = 2
_WIDE = {"CONV_2D": 4, "DEPTHWISE_CONV_2D": 5, "FULLY_CONNECTED": 7, "ADD": 4, "SUB": 5, "MUL": 4, "RESHAPE": 1}
_INT16_VERSION = 3
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
    "RESIZE_NEAREST_NEIGHBOR": "ResizeNearestNeighborOptions",
}


class Writer:
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
