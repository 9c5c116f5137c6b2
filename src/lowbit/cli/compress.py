"""`lowbit compress`: a trained network in, one small .lowbit file out."""

import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lowbit.cli.options import DataOption, JsonOption, SampleOptions, TrainedArgument, output_option, with_groups
from lowbit.cli.output import MODEL_FILES, answer, check_output, progress, save_model
from lowbit.errors import InputError

if TYPE_CHECKING:
    from lowbit.flows.compression import Compression


@with_groups
def compress(
    model: TrainedArgument,
    *,
    data: DataOption,
    output: Annotated[
        Path | None,
        output_option("Where to write: .lowbit, or .onnx to leave out the entropy coding.", "MODEL.lowbit"),
    ] = None,
    ratio: Annotated[
        float | None,
        typer.Option(
            min=1,
            help="How many times smaller than its float32 parameters the file should be; the values of every weight "
            "are then as fine as that allows.",
        ),
    ] = None,
    prune: Annotated[
        float | None,
        typer.Option(
            min=0, max=0.999, help="Share of the weights that become zero.", show_default="0.9, or 0 with --ratio"
        ),
    ] = None,
    codebook: Annotated[
        int | None,
        typer.Option(min=0, max=8, help="Bits of a shared weight; 0: weights are not shared.", show_default="4"),
    ] = None,
    max_drop: Annotated[
        float | None,
        typer.Option(
            min=0,
            help="Choose the ratio, and with it the values of every layer: as small as can be with a metric at most "
            "this much worse, in points (percent for top1), on the last fifth of the data.",
        ),
    ] = None,
    recipe: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE.toml",
            exists=True,
            dir_okay=False,
            help="Fields of lowbit.Compression that have no option here: epochs, learning rate, pattern of pruning, …",
        ),
    ] = None,
    samples: SampleOptions,
    json: JsonOption = False,
) -> None:
    """Prune, share weights, fine-tune and entropy-code: Deep Compression into one .lowbit file.

    With labels in the data the network is trained for them and to agree with the float network; without, only to agree.
    An interrupted run, started again, goes on where it was and ends with the same file.

    Example: lowbit compress net.onnx --data train.npz --prune 0.9 --codebook 4 -o net.lowbit
             lowbit compress net.onnx --data photos/ --ratio 8 -o net.lowbit
    """
    if ratio is not None and max_drop is not None:
        raise InputError("--ratio and --max-drop both decide the size: give one of them.")
    output = output or Path(f"{model.stem}.lowbit")
    checkpoint = output.with_name(output.name + ".state")
    check_output(output, [model, data, recipe], MODEL_FILES)
    check_output(checkpoint, [model, data, output, recipe])

    from lowbit.flows.compress import compress as compress_model
    from lowbit.model import load
    from lowbit.report.words import written_text

    start = time.perf_counter()
    network = load(model)
    opened = samples.open(data, network.inputs)
    settings = _settings(recipe, ratio, prune, codebook)
    verdict: dict[str, object] = {}
    with progress(json, "steps") as bar:
        if max_drop is None:
            small = compress_model(network, opened, settings, checkpoint=checkpoint, progress=bar)
        else:
            from lowbit.flows.shrink import shrink

            found = shrink(network, opened, max_drop, settings, checkpoint=checkpoint, progress=bar)
            small, verdict = found.model, found.verdict()
    size, before = save_model(small, output), model.stat().st_size
    seconds = time.perf_counter() - start
    values = {"output": str(output), "bytes": size, "bytes_before": before}
    values |= {"ratio": round(before / size, 2), "seconds": round(seconds, 1), **verdict}
    pages = [written_text(output, seconds, size, before), *(f"{name}: {value}" for name, value in verdict.items())]
    answer(json, values, *pages, f"next: lowbit show {output}\n      lowbit compare {model} {output} --data …")


def _settings(recipe: Path | None, ratio: float | None, prune: float | None, codebook: int | None) -> "Compression":
    """The recipe's fields; options override them. A share to prune leaves the recipe's pattern and scope."""
    from lowbit.flows.compression import Compression
    from lowbit.solve.prune import Pruning

    settings = Compression() if recipe is None else Compression.from_toml(recipe.read_text(), str(recipe))
    if prune is not None:
        of = settings.prune
        settings = replace(settings, prune=replace(of, sparsity=prune) if isinstance(of, Pruning) else prune)
    settings = settings if ratio is None else replace(settings, ratio=ratio)
    return settings if codebook is None else replace(settings, codebook=codebook)
