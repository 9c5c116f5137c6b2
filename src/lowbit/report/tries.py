"""The tries of a search as a page in the terminal."""

from typing import TYPE_CHECKING

from rich.console import Group, RenderableType
from rich.text import Text

from lowbit.report.table import table
from lowbit.report.words import bytes_text

if TYPE_CHECKING:
    from lowbit.flows.search import Search
    from lowbit.flows.tries import Try


def tries_view(found: "Search") -> RenderableType:
    """A row for each try, the one that was kept in bold, and the verdict."""
    headings = ("tried", f">{found.metric.name}", ">drop", ">bytes", ">latency", ">seconds", "")
    rows = [_row(found, row) for row in found.tries]
    style = "bold green" if found.reached else "bold red"
    return Group(table(headings, rows), "", Text(found.verdict, style=style))


def _row(found: "Search", row: "Try") -> tuple[object, ...]:
    style = "bold" if row is found.best else ""
    if row.measured is None:
        return row.what, None, None, None, None, f"{row.seconds:.1f}", found.why(row), style
    m = row.measured
    numbers = (found.metric.text(m.metric), f"{m.drop:.2f}", bytes_text(m.bytes), f"{m.latency_ms:.3g} ms")
    return row.what, *numbers, f"{row.seconds:.1f}", found.why(row), style
