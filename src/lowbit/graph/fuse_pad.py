"""A Pad before a convolution or a MaxPool, said by their own pads. Exact.

A convolution pads with zeros, a MaxPool with −∞; exporters write the −∞ or the lowest float32 (TensorFlow's SAME).
"""

from __future__ import annotations

import onnx_ir as ir

from lowbit.graph.changed import Changed
from lowbit.graph.links import only_reader
from lowbit.graph.weights import constant, drop_unread, scalar

LOWEST = -3.4e38  # float32's lowest is −3.4028e38


def fuse_pad(program: ir.Model) -> Changed:
    """Fold each Pad that only pads space into the one Conv or MaxPool that reads it."""
    done: list[str] = []
    for graph in program.graphs():
        for node in [node for node in graph if node.op_type == "Pad"]:
            reader = only_reader(node.outputs[0])
            added = _spatial(node)
            if added is None or reader is None or reader.inputs[0] is not node.outputs[0] or not _pads(node, reader):
                continue
            auto, own = reader.attributes.get("auto_pad"), reader.attributes.get("pads")
            if auto is not None and auto.as_string() not in ("NOTSET", "VALID"):
                continue
            before = [0] * len(added) if own is None else list(own.as_ints())
            if len(before) != len(added):
                continue
            pads = [a + b for a, b in zip(added, before, strict=True)]
            kernel = list(reader.attributes["kernel_shape"].as_ints()) * 2 if reader.op_type == "MaxPool" else None
            if kernel is not None and any(pad >= length for pad, length in zip(pads, kernel, strict=True)):
                continue  # no engine takes a window that lies in the pads alone
            reader.attributes.pop("auto_pad", None)
            reader.attributes["pads"] = ir.AttrInt64s("pads", pads)
            reader.replace_input_with(0, node.inputs[0])
            graph.remove(node, safe=True)
            done.append(f"Pad '{node.name}' fused into {reader.op_type} '{reader.name}'")
    drop_unread(program)
    return Changed(tuple(done))


def _pads(pad: ir.Node, reader: ir.Node) -> bool:
    """Whether the reader's own pads hold what this Pad adds: zeros before a Conv, nothing larger before a MaxPool."""
    filling = scalar(pad.inputs[2]) if len(pad.inputs) > 2 and pad.inputs[2] is not None else 0.0
    if reader.op_type == "Conv":
        return filling == 0
    whole = reader.op_type == "MaxPool" and len(reader.outputs) == 1 and not reader.attributes.get_int("ceil_mode", 0)
    return whole and filling is not None and filling <= LOWEST


def _spatial(node: ir.Node) -> list[int] | None:
    """The pads of the axes from 2 on, begins then ends, where the node adds one constant there and nowhere else."""
    pads = constant(node.inputs[1]) if len(node.inputs) > 1 else None
    mode = node.attributes.get("mode")
    by_axes = len(node.inputs) > 3 and node.inputs[3] is not None
    if pads is None or by_axes or (mode is not None and mode.as_string() != "constant"):
        return None
    rank = pads.size // 2
    begins, ends = pads[:rank].tolist(), pads[rank:].tolist()
    if (pads < 0).any() or any(begins[:2] + ends[:2]):
        return None
    return [int(pad) for pad in begins[2:] + ends[2:]]
