"""Linear layers seen alike: Conv, ConvTranspose, Gemm and MatMul (+ Add) with a constant weight.

What a pass needs of them: the weight as an array with the output channels or the input channels first, and the bias.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from lowbit.graph.weights import constant, only_reader, set_constant

LINEAR = frozenset({"Conv", "ConvTranspose", "Gemm", "MatMul"})


@dataclass(frozen=True)
class Linear:
    """A linear layer whose output channel o is Σ_i weight(o, i) · input channel i + bias(o).

    node       the operator
    bias_node  a following Add that holds a MatMul's bias, if any
    groups     of a convolution; input channel i only reaches the outputs of its own group
    """

    node: ir.Node
    bias_node: ir.Node | None
    groups: int

    @property
    def output(self) -> ir.Value:
        return (self.bias_node or self.node).outputs[0]

    @property
    def weight(self) -> np.ndarray:
        array = constant(self.node.inputs[1])
        assert array is not None
        return array

    @property
    def bias(self) -> np.ndarray:
        """float64, (outputs,); zeros where the layer has none."""
        array: np.ndarray | None = None
        if self.bias_node is not None:
            array = next(a for a in map(constant, self.bias_node.inputs) if a is not None)
        elif self.node.op_type != "MatMul" and len(self.node.inputs) > 2:
            array = constant(self.node.inputs[2])
            if array is not None and self.node.op_type == "Gemm":
                array = array * _number(self.node, "beta", 1.0)
        if array is None:
            return np.zeros(self.outputs)
        return np.broadcast_to(array.astype(np.float64).reshape(-1), (self.outputs,)).copy()

    @property
    def outputs(self) -> int:
        return int(self.by_output().shape[0])

    @property
    def inputs(self) -> int:
        return int(self.by_input().shape[0])

    def by_output(self) -> np.ndarray:
        """float64, (output channels, everything else)."""
        w = self.weight.astype(np.float64)
        match self.node.op_type:
            case "Conv":
                return w.reshape(w.shape[0], -1)
            case "ConvTranspose":  # stored (inputs, outputs / groups, ...)
                g = self.groups
                w = w.reshape(g, w.shape[0] // g, w.shape[1], -1)
                return w.transpose(0, 2, 1, 3).reshape(g * w.shape[2], -1)
            case "Gemm" if _number(self.node, "transB", 0):
                return w
        return np.moveaxis(w, -1, 0).reshape(w.shape[-1], -1)

    def by_input(self) -> np.ndarray:
        """float64, (input channels, everything else)."""
        w = self.weight.astype(np.float64)
        match self.node.op_type:
            case "Conv":  # stored (outputs, inputs / groups, ...)
                g = self.groups
                w = w.reshape(g, w.shape[0] // g, w.shape[1], -1)
                return w.transpose(0, 2, 1, 3).reshape(g * w.shape[2], -1)
            case "ConvTranspose":
                return w.reshape(w.shape[0], -1)
            case "Gemm" if _number(self.node, "transB", 0):
                return w.T
        return np.moveaxis(w, -2, 0).reshape(w.shape[-2], -1)

    def scale_outputs(self, factor: np.ndarray, shift: np.ndarray | None = None) -> None:
        """output ← factor · output + shift, written into weight and bias; factor and shift are (outputs,)."""
        bias = self.bias * factor + (0 if shift is None else shift)
        w, f = self.weight.astype(np.float64), factor.astype(np.float64)
        match self.node.op_type:
            case "Conv":
                w = w * f.reshape(-1, *[1] * (w.ndim - 1))
            case "ConvTranspose":
                per_group = f.reshape(self.groups, 1, w.shape[1], *[1] * (w.ndim - 2))
                w = (w.reshape(self.groups, -1, *w.shape[1:]) * per_group).reshape(w.shape)
            case "Gemm" if _number(self.node, "transB", 0):
                w = w * f[:, None]
            case _:
                w = w * f
        self._store(w)
        if shift is not None or bias.any():
            self.set_bias(bias)

    def scale_inputs(self, factor: np.ndarray) -> None:
        """The weight that reads input channel i is multiplied by factor[i]; factor is (inputs,)."""
        w, f = self.weight.astype(np.float64), factor.astype(np.float64)
        match self.node.op_type:
            case "Conv":
                per_group = f.reshape(self.groups, 1, w.shape[1], *[1] * (w.ndim - 2))
                w = (w.reshape(self.groups, -1, *w.shape[1:]) * per_group).reshape(w.shape)
            case "ConvTranspose":
                w = w * f.reshape(-1, *[1] * (w.ndim - 1))
            case "Gemm" if _number(self.node, "transB", 0):
                w = w * f
            case _:
                w = w * f[:, None]
        self._store(w)

    def response(self, values: np.ndarray) -> np.ndarray:
        """What constant input channels add to each output where nothing is padded; (inputs,) → (outputs,)."""
        w = self.weight.astype(np.float64)
        alpha = _number(self.node, "alpha", 1.0) if self.node.op_type == "Gemm" else 1.0
        if self.node.op_type == "Conv":
            per_input = w.reshape(*w.shape[:2], -1).sum(2).reshape(self.groups, -1, w.shape[1])
            added: np.ndarray = np.einsum("goi,gi->go", per_input, values.reshape(self.groups, -1)).reshape(-1)
            return added
        matrix = w if self.node.op_type == "Gemm" and _number(self.node, "transB", 0) else w.T
        result: np.ndarray = alpha * (matrix @ values)
        return result

    def set_bias(self, bias: np.ndarray) -> None:
        """Replace the bias, or give the layer one; float64 (outputs,)."""
        name = f"{self.node.inputs[1].name}.bias" if self.node.inputs[1] is not None else "bias"
        if self.bias_node is not None:
            index = next(i for i, value in enumerate(self.bias_node.inputs) if constant(value) is not None)
            set_constant(self.bias_node, index, bias, name)
        elif self.node.op_type == "MatMul":
            raise AssertionError("a MatMul has no bias of its own")
        else:
            if self.node.op_type == "Gemm":
                bias = bias / _number(self.node, "beta", 1.0)
            missing = len(self.node.inputs) < 3 or self.node.inputs[2] is None
            array = bias.astype(self.weight.dtype) if missing else bias
            set_constant(self.node, 2, array, name)

    def pads(self) -> bool:
        """Whether a convolution reads zeros beyond the border."""
        auto = self.node.attributes.get("auto_pad")
        if auto is not None and auto.as_string() not in ("NOTSET", "VALID"):
            return True
        pads = self.node.attributes.get("pads")
        return pads is not None and any(pads.as_ints())

    def _store(self, weight: np.ndarray) -> None:
        set_constant(self.node, 1, weight, f"{self.node.inputs[1].name}.{self.node.name}")  # type: ignore[union-attr]


def linear_layer(node: ir.Node | None) -> Linear | None:
    """The node as a linear layer, or None where it is none or its weight is computed."""
    if node is None or node.op_type not in LINEAR or node.domain not in ("", "ai.onnx") or len(node.inputs) < 2:
        return None
    weight = constant(node.inputs[1])
    if weight is None or weight.dtype.kind != "f" or weight.ndim < 2 or constant(node.inputs[0]) is not None:
        return None
    if len(node.inputs) > 2 and node.inputs[2] is not None:
        bias = constant(node.inputs[2])
        if bias is None or bias.size not in (1, _output_count(node, weight)) or max(bias.shape[:-1], default=1) > 1:
            return None
    if node.op_type == "Gemm" and (_number(node, "transA", 0) or _number(node, "beta", 1.0) == 0):
        return None
    if node.op_type == "MatMul" and weight.ndim != 2:
        return None
    return Linear(node, _bias_add(node, weight) if node.op_type == "MatMul" else None, int(_number(node, "group", 1)))


def linear_before(value: ir.Value | None) -> Linear | None:
    """The linear layer that produces the value (through the Add of a MatMul's bias), or None."""
    producer = None if value is None else value.producer()
    if producer is not None and producer.op_type == "Add":
        inner = next((v.producer() for v in producer.inputs if v is not None and constant(v) is None), None)
        layer = linear_layer(inner) if inner is not None and inner.op_type == "MatMul" else None
        return layer if layer is not None and layer.bias_node is producer else None
    layer = linear_layer(producer)
    return layer if layer is not None and layer.bias_node is None else None


def _bias_add(node: ir.Node, weight: np.ndarray) -> ir.Node | None:
    add = only_reader(node.outputs[0])
    if add is None or add.op_type != "Add":
        return None
    bias = next((a for a in map(constant, add.inputs) if a is not None), None)
    if bias is None or bias.size != weight.shape[-1] or (bias.ndim and bias.shape[-1] != bias.size):
        return None
    return add


def _output_count(node: ir.Node, weight: np.ndarray) -> int:
    match node.op_type:
        case "Conv":
            return int(weight.shape[0])
        case "ConvTranspose":
            return int(weight.shape[1] * _number(node, "group", 1))
        case "Gemm" if _number(node, "transB", 0):
            return int(weight.shape[0])
    return int(weight.shape[-1])


def _number(node: ir.Node, name: str, default: float) -> float:
    attr = node.attributes.get(name)
    return default if attr is None else float(attr.value)
