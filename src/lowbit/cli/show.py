"""`lowbit show`: the ledger of a file: every tensor, its format, or why it stayed float."""

from pathlib import Path
from typing import Annotated

import typer

from lowbit.cli.options import JsonOption, print_json, show_page


def show(
    model: Annotated[Path, typer.Argument(metavar="FILE", help="A network, quantized or not.")],
    every: Annotated[bool, typer.Option("--all", help="Also list tensors of a few bytes.")] = False,
    json: JsonOption = False,
) -> None:
    """List every tensor: its format, bits, range and bytes, or why it stayed float.

    A file of lowbit carries its own ledger; of any other file the stored tensors are listed.

    Example: lowbit show net.int8.onnx
    """
    from lowbit.model import load
    from lowbit.report.ledger import Ledger

    ledger = Ledger.of(load(model, allow_nonfinite=True))
    if json:
        print_json(ledger.to_dict(model))
    else:
        show_page(ledger.view(model, every))
