"""What onnxruntime makes of a network at load: which of its operators run in integers, and which were left in float."""

import tempfile
from collections import Counter
from pathlib import Path

import onnx

from lowbit.network.operators import OPERATORS

# Operators that hand on what they are given: integers if they are given integers.
MOVING = frozenset(name for name, row in OPERATORS.items() if row.shares)
CONVERTING = frozenset({"QuantizeLinear", "DequantizeLinear"})


def optimized(path: Path, threads: int = 1) -> onnx.ModelProto:
    """The graph as onnxruntime runs it."""
    import onnxruntime

    with tempfile.TemporaryDirectory(prefix="lowbit-") as folder:
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 4
        options.intra_op_num_threads = threads
        options.optimized_model_filepath = str(Path(folder) / "optimized.onnx")
        onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        return onnx.load(options.optimized_model_filepath)


def operators(model: onnx.ModelProto) -> dict[str, Counter[str]]:
    """Counts of operators: those that compute in "integer", in "float", and those that "convert" between the two."""
    counts: dict[str, Counter[str]] = {"integer": Counter(), "float": Counter(), "convert": Counter()}
    integers = {
        t.name for t in model.graph.initializer if t.data_type in (onnx.TensorProto.INT8, onnx.TensorProto.UINT8)
    }
    for node in model.graph.node:
        inside = any(name in integers for name in node.input)
        kind = "convert" if node.op_type in CONVERTING else "integer" if inside else "float"
        counts[kind][node.op_type] += 1
        gives_integers = node.op_type == "QuantizeLinear" or node.op_type.startswith(("QLinear", "QGemm"))
        if gives_integers or (inside and node.op_type in MOVING):
            integers.update(node.output)
    return counts


def words(counts: Counter[str]) -> str:
    """`3 Add, 1 Softmax`, most frequent first."""
    return ", ".join(f"{count} {op}" for op, count in counts.most_common()) or "none"
