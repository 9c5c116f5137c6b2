"""Which operators of a program take the time, from the engine's own profile."""

import json
import tempfile
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx_ir as ir

from lowbit.engines.compile import Batch, serialize
from lowbit.engines.read_back import TAG

CALLS = 5  # after one that is not counted


@dataclass(frozen=True)
class OperatorTime:
    """One node of the engine's graph: its operator, its name, its time in a call, and its share of that of all nodes.

    microseconds   mean over the counted calls, while profiling
    share          0 to 1
    """

    operator: str
    node: str
    microseconds: float
    share: float

    def __str__(self) -> str:
        return f"{self.operator} of '{self.node}': {100 * self.share:.0f} % of the time"


def operator_times(program: ir.Model | Path, batch: Batch, threads: int = 1) -> list[OperatorTime]:
    """The nodes that onnxruntime runs in a default session, the slowest first."""
    times: dict[tuple[str, str], float] = {}
    for event in _events(_named(program), batch, threads):
        node, _, kind = str(event["name"]).rpartition("_kernel_")
        if kind == "time" and event.get("cat") == "Node":
            key = (str(event["args"]["op_name"]), node)
            times[key] = times.get(key, 0.0) + float(event["dur"]) / CALLS
    total = max(sum(times.values()), 1e-9)
    slowest_first = sorted(times.items(), key=lambda pair: -pair[1])
    return [OperatorTime(operator, node, time, time / total) for (operator, node), time in slowest_first]


def layer_seconds(program: ir.Model, layers: Collection[str], batch: Batch) -> dict[str, float]:
    """Layer → its time in onnxruntime, with that of what follows it up to the next layer; "": what no layer precedes.

    layers   names of nodes; the time is that of one thread
    """
    nodes = list(program.graph)
    copy = program.clone()
    for index, node in enumerate(copy.graph):  # kernels are called after a node, or after the value that it makes
        node.name = f"@{index}@"
        for value in node.outputs:
            value.name = value.name and f"@{index}@{value.name}"
    times: dict[str, list[float]] = {}
    for event in _events(serialize(copy), batch, threads=1):
        name, _, kind = str(event["name"]).rpartition("_kernel_")
        if kind == "time" and event.get("cat") == "Node":
            times.setdefault(name, []).append(float(event["dur"]) * 1e-6)
    found = dict.fromkeys((*layers, ""), 0.0)
    for name, seconds in times.items():
        tag = TAG.search(name)
        # The least of all calls: what else the machine did makes a call longer, never shorter.
        found[_layer_of(nodes[int(tag[1])], layers) if tag else ""] += min(seconds)
    return found


def _layer_of(node: ir.Node | None, layers: Collection[str]) -> str:
    """The node if it is a layer, or the last one before it along first inputs."""
    while node is not None and node.name not in layers:
        node = node.inputs[0].producer() if node.inputs and node.inputs[0] is not None else None
    return "" if node is None else str(node.name)


def _named(program: ir.Model | Path) -> bytes:
    """The program with a name for each node: files leave out names that nobody reads. What it makes is as good."""
    named = ir.load(program) if isinstance(program, Path) else program.clone()
    for node in named.graph:
        node.name = node.name or node.outputs[0].name
    return serialize(named)


def _events(model: bytes, batch: Batch, threads: int) -> list[dict[str, Any]]:
    """What onnxruntime noted during the counted calls."""
    import onnxruntime

    with tempfile.TemporaryDirectory(prefix="lowbit-") as folder:
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 4
        options.intra_op_num_threads = threads
        options.enable_profiling = True
        options.profile_file_prefix = str(Path(folder) / "profile")
        session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
        for _ in range(1 + CALLS):
            session.run(None, batch)
        events = json.loads(Path(session.end_profiling()).read_text(encoding="utf-8"))
    runs = [event["ts"] for event in events if event["name"] == "model_run"]
    warm = sorted(runs)[1] if len(runs) > 1 else 0
    return [event for event in events if event["ts"] >= warm]
