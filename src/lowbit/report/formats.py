"""Formats as a page: the catalogue, what they do to a model's weights, and that as a plot."""

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from rich.table import Table

if TYPE_CHECKING:
    from lowbit.flows.formats import OnModel
    from lowbit.numerics.catalogue import Entry


def catalogue_table(entries: "list[Entry]") -> Table:
    """One line a format."""
    table = Table(
        title="Formats: bits with scales, in a large tensor; values in units of the scale", title_justify="left"
    )
    for name in ("name", "bits", "codes", "largest", "step", "one scale for", "source"):
        table.add_column(name, justify="right" if name in ("bits", "codes", "largest", "step") else "left")
    for row in entries:
        largest, step = (_number(value) for value in (row.largest, row.step))
        table.add_row(row.name, f"{row.bits:g}", str(row.codes), largest, step, row.shares, row.source)
    return table


def _number(value: float | None) -> str:
    return "fitted" if value is None else f"{value:.4g}"


def on_model_table(rows: "list[OnModel]", source: str, float_bytes: int) -> Table:
    """One line a format, most bits first."""
    title = f"Weights of {source}: {float_bytes:,} bytes as float32"
    table = Table(title=title, title_justify="left")
    for name in ("format", "bits", "bytes", "of float", "mean SQNR", "worst", "of tensor"):
        table.add_column(name, justify="left" if name in ("format", "of tensor") else "right")
    for row in rows:
        share = f"{row.bytes / float_bytes:.1%}"
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


WIDTH, HEIGHT, MARGIN = 900, 560, 60


def plot_svg(rows: "list[OnModel]", title: str) -> str:
    """Mean SQNR over bits per weight, one labelled point a format; up and to the left is better."""
    bits = [row.bits for row in rows]
    decibels = [row.sqnr_db for row in rows]
    left, right = 0.0, max(bits) * 1.08
    bottom, top = min(0.0, *decibels), max(decibels) * 1.08

    def x(value: float) -> float:
        return MARGIN + (value - left) / (right - left) * (WIDTH - 2 * MARGIN)

    def y(value: float) -> float:
        return HEIGHT - MARGIN - (value - bottom) / (top - bottom) * (HEIGHT - 2 * MARGIN)

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" font-family="sans" font-size="11">',
        '<rect width="100%" height="100%" fill="white"/>',
        f'<text x="{MARGIN}" y="28" font-size="15">{_escape(title)}</text>',
        f'<text x="{WIDTH / 2}" y="{HEIGHT - 14}">bits per weight</text><text x="8" y="{MARGIN - 16}">SQNR, dB</text>',
    ]
    for tick in range(0, int(right) + 1, 2):
        parts.append(f'<path d="M{x(tick):.1f} {MARGIN}V{HEIGHT - MARGIN}" stroke="#ddd"/>')
        parts.append(f'<text x="{x(tick) - 3:.1f}" y="{HEIGHT - MARGIN + 16}">{tick}</text>')
    for tick in range(0, int(top) + 1, 10):
        parts.append(f'<path d="M{MARGIN} {y(tick):.1f}H{WIDTH - MARGIN}" stroke="#ddd"/>')
        parts.append(f'<text x="{MARGIN - 24}" y="{y(tick) + 4:.1f}">{tick}</text>')
    # 6.02 dB a bit: what a uniform source would give.
    parts.append(
        f'<path d="M{x(0):.1f} {y(0):.1f}L{x(top / 6.02):.1f} {y(top):.1f}" stroke="#bbb" stroke-dasharray="4"/>'
    )
    for row in rows:
        px, py = x(row.bits), y(row.sqnr_db)
        parts.append(f'<circle cx="{px:.1f}" cy="{py:.1f}" r="3.5" fill="#1f6fb2"/>')
        parts.append(f'<text x="{px + 6:.1f}" y="{py + 4:.1f}">{_escape(row.format)}</text>')
    return "\n".join([*parts, "</svg>\n"])


def _escape(text: str) -> str:
    return text.replace("&", "&amp;").replace("<", "&lt;")
