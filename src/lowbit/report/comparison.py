"""A comparison as a page in the terminal."""

from pathlib import Path
from typing import TYPE_CHECKING

from rich import box
from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from lowbit.report.words import bytes_text, db_text, times_text

if TYPE_CHECKING:
    from lowbit.flows.compare import Comparison, Side
    from lowbit.flows.fidelity import LayerFidelity
    from lowbit.flows.latency import Timing

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


def as_text(renderable: object, width: int = 160) -> str:
    """What a renderable looks like without colour."""
    import io

    console = Console(file=io.StringIO(), width=width, no_color=True, highlight=False)
    console.print(renderable)
    file = console.file
    assert isinstance(file, io.StringIO)
    return file.getvalue().rstrip("\n")


def _sides(found: "Comparison") -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
    table.add_column("")
    for side in (found.reference, found.candidate):
        table.add_column(Path(side.name).name, justify="right", overflow="fold")
    table.add_column("", justify="right")
    if found.metric is not None and found.metric_change is not None:
        values = [found.metric_text(side.metric) for side in (found.reference, found.candidate)]
        table.add_row(found.metric, *values, found.change_text)
    noted = any(side.note_bytes for side in _both(found))
    on_disk = (bytes_text(side.bytes_on_disk) for side in _both(found))
    table.add_row("bytes on disk", *on_disk, "" if noted else _smaller(found))
    if noted:
        without = (bytes_text(side.network_bytes) for side in _both(found))
        table.add_row("without exporters' notes", *without, _smaller(found))
    if found.times_faster is not None:
        threads = f"{found.threads} thread{'s' * (found.threads != 1)}"
        what = f"latency, {found.engine}, batch {found.latency_batch}, {threads}"
        table.add_row(what, *(_milliseconds(side.latency) for side in _both(found)), _faster(found))
    return table


def _both(found: "Comparison") -> "tuple[Side, Side]":
    return found.reference, found.candidate


def _smaller(found: "Comparison") -> str:
    return times_text(found.times_smaller, "smaller", "larger", "same size")


def _faster(found: "Comparison") -> str:
    return times_text(found.times_faster or 1.0, "faster", "slower", "same speed")


def _milliseconds(timing: "Timing | None") -> str:
    return "" if timing is None else f"{timing.median_ms:.3g} ms"


def _outputs(found: "Comparison") -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
    table.add_column(f"output, {found.samples:,} samples")
    for heading in ("same answer", "SQNR", "cosine", "largest difference"):
        table.add_column(heading, justify="right")
    for output in found.outputs:
        agreement = "" if output.agreement is None else f"{100 * output.agreement:.2f} %"
        difference = f"{output.largest_difference:.3g}"
        table.add_row(output.name, agreement, db_text(output.sqnr_db), f"{output.cosine:.5f}", difference)
    return table


def _layers(layers: "tuple[LayerFidelity, ...]") -> Table:
    worst = sorted(layers, key=lambda layer: layer.sqnr_db)[:LAYERS_SHOWN]
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
    table.add_column(f"noisiest of {len(layers)} values inside, in the network's order", overflow="fold")
    table.add_column("operator")
    table.add_column("SQNR", justify="right")
    for layer in layers:
        if layer in worst:
            table.add_row(layer.value, layer.op, db_text(layer.sqnr_db))
    return table
