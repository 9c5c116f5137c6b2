"""Options that several subcommands share, and what they mean."""

import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lowbit.errors import InputError

if TYPE_CHECKING:
    from lowbit.data import Data
    from lowbit.model import Model, Port

_SOURCE = (
    "Samples: an .npz (arrays named like the model's inputs, 'labels' if there are any), an .npy, a folder or "
    "zip of images (labels.csv, or a folder for each class), or module:function that returns batches."
)
DataOption = Annotated[str, typer.Option("--data", "-d", metavar="SOURCE", help=_SOURCE)]
OptionalDataOption = Annotated[
    str | None,
    typer.Option("--data", "-d", metavar="SOURCE", help=f"{_SOURCE} Recipes of weights alone need none."),
]
PreprocessOption = Annotated[
    str | None,
    typer.Option(
        "--preprocess",
        metavar="'NAME=VALUE …'",
        help="What pixels become: value = (pixel / scale - mean) / std. Example: 'size=224 fit=crop short=256 "
        "scale=255 mean=.485,.456,.406 std=.229,.224,.225 layout=NCHW color=RGB'. Nothing is scaled by guess.",
    ),
]
NamesOption = Annotated[
    str | None,
    typer.Option(
        "--names",
        metavar="INPUT=ARRAY,…",
        help="Which array is which input, where names differ. Example: input=test_images,labels=test_labels.",
    ),
]
LimitOption = Annotated[int | None, typer.Option(min=1, help="Use this many samples.", show_default="all")]
SkipOption = Annotated[int, typer.Option(min=0, help="Leave this many samples out at the start.")]
BatchOption = Annotated[
    int | None,
    typer.Option(min=1, help="Samples at a time; a fixed-batch model keeps its own.", show_default="by size"),
]
MetricOption = Annotated[
    str | None,
    typer.Option(
        metavar="NAME",
        help="top1, top5, auc, spearman, mse, mae, bits-per-token, perplexity, or module:function, called with "
        "{output: array} and labels.",
        show_default="top1 where there are class labels",
    ),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")]
EngineOption = Annotated[str, typer.Option(help="onnxruntime or openvino.")]


def names_of(text: str | None) -> dict[str, str]:
    """{'input': 'images'} out of 'input=images,labels=y'."""
    pairs = [part.split("=") for part in (text or "").split(",") if part.strip()]
    if wrong := next((pair for pair in pairs if len(pair) != 2 or not all(map(str.strip, pair))), None):
        raise InputError(f"--names: '{'='.join(wrong)}' is not INPUT=ARRAY. Example: --names input=images,labels=y.")
    return {name.strip(): array.strip() for name, array in pairs}


def open_data(
    source: str,
    inputs: "Sequence[Port]",
    preprocess: str | None,
    names: str | None,
    skip: int,
    limit: int | None,
    watch: Callable[[int], None] | None = None,
) -> "Data":
    """The data of the command line."""
    from lowbit.data import Data

    return Data.of(source, inputs, preprocess=preprocess, names=names_of(names), skip=skip, limit=limit, watch=watch)


MODEL_FILES = {".onnx": "an ONNX file", ".lowbit": "the same, entropy-coded"}


def check_output(output: Path, inputs: Sequence[str | Path | None], kinds: Mapping[str, str] | None = None) -> None:
    """Raise before the work starts where the output cannot be written, or is one of the inputs.

    kinds   what can be written: extension → in words; None: anything
    """
    from lowbit.storage.atomic import refuse_overwriting_input

    if output.is_dir():
        raise InputError(f"'{output}' is a folder; give a file name.")
    folder = output.parent
    if not folder.is_dir():
        raise InputError(f"'{output}' cannot be written: there is no folder '{folder}'.")
    if not os.access(folder, os.W_OK):
        raise InputError(f"'{output}' cannot be written: the folder '{folder}' is read-only.")
    refuse_overwriting_input(output, *[path for path in inputs if path is not None and Path(path).exists()])
    if kinds is not None and output.suffix not in kinds:
        listed = ", ".join(f"{suffix} ({what})" for suffix, what in kinds.items())
        raise InputError(f"'{output}': the extension says what is written, and can be {listed}.")


def save_model(model: "Model", output: Path) -> int:
    """Write a model as the extension says; its bytes on disk."""
    if output.suffix != ".lowbit":
        return model.save(output)
    from lowbit.storage.container import pack

    return pack(model, output)


def print_json(value: Mapping[str, Any]) -> None:
    """JSON on stdout, indented."""
    import json

    print(json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False))


def show_page(page: object) -> None:
    """A table or text on stdout; not cut to 80 columns where the output is a file or a pipe. Text is never wrapped."""
    if isinstance(page, str):
        print(page)
        return
    from rich.console import Console

    width = None if sys.stdout.isatty() else 200
    Console(width=width, highlight=False, soft_wrap=False).print(page)


@contextmanager
def progress(what: str, quiet: bool, unit: str = "samples") -> Iterator[Callable[[int | str], None]]:
    """A bar on stderr while samples go by; nothing where stderr is no terminal or `quiet` is set.

    The callable is told how many samples (or what `unit` says) are done, or in words what comes now.
    """
    if quiet or not sys.stderr.isatty():
        yield lambda done: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn(unit))
    with Progress(*columns, TimeElapsedColumn(), console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(what, total=None)

        def tell(news: int | str) -> None:
            if isinstance(news, str):
                bar.update(task, description=news)
            else:
                bar.update(task, completed=news)

        yield tell
