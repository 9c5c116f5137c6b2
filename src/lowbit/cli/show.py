"""`lowbit show`: the ledger of a file: every tensor, its format, or why it stayed float."""

from pathlib import Path
from typing import Annotated

import typer

from lowbit.cli.options import JsonOption
from lowbit.cli.output import answer


def show(
    model: Annotated[Path, typer.Argument(metavar="FILE", help="A network, quantized or not.")],
    every: Annotated[bool, typer.Option("--all", help="Also list tensors of a few bytes.")] = False,
    memory: Annotated[
        bool, typer.Option("--memory", help="Of a network for the target integer: flash, RAM and products a layer.")
    ] = False,
    json: JsonOption = False,
) -> None:
    """List every tensor: its format, bits, range and bytes, or why it stayed float.

    A file of lowbit carries its own ledger; of any other file the stored tensors are listed. Of a .lowbit container it
    lists sparsity, entropy and bits achieved for each tensor, and where every byte went.

    Example: lowbit show net.int8.onnx
    """
    if model.suffix == ".lowbit" and not memory:
        from lowbit.report.contents import contents_dict, contents_view
        from lowbit.storage.inspect import inspect

        report = inspect(model)
        answer(json, contents_dict(report, model), contents_view(report, model, every))
        return

    if memory:
        from lowbit.integer.lower import read_program
        from lowbit.integer.memory import Memory

        taken = Memory.of(read_program(model))
        answer(json, taken.to_dict(), "\n".join(taken.lines()))
        return

    from lowbit.model import load
    from lowbit.report.ledger import Ledger

    ledger = Ledger.of(load(model, allow_nonfinite=True))
    answer(json, ledger.to_dict(model), ledger.view(model, every))
