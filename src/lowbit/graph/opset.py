"""Raising a graph to opset 21: one row per operator whose meaning or signature changed.

Every operator of the default domain that changed incompatibly between opset 7 and 21 has a row here; all others only
gained types or attributes with defaults that keep the old meaning. Rows edit the node in place, so value names stay,
subgraphs are raised as well, and no weight is touched or serialised (models over 2 GB pass).
Source: the ONNX operator changelog, and for Resize 10 what onnxruntime computes.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx_ir as ir

from lowbit.errors import ModelError, UnsupportedError
from lowbit.graph.links import take_over

TARGET_OPSET = 21
OLDEST_OPSET = 7

Row = Callable[[ir.Node], None]
ROWS: dict[tuple[str, int], Row] = {}


def raise_opset(program: ir.Model) -> bool:
    """Raise the default domain of the program, its functions and all subgraphs to TARGET_OPSET; newer ones are kept.

    Returns whether anything changed. ModelError for an opset below 7, UnsupportedError for the few uses whose
    meaning cannot be expressed any more.
    """
    version = program.graph.opset_imports.get("", TARGET_OPSET)
    newest = max([version, TARGET_OPSET, *(f.opset_imports.get("", 0) for f in program.functions.values())])
    changed = False
    graphs: list[ir.Graph | ir.Function] = [program.graph, *program.functions.values()]
    for graph in graphs:
        before = graph.opset_imports.get("", newest)
        if before < OLDEST_OPSET:
            raise ModelError(
                f"the model uses opset {before}; lowbit reads opset {OLDEST_OPSET} and newer. "
                "Export it again, or convert it with onnx.version_converter."
            )
        if before < newest:
            for node in list(graph.all_nodes()):
                if node.domain in ("", "ai.onnx"):
                    _raise_node(node, before, min(newest, TARGET_OPSET))
            graph.opset_imports[""] = newest
            changed = True
    return changed


def _raise_node(node: ir.Node, before: int, target: int) -> None:
    for version in range(before + 1, target + 1):
        row = ROWS.get((node.op_type, version))
        if row is None:
            continue
        if any(attr.is_ref() for attr in node.attributes.values()):
            raise UnsupportedError(
                f"'{node.name}' ({node.op_type}, opset {before}) takes an attribute from its function's caller; "
                "inline the model's functions before loading it."
            )
        row(node)
    node.version = None


def _row(version: int, *op_types: str) -> Callable[[Row], Row]:
    def register(row: Row) -> Row:
        for op_type in op_types:
            ROWS[op_type, version] = row
        return row

    return register


def constant_before(node: ir.Node, array: np.ndarray, suffix: str) -> ir.Value:
    """A new Constant placed before `node`, named after the node's first output."""
    name = f"{node.outputs[0].name}_{suffix}"
    tensor = ir.tensor(array, name=name)
    constant = ir.node("Constant", [], {"value": tensor}, name=name)
    value = constant.outputs[0]
    value.name, value.shape, value.type = name, ir.Shape(array.shape), ir.TensorType(tensor.dtype)
    node.prepend(constant)
    return value


def _set_input(node: ir.Node, index: int, value: ir.Value | None) -> None:
    if index >= len(node.inputs):
        node.resize_inputs(index + 1)
    node.replace_input_with(index, value)


def _pop_ints(node: ir.Node, name: str) -> np.ndarray | None:
    attr = node.attributes.pop(name, None)
    return None if attr is None else np.asarray(attr.as_ints(), dtype=np.int64)


def _ints_to_input(node: ir.Node, name: str, index: int) -> None:
    values = _pop_ints(node, name)
    if values is not None:
        _set_input(node, index, constant_before(node, values, name))


def _like(node: ir.Node, number: float) -> np.ndarray:
    """A scalar in the element type of the node's first input (float32 where that is not known)."""
    first = node.inputs[0]
    dtype = first.dtype if first is not None and first.dtype is not None else ir.DataType.FLOAT
    return np.asarray(number, dtype=dtype.numpy())


