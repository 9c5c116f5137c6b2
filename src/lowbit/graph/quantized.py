"""Is a network quantized already? By its operators, whoever wrote them, or by what lowbit left in the file."""

from __future__ import annotations

from collections import Counter

import onnx_ir as ir

_OPERATORS = frozenset(
    {
        *("QuantizeLinear", "DequantizeLinear", "DynamicQuantizeLinear", "ConvInteger", "MatMulInteger"),
        *("MatMulNBits", "MatMulBnb4", "GatherBlockQuantized", "MatMulFpQ4", "MatMulIntegerToFloat"),
        *("DynamicQuantizeMatMul", "DynamicQuantizeLSTM", "QAttention", "QGemm", "QMoE", "FakeQuantize"),
    }
)


def how_quantized(program: ir.Model) -> str | None:
    """What shows it, in words; None for a float network."""
    if "lowbit.recipe" in program.metadata_props:
        return "by lowbit: `lowbit show` prints its recipe"
    found = Counter(
        node.op_type
        for node in program.graph.all_nodes()
        if node.op_type in _OPERATORS or node.op_type.startswith("QLinear")
    )
    return ", ".join(f"{count} {name}" for name, count in found.most_common(3)) or None
