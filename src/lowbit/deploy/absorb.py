"""Relu and Clip absorbed into the quantizer behind them. Exact: a quantizer saturates at the ends of its own range.

A Relu in front of codes that cannot be negative, or a Clip(0, 6) in front of a range that ends at 6 or below, does
nothing.
"""

import numpy as np
import onnx_ir as ir

from lowbit.graph.homogeneous import clip_bounds
from lowbit.graph.links import made_by, only_reader


def absorb_clips(program: ir.Model) -> list[str]:
    """Remove, in place, each Relu or Clip that only a QuantizeLinear reads and whose bounds it keeps anyway."""
    absorbed = []
    for node in list(program.graph):
        clip = made_by(node.inputs[0], "Relu", "Clip") if node.op_type == "QuantizeLinear" else None
        bounds = clip_bounds(clip)
        if clip is None or bounds is None or only_reader(clip.outputs[0]) is None:
            continue
        if not _saturates_within(node, *bounds):
            continue
        node.replace_input_with(0, clip.inputs[0])
        program.graph.remove(clip, safe=True)
        absorbed.append(str(clip.name))
    return absorbed


def _saturates_within(quantize: ir.Node, lo: float, hi: float) -> bool:
    """Whether all numbers that the quantizer can give lie in [lo, hi], to float32 rounding."""
    scale, zero = (
        v.const_value.numpy() if v is not None and v.const_value is not None else None for v in quantize.inputs[1:3]
    )
    if scale is None or zero is None or scale.ndim:
        return False
    held = np.iinfo(zero.dtype)
    first, last = held.min, held.max
    readers = [use.node for use in quantize.outputs[0].uses()]
    if len(readers) == 1 and readers[0].op_type == "Clip":  # codes of fewer bits than the type has
        first, last = (int(v.const_value.numpy()) for v in readers[0].inputs[1:3])  # type: ignore[union-attr]
    slack = 1e-6 * abs(hi) if np.isfinite(hi) else 0.0
    return bool((first - int(zero)) * scale >= lo and (last - int(zero)) * scale <= hi + slack)