@_row(9, "BatchNormalization")
def _batchnorm_9(node: ir.Node) -> None:
    attr = node.attributes.pop("spatial", None)
    if attr is not None and attr.as_int() == 0:
        raise UnsupportedError(f"'{node.name}': BatchNormalization with spatial=0 was removed from ONNX in opset 9.")


@_row(14, "BatchNormalization")
def _batchnorm_14(node: ir.Node) -> None:
    if any(output.uses() or output.is_graph_output() for output in node.outputs[1:]):
        raise UnsupportedError(f"'{node.name}': BatchNormalization in training mode; export the model in eval mode.")
    node.resize_outputs(1)


@_row(9, "Upsample")
def _upsample_9(node: ir.Node) -> None:
    scales = np.asarray(node.attributes.pop("scales").as_floats(), dtype=np.float32)
    _set_input(node, 1, constant_before(node, scales, "scales"))


@_row(10, "Upsample")
def _upsample_10(node: ir.Node) -> None:
    node.op_type = "Resize"


@_row(11, "Resize")
def _resize_11(node: ir.Node) -> None:
    # Opset 10 leaves nearest rounding open; onnxruntime floors when it enlarges and ceils when it shrinks.
    scales = node.inputs[1]
    known = None if scales is None else ir.convenience.get_const_tensor(scales)
    shrinks = known is not None and bool((known.numpy() < 1).any())
    node.attributes["coordinate_transformation_mode"] = ir.AttrString("coordinate_transformation_mode", "asymmetric")
    node.attributes["nearest_mode"] = ir.AttrString("nearest_mode", "ceil" if shrinks else "floor")
    node.resize_inputs(3)
    node.replace_input_with(2, scales)
    node.replace_input_with(1, None)


@_row(13, "Resize")
def _resize_13(node: ir.Node) -> None:
    # Until 13 an unused roi or scales had to be an empty tensor; now it is left out.
    for index in (1, 2):
        value = node.inputs[index] if index < len(node.inputs) else None
        tensor = None if value is None else ir.convenience.get_const_tensor(value)
        if tensor is not None and tensor.size == 0:
            node.replace_input_with(index, None)


@_row(10, "Slice")
def _slice_10(node: ir.Node) -> None:
    for index, name in enumerate(("starts", "ends", "axes"), start=1):
        _ints_to_input(node, name, index)


@_row(10, "TopK")
def _topk_10(node: ir.Node) -> None:
    k = np.asarray([node.attributes.pop("k").as_int()], dtype=np.int64)
    _set_input(node, 1, constant_before(node, k, "k"))


@_row(11, "Clip")
def _clip_11(node: ir.Node) -> None:
    for index, name in ((1, "min"), (2, "max")):
        attr = node.attributes.pop(name, None)
        if attr is not None:
            _set_input(node, index, constant_before(node, _like(node, attr.as_float()), name))


@_row(11, "Pad")
def _pad_11(node: ir.Node) -> None:
    _ints_to_input(node, "pads", 1)
    value = node.attributes.pop("value", None)
    if value is not None:
        _set_input(node, 2, constant_before(node, _like(node, value.as_float()), "value"))


@_row(11, "Scatter")
def _scatter_11(node: ir.Node) -> None:
    node.op_type = "ScatterElements"


@_row(9, "Scan")
def _scan_9(node: ir.Node) -> None:
    raise UnsupportedError(f"'{node.name}': Scan of opset 8 was redefined in opset 9; export with opset 9 or newer.")


@_row(12, "Dropout")
def _dropout_12(node: ir.Node) -> None:
    node.attributes.pop("ratio", None)  # without training_mode the ratio has no effect


