"""Formats as a page: the catalogue, what they do to a model's weights, and that as a plot."""

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from rich import box
from rich.table import Table

from lowbit.report.scatter import scatter_svg

if TYPE_CHECKING:
    from lowbit.flows.formats import OnModel
    from lowbit.numerics.catalogue import Entry


def catalogue_table(entries: "list[Entry]") -> Table:
    """One line a format."""
    table = _table("Formats: bits with scales, in a large tensor; values in units of the scale")
    for name in ("name", "bits", "codes", "largest", "step", "one scale for", "source"):
        table.add_column(name, justify="right" if name in ("bits", "codes", "largest", "step") else "left")
    for row in entries:
        largest, step = (_number(value) for value in (row.largest, row.step))
        table.add_row(row.name, f"{row.bits:g}", str(row.codes), largest, step, row.shares, row.source)
    return table


def _table(title: str) -> Table:
    return Table(title=f"{title}\n", title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, pad_edge=False,
                 show_edge=False)  # fmt: skip


def _number(value: float | None) -> str:
    return "fitted" if value is None else f"{value:.5g}"


def on_model_table(rows: "list[OnModel]", source: str, float_bytes: int) -> Table:
    """One line a format, most bits first."""
    table = _table(f"Weights of {source}: {float_bytes:,} bytes as float32")
    for name in ("format", "bits", "bytes", "of float", "mean SQNR", "worst", "of tensor"):
        table.add_column(name, justify="left" if name in ("format", "of tensor") else "right")
    for row in rows:
        share = f"{100 * row.bytes / float_bytes:.1f} %"
        cells = (
            f"{row.bits:.2f}",
            f"{row.bytes:,}",
            share,
            f"{row.sqnr_db:.1f} dB",
            f"{row.worst_db:.1f} dB",
            row.worst,
        )
        table.add_row(row.format, *cells)
    return table


def rows_json(rows: "list[Entry] | list[OnModel]") -> list[dict[str, Any]]:
    """The same numbers for machines; infinities become null."""
    return [{k: None if v in (float("inf"), float("-inf")) else v for k, v in asdict(row).items()} for row in rows]


def plot_svg(rows: "list[OnModel]", title: str) -> str:
    """Mean SQNR over bits per weight, one labelled point a format; up and to the left is better."""
    points = [(row.bits, row.sqnr_db, row.format) for row in rows]
    return scatter_svg(points, title, "bits per weight", "SQNR, dB", (6.02, "6.02 dB a bit"))
