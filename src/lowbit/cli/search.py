"""`lowbit search`: a recipe's settings searched with optuna; and the answer of `lowbit quantize --max-drop`."""

import sys
from enum import StrEnum
from json import dumps
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lowbit.cli.options import (
    DROP,
    ENGINE,
    DataOption,
    JsonOption,
    MetricOption,
    SampleOptions,
    TestOption,
    TrainedArgument,
    output_option,
    with_groups,
)
from lowbit.cli.output import MODEL_FILES, answer, check_output, progress, save_model
from lowbit.errors import InputError

if TYPE_CHECKING:
    from lowbit.model import Model


class Small(StrEnum):
    """What is made small."""

    BYTES = "bytes"
    LATENCY = "latency"


@with_groups
def search(
    model: TrainedArgument,
    *,
    data: DataOption,
    test: TestOption = None,
    metric: MetricOption = None,
    max_drop: Annotated[float, typer.Option(metavar="POINTS", help=DROP)] = 0.5,
    output: Annotated[
        Path | None,
        output_option(
            "Where to write the best file; its recipe goes beside it, as .toml.", "MODEL.searched.onnx, here"
        ),
    ] = None,
    trials: Annotated[int, typer.Option(min=1, help="Recipes to try, here; the first is plain int8.")] = 40,
    small: Annotated[Small, typer.Option(help="What the best file has least of.")] = Small.BYTES,
    storage: Annotated[
        str | None,
        typer.Option(metavar="URL", help="optuna's: machines that name the same one share the trials; sqlite:///a.db."),
    ] = None,
    target: Annotated[str, typer.Option(help=ENGINE)] = "onnxruntime",
    samples: SampleOptions,
    json: JsonOption = False,
) -> None:
    """Search a recipe's settings for the smallest or fastest file that keeps the metric.

    Settings are the weight format of each group of layers, ranges, solver and steps. Every trial is a file that ran on
    the test data. An interrupted search goes on where it was.

    Example: lowbit search net.onnx --data samples.npz --test test.npz --trials 40 -o net.small.onnx
    """
    output = output or Path(f"{model.stem}.searched.onnx")
    check_output(output, [model, data, test], MODEL_FILES)
    check_output(recipe := output.with_suffix(".toml"), [model, data, test, output])
    answer_search(
        model, data, test, output, samples, json, recipe, metric=metric, max_drop=max_drop, target=target,
        trials=trials, storage=storage, prefer=small,
    )  # fmt: skip


def answer_search(
    model: Path,
    data: str | None,
    test: str | None,
    output: Path,
    samples: SampleOptions,
    json: bool,
    recipe_file: Path | None = None,
    budget: dict[str, Any] | None = None,
    **options: Any,
) -> None:
    """Search, show the tries, and exit with status 2 where the drop was not reached, with 130 after Ctrl-C.

    recipe_file   where to write the best recipe
    budget        of `lb.mixed_precision`, whose recipe is tried first
    options       of `lb.search`
    """
    if data is None or test is None:
        raise InputError("a search for a drop of the metric needs --data to calibrate on and --test to judge on.")

    from lowbit.flows.budget import mixed_precision
    from lowbit.flows.search import search as search_recipes
    from lowbit.model import load
    from lowbit.report.words import bytes_text
    from lowbit.storage.atomic import write_bytes

    told = samples.told(data)

    def save(found: "Model", path: Path) -> int:
        found.metadata["lowbit.calibration"] = dumps(told)
        return save_model(found, path)

    network = load(model)
    with progress(json) as bar:
        opened = samples.open(data, network.inputs)
        if budget is not None:
            options["recipe"] = mixed_precision(
                network, opened, options["recipe"], **budget, target=options["target"], stage=bar
            )
        found = search_recipes(
            network,
            opened,
            samples.whole().open(test, network.inputs),
            output=output,
            stage=bar,
            save=save,
            **options,
        )
    written = output.stat().st_size
    if recipe_file is not None:
        write_bytes(recipe_file, found.recipe.to_toml().encode())
    beside = "" if recipe_file is None else f" and its recipe {recipe_file}"
    page = f"wrote {output}{beside}: {bytes_text(written)}"
    following = f"next: lowbit show {output}\n      lowbit compare {model} {output} --data …"
    answer(json, {"output": str(output), "file_bytes": written, **found.to_dict()}, found, "", page, following)
    if found.interrupted:
        print(f"lowbit: interrupted; the best so far is in {output}", file=sys.stderr)
        sys.exit(130)
    if not found.reached:
        raise typer.Exit(2)
