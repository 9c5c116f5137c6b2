"""Relu and Clip absorbed into the quantizer behind them. Exact: a quantizer saturates at the ends of its own range.

A Relu in front of codes that cannot be negative, or a Clip(0, 6) in front of a range that ends at 6 or below, does
nothing.
"""

import numpy as np
import onnx_ir as ir


def absorb_clips(program: ir.Model) -> list[str]:
    """Remove, in place, each Relu or Clip that only a QuantizeLinear reads and whose bounds it keeps anyway."""
    absorbed = []
    for node in list(program.graph):
        clip = node.inputs[0].producer() if node.op_type == "QuantizeLinear" and node.inputs[0] is not None else None
        if clip is None or clip.op_type not in ("Relu", "Clip") or len(clip.outputs[0].uses()) != 1:
            continue
        if clip.outputs[0].is_graph_output() or not _saturates_within(node, *bounds_of(clip)):
            continue
        node.replace_input_with(0, clip.inputs[0])
        program.graph.remove(clip, safe=True)
        absorbed.append(str(clip.name))
    return absorbed


def bounds_of(clip: ir.Node) -> tuple[float, float]:
    """(lowest, highest) value that a Relu or Clip lets through."""
    if clip.op_type == "Relu":
        return 0.0, np.inf
    ends = [clip.inputs[i] if len(clip.inputs) > i else None for i in (1, 2)]
    constants = [None if v is None else v.const_value for v in ends]
    if any(v is not None and c is None for v, c in zip(ends, constants, strict=True)):
        return np.inf, -np.inf  # computed bounds: never inside
    lo, hi = (d if c is None else float(c.numpy()) for c, d in zip(constants, (-np.inf, np.inf), strict=True))
    return lo, hi


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
