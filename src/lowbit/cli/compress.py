"""`lowbit compress`: a trained network in, one small .lowbit file out."""

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from lowbit.cli.options import (
    DataOption,
    JsonOption,
    SampleOptions,
    ScheduleOption,
    TrainedArgument,
    output_option,
    with_groups,
)
from lowbit.cli.output import MODEL_FILES, answer, check_output, progress, save_model
from lowbit.errors import InputError


@dataclass(frozen=True)
class CompressionOptions:
    """What becomes of the weights: the arguments of `lb.compress`."""

    ratio: Annotated[
        float | None,
        typer.Option(
            min=1,
            help="How many times smaller than its float32 parameters the file should be; the values of every weight "
            "are then as fine as that allows.",
        ),
    ] = None
    prune: Annotated[
        float | None,
        typer.Option(
            min=0, max=0.999, help="Share of the weights that become zero.", show_default="0.9, or 0 with --ratio"
        ),
    ] = None
    codebook: Annotated[
        int | None,
        typer.Option(min=0, max=8, help="Bits of a shared weight; 0: weights are not shared.", show_default="4"),
    ] = None
    max_drop: Annotated[
        float | None,
        typer.Option(
            min=0,
            help="Choose the ratio, and with it the values of every layer: as small as can be with a metric at most "
            "this much worse, in points (percent for top1), on the last fifth of the data.",
        ),
    ] = None
    recipe: Annotated[
        str | None,
        typer.Option(
            help="A .toml file of rules (formats of weights, pruning, a ratio), as quantize has it, or a format for "
            "weights; --ratio and --prune override it.",
        ),
    ] = None
    schedule: ScheduleOption = ""

    def given(self) -> dict[str, Any]:
        """Arguments of `lb.compress`; of `lb.shrink`, where there is a budget."""
        if self.ratio is not None and self.max_drop is not None:
            raise InputError("--ratio and --max-drop both decide the size: give one of them.")
        if self.codebook is not None and self.max_drop is not None:
            raise InputError("--max-drop decides how many values each weight has: leave out --codebook.")
        found: dict[str, Any] = {"recipe": self.recipe, "schedule": self.schedule, "prune": self.prune}
        if self.max_drop is not None:
            return found | {"max_drop": self.max_drop}
        return found | {"ratio": self.ratio, "codebook": self.codebook}


@with_groups
def compress(
    model: TrainedArgument,
    *,
    data: DataOption,
    output: Annotated[
        Path | None,
        output_option("Where to write: .lowbit, or .onnx to leave out the entropy coding.", "MODEL.lowbit"),
    ] = None,
    options: CompressionOptions,
    samples: SampleOptions,
    json: JsonOption = False,
) -> None:
    """Prune, share weights, fine-tune and entropy-code: Deep Compression into one .lowbit file.

    With labels in the data the network is trained for them and to agree with the float network; without, only to agree.
    An interrupted run, started again, goes on where it was and ends with the same file.

    Example: lowbit compress net.onnx --data train.npz --prune 0.9 --codebook 4 -o net.lowbit
             lowbit compress net.onnx --data photos/ --ratio 8 -o net.lowbit
    """
    asked = options.given()
    output = output or Path(f"{model.stem}.lowbit")
    checkpoint = output.with_name(output.name + ".state")
    check_output(output, [model, data, options.recipe, options.schedule], MODEL_FILES)
    check_output(checkpoint, [model, data, output, options.recipe, options.schedule])

    from lowbit.flows.compress import compress as compress_model
    from lowbit.flows.shrink import shrink
    from lowbit.model import load
    from lowbit.report.words import written_text

    start = time.perf_counter()
    network = load(model)
    opened = samples.open(data, network.inputs)
    verdict: dict[str, object] = {}
    with progress(json, "steps") as bar:
        asked |= {"checkpoint": checkpoint, "progress": bar}
        if options.max_drop is None:
            small = compress_model(network, opened, **asked)
        else:
            found = shrink(network, opened, **asked)
            small, verdict = found.model, found.verdict()
    size, before = save_model(small, output), model.stat().st_size
    seconds = time.perf_counter() - start
    values = {"output": str(output), "bytes": size, "bytes_before": before}
    values |= {"ratio": round(before / size, 2), "seconds": round(seconds, 1), **verdict}
    pages = [written_text(output, seconds, size, before), *(f"{name}: {value}" for name, value in verdict.items())]
    answer(json, values, *pages, f"next: lowbit show {output}\n      lowbit compare {model} {output} --data …")
