"""`lowbit export`: a network in integers for a machine without an engine."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from lowbit.cli.options import JsonOption, output_option
from lowbit.cli.output import answer, check_output
from lowbit.errors import InputError

KINDS = {
    ".c": "C99, and a .h beside it",
    ".tflite": "LiteRT, TFLite Micro",
    ".npz": "codes, multipliers and shifts by name",
}


def export(
    model: Annotated[Path, typer.Argument(metavar="MODEL", help="A file of `lowbit quantize --target integer`.")],
    output: Annotated[Path, output_option("What to write: .c, .tflite or .npz.")],
    main: Annotated[
        bool, typer.Option("--main", help="C: add a main that turns input codes on stdin into output codes on stdout.")
    ] = False,
    rounding: Annotated[
        Literal["onnxruntime", "once", "twice"],
        typer.Option(
            help="How accumulators become codes: as in onnxruntime; rounded once; twice, as TFLite and ARM do."
        ),
    ] = "onnxruntime",
    kernels: Annotated[
        Literal["none", "cmsis-nn"], typer.Option(help="C: a library whose kernels convolve, with the same results.")
    ] = "none",
    shape: Annotated[
        str | None, typer.Option(metavar="NAME=SIZE,…", help="Sizes of the input's named dimensions.")
    ] = None,
    json: JsonOption = False,
) -> None:
    """Write a network that was quantized for the target `integer` as C, for TFLite, or as plain arrays.

    The C needs no library, no memory but the arena that it is given, and no floating point.

    Example: lowbit export kws.int8.onnx -o kws.c
    """
    check_output(output, [model], KINDS)
    if output.suffix == ".c":
        check_output(output.with_suffix(".h"), [model])
    elif main or kernels != "none":
        raise InputError(f"--main and --kernels shape a C program; '{output}' is none.")

    from lowbit.integer.lower import read_program
    from lowbit.storage.atomic import write_bytes

    program = read_program(model, rounding, _sizes(shape))
    if output.suffix == ".c":
        from lowbit.integer.c import write_c

        source = write_c(program, output.stem, main, kernels)
        header = output.with_suffix(".h")
        size = write_bytes(output, source.code.encode())
        write_bytes(header, source.header.encode())
        told = f"wrote {output} and {header}: {len(program.layers)} layers, an arena of {source.arena_bytes:,} bytes"
        answer(json, {"output": str(output), "header": str(header), "arena_bytes": source.arena_bytes}, told)
        return
    if output.suffix == ".tflite":
        from lowbit.integer.tflite import write_tflite

        size = write_bytes(output, write_tflite(program))
    else:
        from lowbit.data.archive import write_arrays
        from lowbit.integer.arrays import arrays_of

        size = write_arrays(output, arrays_of(program))
    answer(json, {"output": str(output), "bytes": size}, f"wrote {output}, {size:,} bytes")


def _sizes(shape: str | None) -> dict[str, int]:
    """{'batch': 1} out of 'batch=1'."""
    pairs = [part.split("=") for part in (shape or "").split(",") if part.strip()]
    if wrong := next((p for p in pairs if len(p) != 2 or not p[1].strip().isdigit()), None):
        raise InputError(f"--shape: '{'='.join(wrong)}' is not NAME=SIZE. Example: --shape time=49.")
    return {name.strip(): int(size) for name, size in pairs}
