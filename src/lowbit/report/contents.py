"""What is in a container, as a page and as JSON: per tensor sparsity, entropy, bits achieved; where every byte went."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from lowbit.report.words import bytes_text, times_text
from lowbit.storage.inspect import ContainerReport

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
    smaller = times_text(report.unpacked_size / report.size, "smaller", "larger", "same size")
    head = f"{file.name}, {bytes_text(report.size)}; unpacks to {bytes_text(report.unpacked_size)} ({smaller})"
    return Group(Text(head, style="bold"), "", _tensors(report, every), "", _uses(report))


def _tensors(report: ContainerReport, every: bool) -> Table:
    table = _columns("tensor", "type", "shape", "codec", "equal", "entropy", "bits", "bytes")
    shown = [t for t in report.tensors if every or t.stored_bytes >= SMALL]
    for tensor in shown:
        table.add_row(
            tensor.name,
            tensor.type,
            "×".join(map(str, tensor.shape)),
            tensor.codec,
            f"{tensor.sparsity:.1%}",
            "" if tensor.entropy_bits is None else f"{tensor.entropy_bits:.3f}",
            f"{tensor.bits:.3f}",
            f"{tensor.stored_bytes:,.0f}",
        )
    if hidden := len(report.tensors) - len(shown):
        rest = sum(t.stored_bytes for t in report.tensors) - sum(t.stored_bytes for t in shown)
        table.add_row(f"{hidden} smaller ones (--all)", *[""] * 6, f"{rest:,.0f}", style="dim")
    return table


def _uses(report: ContainerReport) -> Table:
    table = _columns("bytes of", "what", "bytes", "share")
    for use, count in report.bytes_by_use.items():
        table.add_row(use, USES[use], f"{count:,}", f"{count / report.size:.1%}")
    table.add_row("all", "", f"{report.size:,}", "", style="bold")
    return table


def _columns(*names: str) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    right = {"equal", "entropy", "bits", "bytes", "share"}
    for name in names:
        table.add_column(name, justify="right" if name in right else "left", overflow="fold")
    return table
