"""`lowbit compress`: a trained network in, one small .lowbit file out."""

import time
from pathlib import Path
from typing import Annotated

import typer

from lowbit.cli.options import DataOption, JsonOption, SampleOptions, TrainedArgument, output_option, with_groups
from lowbit.cli.output import MODEL_FILES, answer, check_output, progress, save_model
from lowbit.errors import InputError


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
    pattern: Annotated[
        str, typer.Option(help="What is pruned together: any, channels, N:M such as 2:4, block:RxC such as block:4x1.")
    ] = "any",
    scope: Annotated[
        str,
        typer.Option(
            help="'global' lets layers differ in sparsity, 'sensitivity' by what it does to the outputs, 'layer' gives "
            "each the same."
        ),
    ] = "global",
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
    epochs: Annotated[float, typer.Option(min=0, help="Passes over the data while pruning.")] = 8,
    settle_epochs: Annotated[
        float | None,
        typer.Option(
            min=0,
            help="Passes over the data in which weights may still change their value.",
            show_default="2, or 0 with --ratio",
        ),
    ] = None,
    share_epochs: Annotated[
        float | None,
        typer.Option(
            min=0, help="Passes over the data that train the shared values.", show_default="3, or 0 with --ratio"
        ),
    ] = None,
    batch: Annotated[int, typer.Option(min=1, help="Samples of a training step.")] = 64,
    learning_rate: Annotated[
        float | None,
        typer.Option(min=1e-6, help="A step, relative to a tensor's size.", show_default="0.02, or 0.002 with --ratio"),
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the order of the samples.")] = 0,
    checkpoint: Annotated[
        Path | None,
        typer.Option(help="Where the state is kept; an interrupted run resumes.", show_default="OUTPUT.state"),
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
    checkpoint = checkpoint or output.with_name(output.name + ".state")
    check_output(output, [model, data], MODEL_FILES)
    check_output(checkpoint, [model, data, output])

    from lowbit.flows.compress import Compression
    from lowbit.flows.compress import compress as compress_model
    from lowbit.model import load
    from lowbit.report.words import written_text
    from lowbit.solve.prune import Pruning

    start = time.perf_counter()
    network = load(model)
    opened = samples.open(data, network.inputs)
    by_size = ratio or (4.0 if max_drop is not None else 0.0)  # a budget searches for the ratio
    settings = Compression(
        ratio=by_size, prune=Pruning((0.0 if by_size else 0.9) if prune is None else prune, scope, pattern),
        codebook=codebook, prune_epochs=epochs, settle_epochs=settle_epochs, share_epochs=share_epochs,
        batch=batch, learning_rate=learning_rate, seed=seed,
    )  # fmt: skip
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
