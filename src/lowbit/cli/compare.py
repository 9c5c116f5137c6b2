"""`lowbit compare`: does the quantized network still do its job, how much smaller is it, how much faster."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from lowbit.cli.options import DROP, DataOption, JsonOption, RunOptions, with_groups
from lowbit.cli.output import answer, progress


class Measured(StrEnum):
    """What takes time and can be left out."""

    LATENCY = "latency"
    LAYERS = "layers"


@with_groups
def compare(
    reference: Annotated[Path, typer.Argument(metavar="FLOAT", help="The network as it was, an .onnx file.")],
    candidate: Annotated[Path, typer.Argument(metavar="QUANTIZED", help="The network to judge, an .onnx file.")],
    data: DataOption,
    running: RunOptions,
    threads: Annotated[int, typer.Option(min=1, help="Threads while latency is measured.")] = 1,
    without: Annotated[
        list[Measured] | None,
        typer.Option(help="Do not measure latency, or noise inside the networks (layers); may be given twice."),
    ] = None,
    max_drop: Annotated[
        float | None,
        typer.Option(metavar="POINTS", help=f"Exit with status 2 if the metric is worse by more. {DROP}"),
    ] = None,
    json: JsonOption = False,
) -> None:
    """Run both networks on the same samples: metric, same answers, noise (SQNR), bytes, latency side by side.

    Without labels the quantized network is held against the float one. Latency is of one sample at a time, the two
    networks alternating, medians.

    Example: lowbit compare net.onnx net.int8.onnx --data test.npz
    """
    from lowbit.errors import DataError
    from lowbit.flows.compare import compare as compare_models
    from lowbit.model import load

    inputs = load(reference, allow_nonfinite=True).inputs
    with progress(json) as bar:
        found = compare_models(
            reference,
            candidate,
            running.open(data, inputs, bar, "comparing"),
            running.metric,
            latency=Measured.LATENCY not in (without or ()),
            layers=Measured.LAYERS not in (without or ()),
            threads=threads,
            engine=running.engine,
            batch=running.batch,
        )
    if max_drop is not None and found.metric_change is None:
        raise DataError("--max-drop needs labels and a metric, and the data has none.")
    answer(json, found.to_dict(), found)
    if max_drop is not None and found.drop > max_drop:
        raise typer.Exit(2)
