"""What packing costs over the entropy: every byte of a container against the zero-order entropy of the codes in it.

    LOWBIT_DATA=../shared/data python -m benchmarks.packing [FILE.onnx ...]

Without files, networks of the data folder are packed in float, int8 and int4. Columns:
codes        elements of the integer weights, and their zero-order entropy in bytes, tensor by tensor
payload      what they take in the container, and how much that is over their entropy
overhead     frequency tables, index and header: what the container itself costs, as a share of the entropy
the rest     the program, and all other tensors (scales, biases, float weights), coded
zstd 19      of the whole file
"""

import argparse
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import zstandard
from rich.console import Console
from rich.table import Table

import lowbit as lb
from lowbit.storage.container import pack
from lowbit.storage.inspect import inspect

FOLDER = Path(os.environ.get("LOWBIT_DATA", "../shared/data"))
IMAGENET = "scale=255 mean=.485,.456,.406 std=.229,.224,.225"
NETWORKS = {
    "cifar10-resnet20": ("cifar10-train-0.npz", IMAGENET + " layout=NCHW"),
    "imagenet-squeezenet1_1": ("imagenet-sample-a.zip", IMAGENET),
    "speech/kws-dscnn": ("speech/kws-features.npz", None),
}
CODES = ("int8", "uint8", "int4", "uint4")
SMALLEST = 256
COLUMNS = (
    *("file", "bytes", "codes", "entropy", "payload", "over", "overhead", "over in all", "the rest", "packed"),
    "zstd 19",
)


def quantized(folder: Path) -> Iterator[Path]:
    """The networks as they are, in int8, and with weights of four bits."""
    for name, (source, how) in NETWORKS.items():
        model = lb.load(FOLDER / f"{name}.onnx")
        yield FOLDER / f"{name}.onnx"
        for recipe in ("int8", "int4-weights"):
            samples = lb.Data.of(FOLDER / source, model.inputs, preprocess=how, limit=32)
            path = folder / f"{Path(name).name}.{recipe}.onnx"
            lb.quantize(model, samples, recipe).save(path)
            yield path


def row(path: Path, folder: Path) -> list[str]:
    """One file as a line of the table."""
    size = pack(path, folder / "packed.lowbit")
    report = inspect(folder / "packed.lowbit")
    weights = [t for t in report.tensors if t.type in CODES and t.elements >= SMALLEST and t.entropy_bits is not None]
    entropy = sum((t.entropy_bits or 0.0) * t.elements for t in weights) / 8
    payload = sum(t.stored_bytes for t in weights)
    overhead = sum(report.bytes_by_use[use] for use in ("tables", "index", "header"))
    rest = size - payload - overhead
    zstd = len(zstandard.ZstdCompressor(level=19).compress(path.read_bytes()))
    over = payload - entropy
    shares = [f"{part / entropy:+.2%}" if entropy else "" for part in (over, over + overhead)]
    elements = sum(t.elements for t in weights)
    numbers = [
        f"{number:,.0f}" for number in (path.stat().st_size, elements, entropy, payload, overhead, rest, size, zstd)
    ]
    return [path.name, *numbers[:4], shares[0], numbers[4], shares[1], *numbers[5:]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("files", nargs="*", type=Path, metavar="FILE.onnx")
    arguments = parser.parse_args()
    table = Table()
    for column in COLUMNS:
        table.add_column(column, justify="left" if column == "file" else "right")
    with tempfile.TemporaryDirectory() as name:
        for path in arguments.files or quantized(Path(name)):
            table.add_row(*row(path, Path(name)))
    Console(width=160).print(table)


if __name__ == "__main__":
    main()
