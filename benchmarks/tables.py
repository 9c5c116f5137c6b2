"""Tables on the screen and rows as JSON."""

import argparse
import json
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

Row = Mapping[str, Any]


def show(title: str, rows: Sequence[Row], as_json: bool = False, digits: Mapping[str, int] | None = None) -> None:
    """One table; the columns are those that any row has, in the order in which they are met. Numbers align right.

    digits   after the point, by column; other numbers have four below 1.5 and two above
    """
    if as_json:
        print(json.dumps({"title": title, "rows": rows}, indent=1))
        return
    columns = list(dict.fromkeys(name for row in rows for name in row))
    table = Table(title=title, title_justify="left")
    for name in columns:
        numeric = any(isinstance(row.get(name), (int, float)) for row in rows)
        table.add_column(name, justify="right" if numeric else "left", overflow="fold")
    for row in rows:
        table.add_row(*(_text(row.get(name), (digits or {}).get(name)) for name in columns))
    Console(width=None if Console().is_terminal else 200).print(table)


def _text(value: Any, digits: int | None = None) -> str:
    if value is None:
        return ""
    if not isinstance(value, float):
        return str(value)
    if digits is None:
        digits = 4 if abs(value) < 1.5 else 2
    return f"{value:.{digits}f}"


def arguments(doc: str, names: Sequence[str]) -> argparse.ArgumentParser:
    """What every page takes: which networks, and JSON instead of a table."""
    parser = argparse.ArgumentParser(description=doc.splitlines()[0])
    parser.add_argument(
        "networks", nargs="*", choices=[*names, []], default=[], metavar="NETWORK", help=", ".join(names)
    )
    parser.add_argument("--json", action="store_true", help="rows as JSON")
    return parser
