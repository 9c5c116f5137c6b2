"""What is in a container, as a page and as JSON: per tensor sparsity, entropy, bits achieved; where every byte went."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Group, RenderableType
from rich.text import Text

from lowbit.report.table import table
from lowbit.report.words import bytes_text, times_text
from lowbit.storage.inspect import ContainerReport, TensorReport

SMALL = 512  # stored bytes; smaller tensors are summed up in one line unless all are asked for
USES = {
    "codes": "elements, entropy-coded",
    "indices": "relative indices of sparse tensors",
    "tables": "frequency tables and palettes",
    "index": "places, lengths, checksums",
    "program": "graph, names, metadata, small tensors",
    "header": "safetensors header",
}


def contents_dict(report: ContainerReport, file: Path) -> dict[str, Any]:
    """Plain values for JSON."""
    return {
        "file": str(file),
        "bytes_on_disk": report.size,
        "bytes_unpacked": report.unpacked_size,
        "bytes_by_use": report.bytes_by_use,
        "tensors": [asdict(tensor) | {"bits": tensor.bits} for tensor in report.tensors],
    }


def contents_view(report: ContainerReport, file: Path, every: bool = False) -> RenderableType:
    """The page of `lowbit show` for a container."""
    smaller = times_text(report.unpacked_size / report.size)
    head = f"{file.name}, {bytes_text(report.size)}; unpacks to {bytes_text(report.unpacked_size)} ({smaller})"
    hidden = [] if every else [tensor for tensor in report.tensors if tensor.stored_bytes < SMALL]
    tensors = [_row(tensor) for tensor in report.tensors if every or tensor.stored_bytes >= SMALL]
    if hidden:
        rest = sum(tensor.stored_bytes for tensor in hidden)
        tensors.append((f"{len(hidden)} smaller ones (--all)", *[""] * 6, f"{rest:,.0f}", "dim"))
    uses = [(use, USES[use], f"{n:,}", f"{n / report.size:.1%}") for use, n in report.bytes_by_use.items()]
    return Group(
        Text(head, style="bold"),
        "",
        table(("tensor", "type", "shape", "codec", ">equal", ">entropy", ">bits", ">bytes"), tensors),
        "",
        table(("bytes of", "what", ">bytes", ">share"), [*uses, ("all", "", f"{report.size:,}", "", "bold")]),
    )


def _row(tensor: TensorReport) -> tuple[object, ...]:
    entropy = None if tensor.entropy_bits is None else f"{tensor.entropy_bits:.3f}"
    shape = "×".join(map(str, tensor.shape))
    found = (f"{tensor.sparsity:.1%}", entropy, f"{tensor.bits:.3f}", f"{tensor.stored_bytes:,.0f}")
    return (tensor.name, tensor.type, shape, tensor.codec, *found)
