"""`lowbit compare`: does the quantized network still do its job, how much smaller is it, how much faster."""

from pathlib import Path
from typing import Annotated

import typer

from lowbit.cli.options import (
    BatchOption,
    DataOption,
    EngineOption,
    JsonOption,
    LimitOption,
    MetricOption,
    NamesOption,
    PreprocessOption,
    SkipOption,
    open_data,
    print_json,
    progress,
    show_page,
)


def compare(
    reference: Annotated[Path, typer.Argument(metavar="FLOAT", help="The network as it was, an .onnx file.")],
    candidate: Annotated[Path, typer.Argument(metavar="QUANTIZED", help="The network to judge, an .onnx file.")],
    data: DataOption,
    metric: MetricOption = None,
    preprocess: PreprocessOption = None,
    names: NamesOption = None,
    limit: LimitOption = None,
    skip: SkipOption = 0,
    batch: BatchOption = None,
    threads: Annotated[int, typer.Option(min=1, help="Threads while latency is measured.")] = 1,
    engine: EngineOption = "onnxruntime",
    latency: Annotated[bool, typer.Option(help="Measure latency.")] = True,
    layers: Annotated[bool, typer.Option(help="Measure noise inside the networks.")] = True,
    max_drop: Annotated[
        float | None,
        typer.Option(metavar="DROP", help="Exit with status 2 if the metric is worse by more; top1: .01 is one point."),
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
    with progress("comparing", json) as watch:
        samples = open_data(data, inputs, preprocess, names, skip, limit, watch)
        found = compare_models(
            reference,
            candidate,
            samples,
            metric,
            latency=latency,
            layers=layers,
            threads=threads,
            engine=engine,
            batch=batch,
        )
    if max_drop is not None and found.metric_change is None:
        raise DataError("--max-drop needs labels and a metric, and the data has none.")
    if json:
        print_json(found.to_dict())
    else:
        show_page(found)
    if max_drop is not None and found.drop > max_drop:
        raise typer.Exit(2)
