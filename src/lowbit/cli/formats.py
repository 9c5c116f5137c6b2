"""`lowbit formats`: the catalogue of number formats, and what each does to a model's own weights."""

from pathlib import Path
from typing import Annotated

import typer

from lowbit.cli.options import JsonOption
from lowbit.cli.output import answer, check_output


def formats(
    on: Annotated[
        Path | None,
        typer.Option("--on", metavar="MODEL", help="A network: noise and bytes of each format on its weights."),
    ] = None,
    names: Annotated[
        list[str] | None, typer.Argument(metavar="[FORMAT]...", help="Only these, in words: 'int4 group:64'.")
    ] = None,
    range: Annotated[str, typer.Option(help="How bounds are chosen: minmax, mse, octav, percentile:99.99, …")] = "mse",
    plot: Annotated[
        Path | None, typer.Option(metavar="FILE.html", help="Also draw SQNR over bits; needs lowbit[plot].")
    ] = None,
    json: JsonOption = False,
) -> None:
    """List the number formats: bits with scales, largest value, smallest step, source.

    With --on, quantize the network's real weights to each and list noise and bytes: what one wants to see before
    choosing. A name from here is a recipe: 'lowbit quantize net.onnx --recipe mxfp4'.

    Example: lowbit formats --on net.onnx --plot formats.html
    """
    from lowbit.errors import InputError
    from lowbit.numerics import parse_format
    from lowbit.numerics.catalogue import catalogue, entry
    from lowbit.report.format_tables import catalogue_table, on_model_table
    from lowbit.report.words import plain

    if on is None:
        if plot is not None:
            raise InputError("--plot draws the formats on a network's weights: give --on MODEL as well.")
        entries = [entry(name, parse_format(name)) for name in names] if names else catalogue()
        answer(json, {"formats": plain(entries)}, catalogue_table(entries))
        return

    from lowbit.flows.weight_formats import COMPARED, formats_on, weights_on
    from lowbit.model import load
    from lowbit.ranges import parse_range
    from lowbit.storage.atomic import write_bytes

    if plot is not None:
        check_output(plot, [on], {".html": "a page"})
        from lowbit.report.plot import plot_html
    model = load(on)
    rows = formats_on(model, tuple(names or COMPARED), parse_range(range))
    if plot is not None:
        write_bytes(plot, plot_html(rows, f"{on.name}: weights").encode())
    values = {"model": str(on), "range": range, "formats": plain(rows)}
    answer(json, values, on_model_table(rows, on.name, sum(w.weight.nbytes for w in weights_on(model).values())))