@_row(13, "Softmax", "LogSoftmax", "Hardmax")
def _softmax_13(node: ir.Node) -> None:
    # Until 13 all axes from `axis` on were normalised together; now only `axis` is.
    attr = node.attributes.pop("axis", None)
    axis = 1 if attr is None else attr.as_int()
    value, output = node.inputs[0], node.outputs[0]
    rank = None if value is None or value.shape is None else value.shape.rank()
    node.attributes["axis"] = ir.AttrInt64("axis", -1)
    if axis == -1 or (rank is not None and axis == rank - 1):
        return
    flat = ir.node("Flatten", [value], {"axis": axis}, name=f"{node.name}_flatten")
    flat.outputs[0].name = f"{output.name}_flat"
    shape = ir.node("Shape", [value], name=f"{node.name}_shape")
    shape.outputs[0].name = f"{output.name}_shape"
    node.prepend([flat, shape])
    node.replace_input_with(0, flat.outputs[0])
    back = ir.node("Reshape", [output, shape.outputs[0]], name=f"{node.name}_reshape")
    node.append(back)
    take_over(output, back.outputs[0], "rows")
    output.shape = None
    back.replace_input_with(0, output)


@_row(13, "Squeeze", "Unsqueeze", "ReduceSum")
@_row(
    18,
    "ReduceL1",
    "ReduceL2",
    "ReduceLogSum",
    "ReduceLogSumExp",
    "ReduceMax",
    "ReduceMean",
    "ReduceMin",
    "ReduceProd",
    "ReduceSumSquare",
)
def _axes_to_input(node: ir.Node) -> None:
    _ints_to_input(node, "axes", 1)


@_row(13, "Split")
def _split_13(node: ir.Node) -> None:
    _ints_to_input(node, "split", 1)


@_row(18, "Split")
def _split_18(node: ir.Node) -> None:
    if len(node.inputs) < 2 or node.inputs[1] is None:
        node.attributes["num_outputs"] = ir.AttrInt64("num_outputs", len(node.outputs))


@_row(16, "RoiAlign")
def _roialign_16(node: ir.Node) -> None:
    mode = "coordinate_transformation_mode"
    node.attributes[mode] = ir.AttrString(mode, "output_half_pixel")


@_row(20, "GridSample")
def _gridsample_20(node: ir.Node) -> None:
    attr = node.attributes.get("mode")
    old = "bilinear" if attr is None else attr.as_string()
    node.attributes["mode"] = ir.AttrString("mode", {"bilinear": "linear", "bicubic": "cubic"}.get(old, old))


@_row(20, "DFT")
def _dft_20(node: ir.Node) -> None:
    attr = node.attributes.pop("axis", None)
    axis = np.asarray(1 if attr is None else attr.as_int(), dtype=np.int64)
    _set_input(node, 2, constant_before(node, axis, "axis"))


@_row(21, "GroupNormalization")
def _groupnorm_21(node: ir.Node) -> None:
    """Scale and bias were per group, now they are per channel: each repeated channels / groups times."""
    groups = node.attributes["num_groups"].as_int()
    x = node.inputs[0]
    channels = x.shape[1] if x is not None and x.shape is not None and x.shape.rank() > 1 else None
    if not isinstance(channels, int):
        raise UnsupportedError(
            f"'{node.name}': GroupNormalization of opset 18-20 needs a known number of channels to be raised to 21."
        )
    for index in (1, 2):
        name = f"{node.outputs[0].name}_{('scale', 'bias')[index - 1]}"
        column = ir.node("Unsqueeze", [node.inputs[index], constant_before(node, np.array([1]), f"axes{index}")])
        size = constant_before(node, np.array([groups, channels // groups]), f"size{index}")
        wide = ir.node("Expand", [column.outputs[0], size])
        flat = ir.node("Reshape", [wide.outputs[0], constant_before(node, np.array([-1]), f"flat{index}")])
        for step, part in zip(("column", "wide", "flat"), (column, wide, flat), strict=True):
            part.name = part.outputs[0].name = f"{name}_{step}"
        node.prepend([column, wide, flat])
        node.replace_input_with(index, flat.outputs[0])
