"""Tables of the terminal, all in one look."""

from collections.abc import Iterable, Sequence

from rich import box
from rich.table import Table


def table(headings: Sequence[str], rows: Iterable[Sequence[object]], *, title: str | None = None) -> Table:
    """A table; a heading that starts with > stands over numbers, to the right. None is an empty cell.

    A row may have one entry more than there are headings: its style ("dim", "bold").
    """
    made = Table(
        title=None if title is None else f"{title}\n",
        title_justify="left",
        title_style="bold",
        box=box.SIMPLE_HEAD,
        pad_edge=False,
        show_edge=False,
    )
    for heading in headings:
        right = heading.startswith(">")
        made.add_column(heading.removeprefix(">"), justify="right" if right else "left", overflow="fold")
    for row in rows:
        cells = ["" if cell is None else str(cell) for cell in row]
        made.add_row(*cells[: len(headings)], style="".join(cells[len(headings) :]))
    return made
