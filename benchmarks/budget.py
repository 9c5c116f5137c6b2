"""Mixed precision beside one format for all layers, on deployed files: `python -m benchmarks.budget [NETWORK …]`.

The base is the recipe w4a8-fast: int4 with 8-bit activations, GPTQ in all rows. "int4" is the recipe as it is; "bits 4"
and so on are `lowbit.mixed_precision(…, bits=4)`. Bytes are those of the whole file, its recipe and ledger included.
Signal-to-noise is of the outputs in onnxruntime against the float file's, on samples that nothing was calibrated with.
"""

import tempfile
import time
from collections import Counter
from itertools import islice
from pathlib import Path

import torch

import lowbit as lb
from benchmarks.accuracy import BATCH, judge
from benchmarks.networks import CASES
from benchmarks.tables import arguments, show
from lowbit.engines.compile import ENGINES
from lowbit.metadata import from_text

NETWORKS = ("resnet20", "squeezenet")
BASE = lb.RECIPES["w4a8-fast"]()


def measure(name: str, bits: list[float], limit: int) -> list[dict[str, object]]:
    """A row for uniform int4 and for each mean of bits."""
    case, rows = CASES[name], []
    model = lb.load(case.file())
    data = case.calibration(model)
    with tempfile.TemporaryDirectory(prefix="lowbit-") as folder:
        for mean in (None, *bits):
            start = time.perf_counter()
            recipe = BASE if mean is None else lb.mixed_precision(model, data, BASE, bits=mean)
            quantized = lb.quantize(model, data, recipe)
            seconds, file = time.perf_counter() - start, Path(folder) / f"{mean}.onnx"
            size = quantized.save(file)
            paths = {"float": case.file(), "file": file}
            runs = {key: ENGINES["onnxruntime"].compile(path, threads=1) for key, path in paths.items()}
            some = islice(case.evaluation(model).batches(BATCH), -(-limit // BATCH))
            judged = judge(case, some, runs)
            value, closeness = judged["file"]
            ledger = from_text(quantized.metadata["lowbit.ledger"])
            formats = Counter(row["format"].split(",")[0].split(" ")[0] for row in ledger if row["role"] == "weight")
            row: dict[str, object] = {"network": name, "weights": "int4" if mean is None else f"bits {mean:g}"}
            if value is not None and judged["float"][0] is not None:
                row |= {"float": 100 * judged["float"][0], "metric": 100 * value}
            row |= {"agree %": 100 * (closeness.agreement or 0), "SQNR dB": closeness.sqnr_db, "bytes": size}
            rows.append(row | {"s": seconds, "layers": " ".join(f"{n}×{kind}" for kind, n in sorted(formats.items()))})
    return rows


def main(arguments_given: list[str] | None = None) -> None:
    parser = arguments(__doc__ or "", list(CASES))
    parser.add_argument("--bits", default="4,5,6", help="means of bits a weight; 4,5,6 by default")
    parser.add_argument("--limit", type=int, default=2000, help="samples to evaluate; 2000 by default")
    given = parser.parse_args(arguments_given)
    torch.set_num_threads(1)
    bits = [float(word) for word in given.bits.split(",")]
    rows = [row for name in given.networks or NETWORKS for row in measure(name, bits, given.limit)]
    show("mixed precision, deployed", rows, given.json)


if __name__ == "__main__":
    main()
