"""Charts as HTML: shapes in SVG that stretch to the page's width, words beside them as text that keeps its size.

So a chart reads alike at 1,280 and at 390 pixels. Dots are lines of no length with round ends: they stay round.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape
from math import log10

WIDTH, HEIGHT = 1000.0, 200.0  # of every viewBox; the page decides what they measure


@dataclass(frozen=True)
class Axis:
    """From values to parts of 1."""

    low: float
    high: float

    def at(self, value: float) -> float:
        """Where a value is, within 0 … 1."""
        span = self.high - self.low
        return min(1.0, max(0.0, (value - self.low) / span)) if span else 0.5


def figure(shapes: str, told: str, ys: Sequence[tuple[float, str]], xs: Sequence[tuple[float, str]] = ()) -> str:
    """A chart with its labels: (part of 1, text) along each axis.

    told   what it shows, for who cannot see it
    """
    grid = "".join(f'<path class="grid" d="M0 {_y(at)}H{WIDTH:.0f}"/>' for at, _ in ys)
    left = "".join(f'<span style="bottom:{100 * at:.1f}%">{escape(text)}</span>' for at, text in ys)
    below = "".join(f'<span style="left:{100 * at:.1f}%">{escape(text)}</span>' for at, text in xs)
    return (
        f'<div class="plot"><div class="ys" aria-hidden="true">{left}</div>'
        f'<svg viewBox="0 0 {WIDTH:.0f} {HEIGHT:.0f}" preserveAspectRatio="none" role="img" '
        f'aria-label="{escape(told)}">{grid}{shapes}</svg>'
        f'<div class="xs" aria-hidden="true">{below}</div></div>'
    )


def line(points: Iterable[tuple[float, float, str]], kind: str) -> str:
    """Dots (x, y, words) joined by a line; x and y in parts of 1."""
    placed = [(x * WIDTH, _y(y), words) for x, y, words in points]
    joined = " ".join(f"{x:.1f},{y}" for x, y, _ in placed)
    dots = "".join(f'<path class="dot" d="M{x:.1f} {y}h0"><title>{escape(w)}</title></path>' for x, y, w in placed)
    return f'<g class="{kind}"><polyline points="{joined}"/>{dots}</g>'


def columns(parts: Sequence[Sequence[tuple[float, str, str]]]) -> str:
    """Columns side by side, each of (height in parts of 1, kind, words) from the bottom up."""
    width, found = WIDTH / max(1, len(parts)), []
    for index, column in enumerate(parts):
        bottom = 0.0
        for height, kind, words in column:
            top = min(1.0, bottom + height)
            found.append(
                f'<rect class="{kind}" x="{(index + 0.1) * width:.2f}" y="{_y(top)}" width="{0.8 * width:.2f}" '
                f'height="{(top - bottom) * HEIGHT:.2f}"><title>{escape(words)}</title></rect>'
            )
            bottom = top
    return "".join(found)


def histogram(counts: Sequence[int], axis: Axis, limits: tuple[float, float] | None) -> str:
    """Counts over equal bins of the axis, heights logarithmic; outside `limits` values are clipped."""
    top = max(log10(1 + count) for count in counts) or 1.0
    width = (axis.high - axis.low) / len(counts)
    middles = [axis.low + (i + 0.5) * width for i in range(len(counts))]
    kinds = ["bad" if limits and not limits[0] <= m <= limits[1] else "activation" for m in middles]
    bars = [[(log10(1 + c) / top, k, f"{m:.3g}: {c:,}")] for c, k, m in zip(counts, kinds, middles, strict=True)]
    lines = [f'<path class="limit" d="M{axis.at(x) * WIDTH:.1f} 0V{HEIGHT:.0f}"/>' for x in limits or ()]
    return columns(bars) + "".join(lines)


def bars(rows: Sequence[tuple[str, float, str]], kind: str = "activation", longest: float = 0) -> str:
    """Rows (name, length, words); `longest`, or the longest of them, goes over the whole width."""
    longest = longest or max((length for _, length, _ in rows), default=0) or 1
    return '<div class="bars">' + "".join(
        f'<div><span class="name">{escape(name)}</span><span class="track"><span class="fill {kind}" '
        f'style="width:{100 * length / longest:.2f}%"></span></span><span class="number">{escape(words)}</span></div>'
        for name, length, words in rows
    ) + "</div>"  # fmt: skip


def spans(rows: Sequence[tuple[str, float, float, float, str]]) -> str:
    """Rows (name, least, middle, most, words) on one logarithmic axis."""
    axis = Axis(log10(min(row[1] for row in rows)), log10(max(row[3] for row in rows)))

    def part(value: float) -> float:
        return 100 * axis.at(log10(value))

    return '<div class="bars">' + "".join(
        f'<div><span class="name">{escape(name)}</span><span class="track"><span class="fill span" '
        f'style="left:{part(low):.2f}%;width:{part(high) - part(low):.2f}%"></span><span class="mark" '
        f'style="left:{part(middle):.2f}%"></span></span><span class="number">{escape(words)}</span></div>'
        for name, low, middle, high, words in rows
    ) + "</div>"  # fmt: skip


def legend(**entries: str) -> str:
    """Colour → what it stands for."""
    return (
        '<ul class="legend">'
        + "".join(f'<li><i class="{k}"></i>{escape(w)}</li>' for k, w in entries.items())
        + "</ul>"
    )


def html_table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table that scrolls by itself where the page is narrow.

    heads   one that starts with > stands over numbers; one with ~ over text that may take several lines
    """
    kinds = [{">": ' class="n"', "~": ' class="wide"'}.get(head[:1], "") for head in heads]
    head = "".join(f"<th{k}>{escape(h.lstrip('>~'))}</th>" for h, k in zip(heads, kinds, strict=True))
    body = "".join(
        "<tr>" + "".join(f"<td{k}>{escape(c)}</td>" for c, k in zip(row, kinds, strict=True)) + "</tr>" for row in rows
    )
    return f'<div class="scroll" tabindex="0"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def _y(part: float) -> str:
    return f"{(1 - part) * HEIGHT:.2f}"
