"""`lowbit pack` and `lowbit unpack`: a model in one small file, and back bit for bit."""

import time
from pathlib import Path
from typing import Annotated

import typer

from lowbit.cli.options import JsonOption, output_option
from lowbit.cli.output import answer, check_output, progress


def pack(
    model: Annotated[Path, typer.Argument(metavar="MODEL", help="An .onnx or .safetensors file, quantized or not.")],
    output: Annotated[Path | None, output_option("Where to write.", "MODEL.lowbit")] = None,
    json: JsonOption = False,
) -> None:
    """Entropy-code a model into one .lowbit file; `lowbit unpack` gives it back bit for bit.

    Nothing is changed: integers cost their entropy, float weights about 80 % of their bytes. External data is taken in.

    Example: lowbit pack net.int8.onnx -o net.lowbit
    """
    output = output or Path(f"{model.stem}.lowbit")
    check_output(output, [model], {".lowbit": "a container; `lowbit unpack` gives the model back"})

    from lowbit.report.words import written_text
    from lowbit.storage.container import pack as pack_model
    from lowbit.storage.inspect import inspect

    start = time.perf_counter()
    with progress(json, "bytes") as bar:
        size = pack_model(model, output, lambda done, total: bar("packing", done, total))
    report, seconds = inspect(output), time.perf_counter() - start
    values = {"output": str(output), "bytes": size, "bytes_before": report.unpacked_size}
    values |= {"seconds": round(seconds, 2), "bytes_by_use": report.bytes_by_use}
    page = written_text(output, seconds, size, report.unpacked_size)
    answer(json, values, page, f"next: lowbit show {output}\n      lowbit unpack {output} -o {model.name}")


def unpack(
    container: Annotated[Path, typer.Argument(metavar="FILE", help="A .lowbit file.")],
    output: Annotated[Path, output_option("Where to write the model.")],
    max_bytes: Annotated[
        int | None,
        typer.Option(
            min=1, help="Refuse to unpack to more than this.", show_default="1 GiB, or 1024 times the file if more"
        ),
    ] = None,
    json: JsonOption = False,
) -> None:
    """Write the model that a .lowbit file holds, bit for bit as it was packed; its external data goes beside it.

    Example: lowbit unpack net.lowbit -o net.onnx
    """
    check_output(output, [container], {".onnx": "an ONNX file", ".safetensors": "where that was packed"})

    from lowbit.report.words import bytes_text
    from lowbit.storage.container import unpack as unpack_model

    size = unpack_model(container, output, max_bytes)
    answer(json, {"output": str(output), "bytes": size}, f"wrote {output}, {bytes_text(size)}; checksums verified")
