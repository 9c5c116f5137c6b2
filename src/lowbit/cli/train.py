"""`lowbit train`: a trained network in, one that was trained in few bits out."""

import time
from json import dumps, loads
from pathlib import Path
from typing import Annotated, Any

import typer

from lowbit import processes
from lowbit.cli.options import (
    SOURCE,
    JsonOption,
    MetricOption,
    ModelOutputOption,
    SampleOptions,
    ScheduleOption,
    TargetOption,
    TrainedArgument,
    with_groups,
    with_names,
)
from lowbit.cli.output import MODEL_FILES, answer_quantized, beside, check_output, progress


@with_groups
def train(
    model: TrainedArgument,
    *,
    data: Annotated[
        list[str],
        typer.Option("--data", "-d", metavar="SOURCE", help=f"May be given several times. {SOURCE}"),
    ],
    test: Annotated[
        str | None,
        typer.Option(metavar="SOURCE", help="Labelled samples, like --data, that are judged after each epoch."),
    ] = None,
    output: ModelOutputOption = None,
    recipe: Annotated[
        str,
        typer.Option(
            help="A preset whose ranges learn (w8a8-lsq, w4a8-lsq, w2a8, w4a4-lsq, w3a3, w2a2, w1), one whose ranges "
            "are chosen before (w4a4; fbgemm and qnnpack as in torch), any other of quantize, a .toml file of rules, "
            "or a format for weights."
        ),
    ] = "w4a4-lsq",
    epochs: Annotated[
        float | None, typer.Option(min=0, help="Passes over the data.", show_default="the schedule's, or 10")
    ] = None,
    schedule: ScheduleOption = "",
    prune: Annotated[
        float | None,
        typer.Option(
            min=0, max=0.999, help="Share of the weights that become zero.", show_default="the recipe's, or 0"
        ),
    ] = None,
    target: TargetOption = None,
    metric: MetricOption = None,
    samples: SampleOptions,
    json: JsonOption = False,
) -> None:
    """Train a network with its quantizers in place, and write what was trained.

    With labels it learns from them and from the float network; without, from the float network alone. An interrupted
    run, started again, goes on where it was and ends with the same file; Ctrl-C writes the best epoch so far. Under
    torchrun all processes share each batch.

    Example: lowbit train net.onnx --data train.npz --test test.npz --recipe w3a3 --epochs 30 -o net.w3a3.onnx
             torchrun --nproc-per-node 4 -m lowbit train net.onnx --data train.npz
    """
    output = output or beside(model, recipe)
    checkpoint = output.with_name(output.name + ".state")
    inputs = [model, *data, test, recipe, schedule]
    check_output(output, inputs, MODEL_FILES)
    check_output(checkpoint, [*inputs, output])

    changes: dict[str, Any] = {} if epochs is None else {"epochs": epochs}
    settings = {"recipe": recipe, "schedule": schedule, "metric": metric, "target": target, "prune": prune, **changes}
    _answer_training(model, data, test, output, checkpoint, samples, json, settings)


def _answer_training(
    model: Path,
    data: list[str],
    test: str | None,
    output: Path,
    checkpoint: Path,
    samples: SampleOptions,
    json: bool,
    settings: dict[str, Any],
) -> None:
    """Train, and say what came of it; settings: of `lb.train`. The first process of torchrun speaks for all."""
    from lowbit.flows.train import train as train_model
    from lowbit.model import load

    start = time.perf_counter()
    with processes.joined():
        network, first = load(model), processes.number() == 0
        with progress(json or not first, "steps") as bar:

            def watch(phase: str, done: int, total: int, note: str) -> None:
                if phase != "epoch":
                    bar(phase, done, total, note)
                elif first and not json:
                    typer.echo(note, err=True)

            trained = train_model(
                network,
                samples.joined(data, network.inputs),
                test=None if test is None else samples.whole().open(test, network.inputs),
                checkpoint=checkpoint,
                progress=watch,
                **settings,
            )
        if first:
            told = samples.told(data[0]) | {"data": ", ".join(Path(with_names(one)[0]).name for one in data)}
            training = dict(loads(trained.metadata["lowbit.training"]))
            trained.metadata["lowbit.calibration"] = dumps(told | {"samples": training["samples"]})
            note = f"interrupted: this is the best epoch so far; the same command goes on from {checkpoint}"
            note = note if training["interrupted"] else ""
            answer_quantized(json, model, trained, output, settings["recipe"], start, training, note)
            if training["interrupted"]:
                raise SystemExit(130)
            checkpoint.unlink(missing_ok=True)
