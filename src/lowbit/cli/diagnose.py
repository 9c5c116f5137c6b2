"""`lowbit diagnose`: where the error of a quantized network arises, why, and what to do, as one page."""

import time
from pathlib import Path
from typing import Annotated

import typer

from lowbit.cli.options import DataOption, JsonOption, SampleOptions, TrainedArgument, output_option, with_groups
from lowbit.cli.output import answer, check_output, progress

PAGES = {".html": "a page"}


@with_groups
def diagnose(
    model: TrainedArgument,
    data: DataOption,
    samples: SampleOptions,
    output: Annotated[Path | None, output_option("Where to write the page, .html.", "MODEL.diagnosis.html")] = None,
    recipe: Annotated[str, typer.Option(help="A preset, a .toml file or a format, as in 'lowbit quantize'.")] = "int8",
    target: Annotated[
        str | None, typer.Option(help="Engine, as in 'lowbit quantize'.", show_default="the recipe's")
    ] = None,
    test: Annotated[
        str | None,
        typer.Option(
            metavar="SOURCE",
            help="Other samples to judge on, with labels if there are any; prepared alike.",
            show_default="the calibration samples",
        ),
    ] = None,
    metric: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="As in 'lowbit compare'.", show_default="top1 where there are class labels"),
    ] = None,
    shift: Annotated[
        list[str] | None,
        typer.Option(
            metavar="KIND:STRENGTH",
            help="Judge on shifted samples too: noise:0.5, blur:1, brightness:-0.5, contrast:0.5, length:2, or none; "
            "may be given several times.",
            show_default="the usual ones",
        ),
    ] = None,
    json: JsonOption = False,
) -> None:
    """Quantize a network and say where its error arises, why, and what to do: one page that needs no network.

    Causes are read from measurements; each comes with the lines of a recipe that mend it.

    Example: lowbit diagnose net.onnx --data calib/ --test test.npz -o report.html
    """
    output = output or Path(f"{model.stem}.diagnosis.html")
    if not json:
        check_output(output, [model, data, recipe, test], PAGES)

    from lowbit.flows.diagnose import diagnose as diagnose_model
    from lowbit.model import load
    from lowbit.storage.atomic import write_bytes

    start, network = time.perf_counter(), load(model)
    with progress(json) as bar:
        found = diagnose_model(
            network,
            samples.open(data, network.inputs, bar, "calibrating"),
            recipe,
            test=None if test is None else samples.whole().open(test, network.inputs),
            metric=metric,
            target=target,
            shifts=None if shift is None else [words for words in shift if words != "none"],
            stage=bar,
        )
    if json:
        answer(True, found.to_dict())
        return
    size = write_bytes(output, found.to_html().encode("utf-8"))
    answer(
        False, {}, found, f"\nwrote {output} in {time.perf_counter() - start:.1f} s: {size:,} B; open it in a browser"
    )
