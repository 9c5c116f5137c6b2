"""The output of every subcommand: checked before the work, written by its extension, shown as a page or as JSON."""

import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from time import perf_counter
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from lowbit.errors import InputError

if TYPE_CHECKING:
    from lowbit.model import Model

MODEL_FILES = {".onnx": "an ONNX file", ".lowbit": "the same, entropy-coded"}
Progress = Callable[..., None]
"""Told (phase), (phase, done), (phase, done, total) or (phase, done, total, note)."""


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


def answer(json: bool, values: Mapping[str, Any], *pages: object) -> None:
    """The result of a command on stdout: its values as JSON, or its pages, tables or text.

    Tables are not cut to 80 columns where the output is a file or a pipe. Text is never wrapped.
    """
    if json:
        from json import dumps

        print(dumps(values, indent=2, ensure_ascii=False, allow_nan=False))
        return
    for page in pages:
        if isinstance(page, str):
            print(page)
            continue
        from rich.console import Console

        width = None if sys.stdout.isatty() else 200
        Console(width=width, highlight=False, soft_wrap=False).print(page)


def answer_quantized(
    json: bool,
    model: Path,
    quantized: "Model",
    output: Path,
    recipe: str,
    start: float,
    told: Mapping[str, Any] = MappingProxyType({}),
    note: str = "",
) -> None:
    """Save a quantized model and say what it is beside the float one.

    start   when the command began, by the clock `perf_counter`
    told    more of its values; note: a line more of its page
    """
    from lowbit.graph.notes import sizes
    from lowbit.report.ledger import Ledger

    size, before, ledger = save_model(quantized, output), sizes(model), Ledger.of(quantized)
    seconds = perf_counter() - start
    values = {"output": str(output), "bytes": size, "bytes_before": before[0], "note_bytes_before": before[1]}
    values |= {"recipe": recipe, "seconds": round(seconds, 2), **told, **ledger.counts()}
    pages = [ledger.summary(output, before, size, seconds), *([note] if note else [])]
    answer(json, values, *pages, f"next: lowbit show {output}\n      lowbit compare {model} {output} --data …")


def beside(model: Path, recipe: str) -> Path:
    """Where a model that this recipe has quantized is written, if nobody says where."""
    return Path(f"{model.stem}.{Path(recipe).stem.replace(' ', '-').replace(':', '')}.onnx")


@contextmanager
def progress(quiet: bool, unit: str = "samples") -> Iterator[Progress]:
    """A bar on stderr for the phase that runs; nothing where stderr is no terminal or `quiet` is set."""
    if quiet or not sys.stderr.isatty():
        yield lambda phase, done=0, total=None, note="": None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
    from rich.progress import Progress as Bars

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn(unit))
    times = (TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn(), TextColumn("{task.fields[note]}"))
    with Bars(*columns, *times, console=Console(stderr=True), transient=True) as bars:

        def show(phase: str, done: int = 0, total: int | None = None, note: str = "") -> None:
            if not bars.tasks or bars.tasks[0].description != phase:
                for old in bars.task_ids:
                    bars.remove_task(old)
                bars.add_task(phase, total=total, note=note)
            bars.update(bars.task_ids[0], completed=done, total=total, note=note)

        yield show
