"""Formats on a model's weights as a plot: one HTML file that needs no network. Imported only where one is asked for."""

from typing import TYPE_CHECKING

from lowbit.errors import UnsupportedError

if TYPE_CHECKING:
    from lowbit.flows.weight_formats import OnModel

try:
    import plotly.graph_objects as go
except ImportError:
    raise UnsupportedError("plotly is not installed: pip install 'lowbit[plot]'.") from None


def plot_html(rows: "list[OnModel]", title: str) -> str:
    """Mean SQNR over bits per weight, one labelled point a format; up and to the left is better."""
    bits = [row.bits for row in rows]
    points = go.Scatter(
        x=bits, y=[row.sqnr_db for row in rows], text=[row.format for row in rows],
        mode="markers+text", textposition="middle right", showlegend=False,
    )  # fmt: skip
    slope = go.Scatter(x=[0, max(bits)], y=[0, 6.02 * max(bits)], mode="lines", line_dash="dot", name="6.02 dB a bit")
    figure = go.Figure([points, slope])
    figure.update_layout(title_text=title, xaxis_title="bits per weight", yaxis_title="mean SQNR, dB")
    return str(figure.to_html(include_plotlyjs=True))
