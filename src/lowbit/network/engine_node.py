"""One node that is not in the operator table, run by onnxruntime inside the torch module.

The nodes around it are simulated and calibrated as usual. No gradient passes through it. The table therefore holds what
networks have between their parameters and their outputs. Signal transforms, sequences of tensors, losses, operators
of files that are quantized already, control flow, and the rare forms of operators in the table (`forms`) run here.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import torch
from torch import Tensor, nn

from lowbit.errors import UnsupportedError
from lowbit.network.operators_types import to_tensor

_WAY_OUT = "Replace it by standard operators, or cut the model there."
_IR_VERSION = 10  # what opset 21 needs; the file's own may be newer than onnxruntime reads
_OPSET = 21  # what lowbit.load raises files to; newer opsets add types to most operators and change few

# onnxruntime takes and returns these as numpy arrays. It returns float8 as uint8, and int4 and bfloat16 not at all.
_EXCHANGED = frozenset({
    *(ir.DataType.FLOAT, ir.DataType.DOUBLE, ir.DataType.FLOAT16, ir.DataType.BOOL, ir.DataType.STRING),
    *(ir.DataType.INT8, ir.DataType.INT16, ir.DataType.INT32, ir.DataType.INT64),
    *(ir.DataType.UINT8, ir.DataType.UINT16, ir.DataType.UINT32, ir.DataType.UINT64),
})  # fmt: skip


class EngineNode(nn.Module):
    """A session of onnxruntime for a model of one node.

    forward takes the tensors of `input_names` in order and returns the tensor of the one output, or a tuple of them
    the result lies where the inputs lie; on the device, if some are there and others describe shapes in main memory
    copies and pickles carry the model's bytes; each opens its own session at its first call
    """

    def __init__(self, model: onnx.ModelProto, label: str) -> None:
        super().__init__()
        self.label = label
        self.input_names = [value.name for value in model.graph.input]
        self.output_names = [value.name for value in model.graph.output]
        self._model = model.SerializeToString()
        self._session: Any = None
        if all(value.HasField("type") for value in model.graph.input):
            self._open()  # fail while building, where all that the session needs is known

    def _open(self) -> Any:
        if self._session is None:
            options = onnxruntime.SessionOptions()
            options.log_severity_level = 4
            try:
                self._session = onnxruntime.InferenceSession(self._model, options, providers=["CPUExecutionProvider"])
            except Exception as error:  # onnxruntime's exceptions have no common base but this
                raise self._unsupported(error) from error
        return self._session

    def _unsupported(self, error: Exception) -> UnsupportedError:
        reason = " ".join(str(error).split())
        return UnsupportedError(
            f"{self.label} is neither in the operator table nor can onnxruntime run it: {reason[:300]}. {_WAY_OUT}"
        )

    @torch.compiler.disable  # type: ignore[misc, untyped-decorator, unused-ignore]
    def forward(self, *tensors: Any) -> Any:
        if self._session is None:
            self._give_types(tensors)
        feeds = {name: _to_numpy(t) for name, t in zip(self.input_names, tensors, strict=True)}
        try:
            results = self._open().run(self.output_names, feeds)
        except UnsupportedError:
            raise
        except Exception as error:
            raise self._unsupported(error) from error
        devices = {t.device for t in tensors if isinstance(t, Tensor)} - {torch.device("cpu")}
        device = devices.pop() if devices else torch.device("cpu")
        outputs = tuple(_from_numpy(result, device) for result in results)
        return outputs[0] if len(outputs) == 1 else outputs

    def _give_types(self, tensors: Sequence[Any]) -> None:
        """Write the element types that shape inference could not tell into the model, from the tensors at hand."""
        model = onnx.ModelProto.FromString(self._model)
        for value, tensor in zip(model.graph.input, tensors, strict=True):
            if value.HasField("type"):
                continue
            if isinstance(tensor, Tensor):
                value.type.tensor_type.elem_type = onnx.helper.np_dtype_to_tensor_dtype(_to_numpy(tensor).dtype)
            elif isinstance(tensor, list) and tensor:
                element = value.type.sequence_type.elem_type.tensor_type
                element.elem_type = onnx.helper.np_dtype_to_tensor_dtype(_to_numpy(tensor[0]).dtype)
        self._model = model.SerializeToString()

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_session": None}

    def extra_repr(self) -> str:
        return self.label


def engine_node(node: ir.Node, program: ir.Model) -> tuple[EngineNode, list[ir.Value]]:
    """A node as an EngineNode, and the values that it reads: its inputs, then what its subgraphs take from outside.

    Constants that are not floats are stored in the session; floats are inputs, so that a quantizer can be put on them.
    """
    used = dict.fromkeys(v for v in node.inputs if v is not None)
    used |= dict.fromkeys(_captured(node))
    stored = [v for v in used if (c := v.const_value) is not None and not c.dtype.is_floating_point()]
    read = [v for v in used if v not in stored]
    domain = node.domain or "ai.onnx"
    label = f"operator {node.op_type} of domain {domain}, node '{node.name}',"
    for value in (*read, *node.outputs):
        if value.dtype is not None and value.dtype not in _EXCHANGED:
            raise UnsupportedError(
                f"{label} is not in the operator table, and onnxruntime does not exchange {value.dtype.name}, the type "
                f"of '{value.name}'. {_WAY_OUT}"
            )
    graph = onnx.GraphProto(name="node")
    graph.node.append(ir.serde.serialize_node(node))
    graph.initializer.extend(_named_proto(v) for v in stored)
    graph.input.extend(_info(v) for v in read)
    graph.output.extend(_info(v) for v in node.outputs if v.name)
    model = onnx.ModelProto(ir_version=_IR_VERSION, graph=graph)
    opsets = program.opset_imports | {"": _opset(node, program)}
    model.opset_import.extend(onnx.helper.make_opsetid(d, v) for d, v in opsets.items())
    model.functions.extend(ir.serde.serialize_function(f) for f in program.functions.values())
    return EngineNode(model, label), read


def _opset(node: ir.Node, program: ir.Model) -> int:
    """The program's opset, or 21 where the operator of 21 has all inputs, outputs and attributes that the node uses.

    onnxruntime has no kernel for some definitions that only gained types since: RoiAlign of opset 22, BitShift of 28.
    """
    opset = program.opset_imports.get("", _OPSET)
    holds_graphs = any(a.type in (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS) for a in node.attributes.values())
    if opset <= _OPSET or node.domain not in ("", "ai.onnx") or holds_graphs:
        return opset
    try:
        old = onnx.defs.get_schema(node.op_type, _OPSET, "")
    except onnx.defs.SchemaError:
        return opset
    fits = len(node.inputs) <= old.max_input and len(node.outputs) <= old.max_output
    return _OPSET if fits and set(node.attributes) <= set(old.attributes) else opset


def _captured(node: ir.Node) -> Iterator[ir.Value]:
    """The values of enclosing graphs that the node's subgraphs use."""
    for attribute in node.attributes.values():
        if attribute.type == ir.AttributeType.GRAPH:
            graphs = [attribute.as_graph()]
        elif attribute.type == ir.AttributeType.GRAPHS:
            graphs = list(attribute.as_graphs())
        else:
            continue
        for graph in graphs:
            own: set[ir.Value] = {*graph.inputs, *graph.initializers.values()}
            for inner in graph:
                yield from (v for v in (*inner.inputs, *_captured(inner)) if v is not None and v not in own)
                own.update(inner.outputs)
            yield from (v for v in graph.outputs if v not in own)


def _info(value: ir.Value) -> onnx.ValueInfoProto:
    """Name and type, without the shape: the module may be run with another batch than the program declares."""
    info = onnx.ValueInfoProto(name=value.name)
    if value.type is not None:
        info.type.CopyFrom(ir.serde.serialize_type(value.type))
    return info


def _named_proto(value: ir.Value) -> onnx.TensorProto:
    assert value.const_value is not None
    proto = ir.serde.serialize_tensor(value.const_value)
    proto.name = value.name or ""
    return proto


def _to_numpy(tensor: Any) -> Any:
    if isinstance(tensor, list):
        return [_to_numpy(t) for t in tensor]
    if not isinstance(tensor, Tensor):
        return tensor  # strings travel as numpy arrays
    return tensor.detach().cpu().numpy()


def _from_numpy(result: Any, device: torch.device) -> Any:
    if isinstance(result, list):
        return [_from_numpy(r, device) for r in result]
    if isinstance(result, np.ndarray) and result.dtype.kind not in "OUS":
        return to_tensor(result).to(device)
    return result
