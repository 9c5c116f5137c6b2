"""`lowbit quantize`: a trained network in, a quantized one out."""

import time
from dataclasses import asdict, dataclass
from json import dumps
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lowbit.cli.options import (
    DROP,
    SOURCE,
    JsonOption,
    MetricOption,
    ModelOutputOption,
    SampleOptions,
    TargetOption,
    TestOption,
    TrainedArgument,
    with_groups,
)
from lowbit.cli.output import MODEL_FILES, answer_quantized, beside, check_output, progress
from lowbit.cli.search import answer_search
from lowbit.errors import InputError

if TYPE_CHECKING:
    from lowbit.recipe import Recipe


@dataclass(frozen=True)
class BudgetOptions:
    """Mixed precision under a budget: the arguments of `lb.mixed_precision`."""

    bits: Annotated[
        float | None,
        typer.Option(help="Mixed precision: formats by layer, with this mean of bits a weight at most."),
    ] = None
    size: Annotated[
        float | None, typer.Option(help="The same, with this share of the float file's bytes at most, as 0.2.")
    ] = None
    latency: Annotated[
        float | None,
        typer.Option(help="Layers in float where they matter most, as this share of the float network's time allows."),
    ] = None

    def given(self, data: str | None) -> dict[str, Any] | None:
        """The arguments; None where there is no budget."""
        if self == BudgetOptions():
            return None
        if data is None:
            raise InputError(
                "--bits, --size and --latency measure what each format costs: give --data, some hundred typical inputs."
            )
        return asdict(self)


@with_groups
def quantize(
    model: TrainedArgument,
    *,
    data: Annotated[
        str | None,
        typer.Option("--data", "-d", metavar="SOURCE", help=f"{SOURCE} int8-dynamic, and weights alone, need none."),
    ] = None,
    output: ModelOutputOption = None,
    recipe: Annotated[
        str | None,
        typer.Option(
            help="A preset (int8, int8-normalized, int8-mixed, int8-repaired, int8-fast, w4a8, w4a8-fast, w4a4, "
            "w4a8-blocks, int4-gptq; no data: int8-dynamic; weights alone: int8-weights, int4-weights, mxfp4-weights, "
            "nf4-weights, codebook4-weights), a .toml file of rules, or a format for weights ('int5 group:64': 'lowbit "
            "formats').",
            show_default="int8; w4a8-fast with --bits or --size",
        ),
    ] = None,
    target: TargetOption = None,
    budget: BudgetOptions,
    max_drop: Annotated[
        float | None,
        typer.Option(
            metavar="POINTS",
            help=f"Try repairs, then wider formats for a few layers, until --test says that it is kept. {DROP}",
        ),
    ] = None,
    test: TestOption = None,
    metric: MetricOption = None,
    samples: SampleOptions,
    json: JsonOption = False,
) -> None:
    """Turn a trained network into an int8 one that a standard engine runs.

    Some hundred typical samples, without labels, are enough; recipes of weights alone need none. The written file is
    checked against the simulation, layer by layer, and carries its recipe and the ledger of every tensor: see
    `lowbit show`.

    Example: lowbit quantize net.onnx --data samples.npz -o net.int8.onnx
             lowbit quantize net.onnx --recipe nf4
             lowbit quantize net.onnx --data samples.npz --bits 5 -o net.mixed.onnx
             lowbit quantize net.onnx --data samples.npz --latency 0.7 -o net.mixed.onnx
             lowbit quantize net.onnx --data samples.npz --test test.npz --max-drop 0.5 -o net.int8.onnx
    """
    if max_drop is None and (test, metric) != (None, None):
        raise InputError(
            "--test and --metric judge the tries of --max-drop: give it too, or run `lowbit compare` after."
        )
    asked = budget.given(data)
    recipe = recipe or ("int8" if asked is None or budget.latency is not None else "w4a8-fast")
    output = output or beside(model, recipe if asked is None else "mixed")
    check_output(output, [model, data, test, recipe], MODEL_FILES)

    if max_drop is not None:
        options = {"metric": metric, "max_drop": max_drop, "recipe": recipe, "target": target}
        answer_search(model, data, test, output, samples, json, None, asked, **options)
    else:
        _answer_file(model, data, output, recipe, target, asked, samples, json)


def _answer_file(
    model: Path,
    data: str | None,
    output: Path,
    recipe: str,
    target: str | None,
    budget: dict[str, Any] | None,
    samples: SampleOptions,
    json: bool,
) -> None:
    """Quantize and say what came of it; budget: of `lb.mixed_precision`, which then makes the recipe."""
    from lowbit.flows.budget import mixed_precision
    from lowbit.flows.ptq import quantize as quantize_model
    from lowbit.model import load

    start, seen = time.perf_counter(), [0]

    def watch(phase: str, done: int, total: int | None) -> None:
        seen[0] = max(seen[0], done)
        bar(phase, done, total)

    network = load(model)
    with progress(json) as bar:
        opened = None if data is None else samples.open(data, network.inputs, watch, "calibrating")
        chosen: str | Recipe = recipe
        if budget is not None:
            chosen = mixed_precision(network, opened, recipe, **budget, target=target, stage=bar)
        quantized = quantize_model(network, opened, chosen, target=target, stage=bar)
    if data is not None:
        quantized.metadata["lowbit.calibration"] = dumps(samples.told(data) | {"samples": seen[0]})
    answer_quantized(json, model, quantized, output, recipe, start)
