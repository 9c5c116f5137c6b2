"""`lowbit run`: a network's outputs for samples of a file."""

from pathlib import Path
from typing import Annotated, Any

import typer

from lowbit.cli.options import (
    BatchOption,
    DataOption,
    EngineOption,
    JsonOption,
    LimitOption,
    MetricOption,
    NamesOption,
    PreprocessOption,
    SkipOption,
    check_output,
    open_data,
    print_json,
    progress,
    show_page,
)
from lowbit.errors import InputError


def run(
    model: Annotated[Path, typer.Argument(metavar="MODEL", help="A network, quantized or not.")],
    data: DataOption,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output", "-o", metavar="FILE", help="An .npz with an array for each output, or an .npy of one."
        ),
    ] = None,
    metric: MetricOption = None,
    preprocess: PreprocessOption = None,
    names: NamesOption = None,
    limit: LimitOption = None,
    skip: SkipOption = 0,
    batch: BatchOption = None,
    threads: Annotated[
        int | None, typer.Option(min=1, help="Threads of the engine.", show_default="its own choice")
    ] = None,
    engine: EngineOption = "onnxruntime",
    json: JsonOption = False,
) -> None:
    """Run a network on samples and write its outputs, or print a metric of them.

    Examples: lowbit run net.int8.onnx --data x.npz -o y.npz ·  lowbit run net.int8.onnx --data test.npz --metric top1
    """
    if output is None and metric is None:
        raise InputError("nothing to do: give -o y.npz to write the outputs, or --metric to measure them.")
    if output is not None:
        check_output(
            output, [model, data], {".npz": "an array for each output", ".npy": "the array of the only output"}
        )

    from lowbit.data.archive import write_arrays
    from lowbit.flows.evaluate import predict
    from lowbit.model import load

    network = load(model, allow_nonfinite=True)
    if output is not None and output.suffix == ".npy" and len(network.outputs) > 1:
        raise InputError(f"'{output}' holds one array, and the network has {len(network.outputs)} outputs: give .npz.")
    with progress("running", json) as watch:
        samples = open_data(data, network.inputs, preprocess, names, skip, limit, watch)
        outputs, value = predict(model, samples, metric, engine=engine, threads=threads, batch=batch)
    done: dict[str, Any] = {
        "outputs": {name: {"shape": list(array.shape), "dtype": str(array.dtype)} for name, array in outputs.items()}
    }
    if value is not None:
        done["metric"] = {"name": metric, "value": value}
    if output is not None:
        done |= {"output": str(output), "bytes": write_arrays(output, outputs)}
    if json:
        print_json(done)
        return
    for name, array in outputs.items():
        show_page(f"{name}: {array.dtype} {tuple(array.shape)}")
    if value is not None:
        show_page(f"{metric}: {value:.6g}")
    if output is not None:
        show_page(f"wrote {output}, {done['bytes']:,} bytes")
