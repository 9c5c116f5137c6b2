"""Labelled points as SVG: every name legible, none upon another."""

from collections.abc import Sequence

WIDTH, HEIGHT, MARGIN = 1100, 760, 60
_LETTER, _LINE = 6.6, 13  # pixels of 11-point text
_STEPS = sorted(range(-14, 15), key=abs)  # lines by which a name may move away from its point

Box = tuple[float, float, float, float]  # left, top, right, bottom


def scatter_svg(
    points: Sequence[tuple[float, float, str]], title: str, across: str, up: str, slope: tuple[float, str] | None = None
) -> str:
    """Points (x ≥ 0, y, name) with axes from 0, or from the least y where that is below.

    across, up  what the axes are
    slope       a dashed line through 0 to compare with, and its name
    """
    right = max(x for x, _, _ in points) * 1.08
    bottom, top = min(0.0, *(y for _, y, _ in points)), max(1.0, *(y for _, y, _ in points)) * 1.08

    def at(x: float, y: float) -> tuple[float, float]:
        return (
            MARGIN + x / right * (WIDTH - 2 * MARGIN),
            HEIGHT - MARGIN - (y - bottom) / (top - bottom) * (HEIGHT - 2 * MARGIN),
        )

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" font-family="sans-serif" '
        'font-size="11">',
        '<rect width="100%" height="100%" fill="white"/>',
        f'<text x="{MARGIN}" y="28" font-size="15">{_escape(title)}</text>',
        f'<text x="{WIDTH / 2}" y="{HEIGHT - 14}" text-anchor="middle">{_escape(across)}</text>',
        f'<text x="8" y="{MARGIN - 14}">{_escape(up)}</text>',
    ]
    for tick in range(0, int(right) + 1, 2 if right <= 40 else 10):
        x, y = at(tick, bottom)
        parts.append(f'<path d="M{x:.1f} {MARGIN}V{y:.1f}" stroke="#ddd"/>')
        parts.append(f'<text x="{x:.1f}" y="{y + 16:.1f}" text-anchor="middle">{tick}</text>')
    for tick in range(0, int(top) + 1, 10):
        x, y = at(0, tick)
        parts.append(f'<path d="M{x:.1f} {y:.1f}H{WIDTH - MARGIN}" stroke="#ddd"/>')
        parts.append(f'<text x="{x - 8:.1f}" y="{y + 4:.1f}" text-anchor="end">{tick}</text>')
    if slope is not None:
        (x0, y0), (x1, y1) = at(0, 0), at(min(right, top / slope[0]), min(top, right * slope[0]))
        parts.append(f'<path d="M{x0:.1f} {y0:.1f}L{x1:.1f} {y1:.1f}" stroke="#bbb" stroke-dasharray="4"/>')
        parts.append(f'<text x="{x1 + 6:.1f}" y="{y1 + 10:.1f}" fill="#888">{_escape(slope[1])}</text>')
    places = [(*at(x, y), name) for x, y, name in points]
    for (x, y, name), (left, above, edge, below) in zip(places, _labels(places), strict=True):
        near, anchor = (left, "start") if left > x else (edge, "end")
        if abs((above + below) / 2 - y) > 1:
            parts.append(f'<path d="M{x:.1f} {y:.1f}L{near:.1f} {(above + below) / 2:.1f}" stroke="#9bbdd6"/>')
        parts.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3.5" fill="#1f6fb2"/>')
        parts.append(f'<text x="{near:.1f}" y="{below - 3:.1f}" text-anchor="{anchor}">{_escape(name)}</text>')
    return "\n".join([*parts, "</svg>\n"])


def _labels(places: Sequence[tuple[float, float, str]]) -> list[Box]:
    """A box for each name, beside its point if that is free, else as few lines away as can be."""
    taken: list[Box] = [(x - 4, y - 4, x + 4, y + 4) for x, y, _ in places]
    boxes = []
    for x, y, name in places:
        width = _LETTER * len(name)
        tries = [
            (start, y + step * _LINE / 2 - _LINE / 2, start + width, y + step * _LINE / 2 + _LINE / 2)
            for step in _STEPS
            for start in (x + 6 + 1.2 * abs(step), x - 6 - 1.2 * abs(step) - width)
            if start > MARGIN
        ]
        box = next((box for box in tries if not any(_meet(box, other) for other in taken)), tries[0])
        taken.append(box)
        boxes.append(box)
    return boxes


def _meet(one: Box, other: Box) -> bool:
    return one[0] < other[2] and other[0] < one[2] and one[1] < other[3] and other[1] < one[3]


def _escape(text: str) -> str:
    return text.replace("&", "&amp;").replace("<", "&lt;")
