"""`lowbit run`: a network's outputs for samples of a file."""

from pathlib import Path
from typing import Annotated, Any

import typer

from lowbit.cli.options import DataOption, JsonOption, RunOptions, output_option, with_groups
from lowbit.cli.output import answer, check_output, progress
from lowbit.errors import InputError

KINDS = {".npz": "an array for each output", ".npy": "the array of the only output"}


@with_groups
def run(
    model: Annotated[Path, typer.Argument(metavar="MODEL", help="A network, quantized or not.")],
    data: DataOption,
    running: RunOptions,
    output: Annotated[Path | None, output_option("An .npz with an array for each output, or an .npy of one.")] = None,
    threads: Annotated[
        int | None, typer.Option(min=1, help="Threads of the engine.", show_default="its own choice")
    ] = None,
    json: JsonOption = False,
) -> None:
    """Run a network on samples and write its outputs, or print a metric of them.

    Examples: lowbit run net.int8.onnx --data x.npz -o y.npz ·  lowbit run net.int8.onnx --data test.npz --metric top1
    """
    if output is None and running.metric is None:
        raise InputError("nothing to do: give -o y.npz to write the outputs, or --metric to measure them.")
    if output is not None:
        check_output(output, [model, data], KINDS)

    from lowbit.data.archive import write_arrays
    from lowbit.flows.evaluate import predict
    from lowbit.model import load

    network = load(model, allow_nonfinite=True)
    if output is not None and output.suffix == ".npy" and len(network.outputs) > 1:
        raise InputError(f"'{output}' holds one array, and the network has {len(network.outputs)} outputs: give .npz.")
    with progress(json) as bar:
        samples = running.open(data, network.inputs, bar, "running")
        outputs, value = predict(
            model, samples, running.metric, engine=running.engine, threads=threads, batch=running.batch
        )
    listed = {name: {"shape": list(array.shape), "dtype": str(array.dtype)} for name, array in outputs.items()}
    values: dict[str, Any] = {"outputs": listed}
    pages = [f"{name}: {array.dtype} {tuple(array.shape)}" for name, array in outputs.items()]
    if value is not None:
        values["metric"] = {"name": running.metric, "value": value}
        pages.append(f"{running.metric}: {value:.6g}")
    if output is not None:
        values |= {"output": str(output), "bytes": write_arrays(output, outputs)}
        pages.append(f"wrote {output}, {values['bytes']:,} bytes")
    answer(json, values, *pages)
