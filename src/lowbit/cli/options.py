"""Options that several subcommands share, and what they mean.

A command takes a group of them as one parameter: `samples: SampleOptions`.
"""

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, is_dataclass, replace
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lowbit.errors import InputError

if TYPE_CHECKING:
    from lowbit.cli.output import Progress
    from lowbit.data import Data
    from lowbit.model import Port

SOURCE = (
    "Samples: an .npz (arrays named like the model's inputs, 'labels' if there are any; else "
    "FILE:input=images,labels=y), an .npy, a folder or zip of images (labels.csv, or a folder for each class), or "
    "module:function that returns batches."
)
DataOption = Annotated[str, typer.Option("--data", "-d", metavar="SOURCE", help=SOURCE)]
TrainedArgument = Annotated[Path, typer.Argument(metavar="MODEL", help="The trained network, an .onnx file.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")]

MetricOption = Annotated[
    str | None,
    typer.Option(
        metavar="NAME",
        help="top1, top5, auc, spearman, mse, mae, bits-per-token, perplexity, or module:function, called with "
        "{output: array} and labels.",
        show_default="top1 where there are class labels",
    ),
]
TestOption = Annotated[
    str | None,
    typer.Option(metavar="SOURCE", help="Samples to judge on, like --data, with labels where the metric needs them."),
]
DROP = (
    "Points that the metric may drop by: hundredths of 1 of a metric that is at most 1, percent of the float network's "
    "value of any other."
)


def output_option(help: str, default: bool | str = False) -> Any:
    """`--output`: what is written, and where to if it is not given."""
    return typer.Option("--output", "-o", metavar="FILE", help=help, show_default=default)


ModelOutputOption = Annotated[
    Path | None,
    output_option("Where to write: .onnx, or .lowbit to entropy-code it as well.", "MODEL.RECIPE.onnx, here"),
]
ENGINE = "Engine to write for: onnxruntime, onnxruntime-avx2, openvino, tensorrt, generic, integer."
TargetOption = Annotated[str | None, typer.Option(help=ENGINE, show_default="the recipe's")]
ScheduleOption = Annotated[
    str,
    typer.Option(
        metavar="'NAME=VALUE …'",
        help="Fields of lowbit.Schedule, as 'rate=0.02 batch=64 augment=crop-flip', or a .toml file of them.",
    ),
]


@dataclass(frozen=True)
class SampleOptions:
    """Which samples of the data, and what becomes of them before the network sees them."""

    preprocess: Annotated[
        str | None,
        typer.Option(
            metavar="'NAME=VALUE …'",
            help="What pixels become: value = (pixel / scale - mean) / std. Example: 'size=224 fit=crop short=256 "
            "scale=255 mean=.485,.456,.406 std=.229,.224,.225 layout=NCHW color=RGB'. Nothing is scaled by guess.",
        ),
    ] = None
    limit: Annotated[
        str | None,
        typer.Option(metavar="N", help="Use the first N samples; FROM: leaves out the first, FROM:TO takes these."),
    ] = None

    def open(self, source: str, inputs: "Sequence[Port]", bar: "Progress | None" = None, phase: str = "") -> "Data":
        """The data of the command line; the bar is told how many of its samples a phase has taken."""
        from lowbit.data import Data

        (source, names), (skip, limit) = with_names(source), self.window()
        data = Data.of(source, inputs, preprocess=self.preprocess, names=names, skip=skip, limit=limit)
        return data if bar is None else Data.of(data, inputs, watch=lambda done: bar(phase, done, data.count))

    def joined(self, sources: "Sequence[str]", inputs: "Sequence[Port]") -> "Data":
        """Several sources, one after the other; the window is of all together."""
        from lowbit.data import Data

        skip, limit = self.window()
        return Data.of(Data.joined([self.whole().open(one, inputs) for one in sources]), inputs, skip=skip, limit=limit)

    def told(self, source: str) -> dict[str, object]:
        """What a file says of the data that it was calibrated on."""
        path, names = with_names(source)
        told = {"data": Path(path).name, "skip": self.window()[0], "preprocess": self.preprocess}
        return told | {"names": names or None}

    def whole(self) -> "SampleOptions":
        """The same preparation, of all samples."""
        return replace(self, limit=None)

    def window(self) -> tuple[int, int | None]:
        """(how many samples are left out at the start, how many are used at most)."""
        start, colon, end = (self.limit or "0:").rpartition(":")
        if not all(part.strip().isdigit() for part in (start, end) if part.strip()) or not (colon or end.strip()):
            raise InputError(f"--limit: '{self.limit}' is not N, FROM: or FROM:TO. Example: --limit 200:400.")
        first, last = int(start or 0), int(end) if end.strip() else None
        if last is not None and last <= first:
            raise InputError(f"--limit: '{self.limit}' takes no sample. Example: --limit 200:400.")
        return first, None if last is None else last - first


def with_names(source: str) -> tuple[str, dict[str, str]]:
    """('mnist.npz', {'input': 'images'}) out of 'mnist.npz:input=images'."""
    file, colon, tail = source.rpartition(":")
    if not colon or "=" not in tail:
        return source, {}
    pairs = [part.split("=") for part in tail.split(",")]
    if wrong := next((pair for pair in pairs if len(pair) != 2 or not all(map(str.strip, pair))), None):
        example = "--data mnist.npz:input=images,labels=y"
        raise InputError(f"--data: '{'='.join(wrong)}' is not INPUT=ARRAY. Example: {example}.")
    return file, {name.strip(): array.strip() for name, array in pairs}


@dataclass(frozen=True)
class RunOptions(SampleOptions):
    """How a network is run on samples and judged."""

    metric: MetricOption = None
    batch: Annotated[
        int | None,
        typer.Option(min=1, help="Samples at a time; a fixed-batch model keeps its own.", show_default="by size"),
    ] = None
    engine: Annotated[str, typer.Option(help="onnxruntime, openvino or integer.")] = "onnxruntime"


def with_groups(command: Callable[..., None]) -> Callable[..., None]:
    """The command as typer takes it: each parameter that is a group of options becomes its fields."""
    groups: dict[str, type] = {}
    flat: list[inspect.Parameter] = []
    for name, parameter in inspect.signature(command).parameters.items():
        kind: Any = parameter.annotation
        if is_dataclass(kind) and isinstance(kind, type):
            groups[name] = kind
        flat += inspect.signature(kind).parameters.values() if name in groups else [parameter]

    @wraps(command)
    def called(**given: Any) -> None:
        for name, group in groups.items():
            given[name] = group(**{field: given.pop(field) for field in inspect.signature(group).parameters})
        command(**given)

    keyword_only = [parameter.replace(kind=parameter.KEYWORD_ONLY) for parameter in flat]
    called.__signature__ = inspect.Signature(keyword_only)  # type: ignore[attr-defined]
    called.__annotations__ = {parameter.name: parameter.annotation for parameter in flat}
    return called
