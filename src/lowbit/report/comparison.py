"""A comparison as a page in the terminal."""

from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from lowbit.report.table import table
from lowbit.report.words import bytes_text, db_text, times_text

if TYPE_CHECKING:
    from lowbit.flows.compare import Comparison
    from lowbit.flows.fidelity import LayerFidelity

LAYERS_SHOWN = 12


def comparison_view(found: "Comparison") -> RenderableType:
    """The two networks side by side, each output's closeness, the noisiest values inside, and the verdict."""
    parts: list[RenderableType] = [_sides(found), "", _outputs(found)]
    if found.slowest is not None:
        parts.insert(1, f"slower because of {found.slowest}")
    if found.layers:
        parts += ["", _layers(found.layers)]
    style = {"keeps": "bold green", "nearly keeps": "bold yellow"}.get(found.kept, "bold red")
    return Group(*parts, "", Text(found.verdict, style=style))


def as_text(renderable: object) -> str:
    """What a renderable looks like without colour."""
    console = Console(width=160, force_terminal=False, no_color=True, highlight=False)
    with console.capture() as captured:
        console.print(renderable)
    return captured.get().rstrip("\n")


def _sides(found: "Comparison") -> Table:
    sides = (found.reference, found.candidate)
    rows: list[tuple[object, ...]] = []
    if found.metric is not None and found.metric_change is not None:
        rows.append((found.metric, *(found.metric_text(side.metric) for side in sides), found.change_text))
    smaller, noted = times_text(found.times_smaller), any(side.note_bytes for side in sides)
    rows.append(("bytes on disk", *(bytes_text(side.bytes_on_disk) for side in sides), "" if noted else smaller))
    if noted:
        rows.append(("without exporters' notes", *(bytes_text(side.network_bytes) for side in sides), smaller))
    if found.times_faster is not None:
        what = f"latency, {found.engine}, batch {found.latency_batch}, {found.threads_text}"
        times = (side.latency and f"{side.latency.median_ms:.3g} ms" for side in sides)
        rows.append((what, *times, found.faster_text))
    return table(("", *(f">{Path(side.name).name}" for side in sides), ">"), rows)


def _outputs(found: "Comparison") -> Table:
    headings = (f"output, {found.samples:,} samples", ">same answer", ">SQNR", ">cosine", ">largest difference")
    rows = []
    for output in found.outputs:
        same = None if output.agreement is None else f"{100 * output.agreement:.2f} %"
        closeness = (db_text(output.sqnr_db), f"{output.cosine:.5f}", f"{output.largest_difference:.3g}")
        rows.append((output.name, same, *closeness))
    return table(headings, rows)


def _layers(layers: "tuple[LayerFidelity, ...]") -> Table:
    worst = sorted(layers, key=lambda layer: layer.sqnr_db)[:LAYERS_SHOWN]
    heading = f"noisiest of {len(layers)} values inside, in the network's order"
    rows = [(layer.value, layer.op, db_text(layer.sqnr_db)) for layer in layers if layer in worst]
    return table((heading, "operator", ">SQNR"), rows)
