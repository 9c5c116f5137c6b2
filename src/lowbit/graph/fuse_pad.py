"""A Pad with zeros before a convolution, said by the convolution's own pads. Exact."""

from __future__ import annotations

import onnx_ir as ir

from lowbit.graph.changed import Changed
from lowbit.graph.weights import constant, drop_unread, only_reader, scalar


def fuse_pad(program: ir.Model) -> Changed:
    """Fold each Pad of spatial zeros into the one Conv that reads it."""
    done: list[str] = []
    for graph in program.graphs():
        for node in [node for node in graph if node.op_type == "Pad"]:
            reader = only_reader(node.outputs[0])
            added = _spatial_zeros(node)
            if added is None or reader is None or reader.op_type != "Conv" or reader.inputs[0] is not node.outputs[0]:
                continue
            auto, own = reader.attributes.get("auto_pad"), reader.attributes.get("pads")
            if auto is not None and auto.as_string() not in ("NOTSET", "VALID"):
                continue
            before = [0] * len(added) if own is None else list(own.as_ints())
            if len(before) != len(added):
                continue
            reader.attributes.pop("auto_pad", None)
            reader.attributes["pads"] = ir.AttrInt64s("pads", [a + b for a, b in zip(added, before, strict=True)])
            reader.replace_input_with(0, node.inputs[0])
            graph.remove(node, safe=True)
            done.append(f"Pad '{node.name}' fused into Conv '{reader.name}'")
    drop_unread(program)
    return Changed(tuple(done))


def _spatial_zeros(node: ir.Node) -> list[int] | None:
    """The pads of the axes from 2 on, begins then ends, where the node adds zeros there and nowhere else."""
    pads = constant(node.inputs[1]) if len(node.inputs) > 1 else None
    mode = node.attributes.get("mode")
    value = node.inputs[2] if len(node.inputs) > 2 else None
    by_axes = len(node.inputs) > 3 and node.inputs[3] is not None
    if pads is None or by_axes or (mode is not None and mode.as_string() != "constant"):
        return None
    rank = pads.size // 2
    begins, ends = pads[:rank].tolist(), pads[rank:].tolist()
    if (value is not None and scalar(value) != 0) or (pads < 0).any() or any(begins[:2] + ends[:2]):
        return None
    return [int(pad) for pad in begins[2:] + ends[2:]]
