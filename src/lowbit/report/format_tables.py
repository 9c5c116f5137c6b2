"""Formats as tables: the catalogue, and what they do to a model's weights."""

from typing import TYPE_CHECKING

from rich.table import Table

from lowbit.report.table import table

if TYPE_CHECKING:
    from lowbit.flows.weight_formats import OnModel
    from lowbit.numerics.catalogue import Entry


def catalogue_table(entries: "list[Entry]") -> Table:
    """One line a format."""
    return table(
        ("name", ">bits", ">codes", ">largest", ">step", "one scale for", "source"),
        [(e.name, f"{e.bits:g}", e.codes, _number(e.largest), _number(e.step), e.shares, e.source) for e in entries],
        title="Formats: bits with scales, in a large tensor; values in units of the scale",
    )


def on_model_table(rows: "list[OnModel]", source: str, float_bytes: int) -> Table:
    """One line a format, most bits first."""
    cells = []
    for row in rows:
        size = (f"{row.bits:.2f}", f"{row.bytes:,}", f"{100 * row.bytes / float_bytes:.1f} %")
        cells.append((row.format, *size, f"{row.sqnr_db:.1f} dB", f"{row.worst_db:.1f} dB", row.worst))
    headings = ("format", ">bits", ">bytes", ">of float", ">mean SQNR", ">worst", "of tensor")
    return table(headings, cells, title=f"Weights of {source}: {float_bytes:,} bytes as float32")


def _number(value: float | None) -> str:
    return "fitted" if value is None else f"{value:.5g}"
