"""Mixed precision beside one recipe for all layers, on deployed files: `python -m benchmarks.budget [NETWORK …]`.

By default the base is w4a8-fast: int4 with 8-bit activations, GPTQ in all rows; "bits 4" and so on are
`lowbit.mixed_precision(…, bits=4)`. With `--latency 0.7,0.9` the base is int8, and layers stay in float as that share
of the float network's time allows. Bytes are those of the whole file, its recipe and ledger included. Signal-to-noise
is of the outputs in onnxruntime against the float file's, on samples that nothing was calibrated with.
"""

import tempfile
import time
from collections import Counter
from functools import partial
from itertools import islice
from pathlib import Path

import torch

import lowbit as lb
from benchmarks.accuracy import BATCH, judge
from benchmarks.networks import CASES
from benchmarks.tables import arguments, show
from lowbit.engines.compile import ENGINES
from lowbit.errors import TooSmallError
from lowbit.flows.latency import side_by_side
from lowbit.metadata import from_text

NETWORKS = ("resnet20", "squeezenet")


def measure(name: str, base: str, budget: str, limits: list[float], count: int, loss: str) -> list[dict[str, object]]:
    """A row for the base recipe, and one for each limit on the budget."""
    case, rows = CASES[name], []
    model = lb.load(case.file())
    data = case.calibration(model)
    with tempfile.TemporaryDirectory(prefix="lowbit-") as folder:
        for limit in (None, *limits):
            start = time.perf_counter()
            row: dict[str, object] = {"network": name, "recipe": base if limit is None else f"{budget} {limit:g}"}
            try:
                recipe = base if limit is None else lb.mixed_precision(model, data, base, loss=loss, **{budget: limit})  # type: ignore[arg-type]
            except TooSmallError as error:
                rows.append(row | {"layers": str(error)})
                continue
            quantized = lb.quantize(model, data, recipe)
            seconds, file = time.perf_counter() - start, Path(folder) / f"{limit}.onnx"
            size = quantized.save(file)
            paths = {"float": case.file(), "file": file}
            runs = {key: ENGINES["onnxruntime"].compile(path, threads=1) for key, path in paths.items()}
            judged = judge(case, islice(case.evaluation(model).batches(BATCH), -(-count // BATCH)), runs)
            value, closeness = judged["file"]
            if value is not None and judged["float"][0] is not None:
                row |= {"float": 100 * judged["float"][0], "metric": 100 * value}
            row |= {"agree %": 100 * (closeness.agreement or 0), "SQNR dB": closeness.sqnr_db, "bytes": size}
            sample = next(case.evaluation(model).batches(1))[0]
            times = side_by_side({key: partial(run, sample) for key, run in runs.items()})
            row |= {"time ÷ float": times["file"].median_ms / times["float"].median_ms, "s": seconds}
            rows.append(row | {"layers": _layers(quantized)})
    return rows


def _layers(quantized: lb.Model) -> str:
    """How many weights have each format."""
    weights = [row for row in from_text(quantized.metadata["lowbit.ledger"]) if row["role"] == "weight"]
    formats = Counter(row["format"].split(",")[0].split(" ")[0] for row in weights)
    return " ".join(f"{n}×{kind}" for kind, n in sorted(formats.items()))


def main(arguments_given: list[str] | None = None) -> None:
    parser = arguments(__doc__ or "", list(CASES))
    parser.add_argument("--bits", default="4,5,6", help="means of bits a weight; 4,5,6 by default")
    parser.add_argument("--limit", type=int, default=2000, help="samples to evaluate; 2000 by default")
    parser.add_argument("--latency", help="shares of the float network's time, as 0.7,0.9, instead of bits")
    parser.add_argument("--loss", default="squares", help="squares, cross_entropy or labels; squares by default")
    given = parser.parse_args(arguments_given)
    torch.set_num_threads(1)
    base, budget, limits = (
        ("w4a8-fast", "bits", given.bits) if not given.latency else ("int8", "latency", given.latency)
    )
    asked = [float(word) for word in limits.split(",")]
    rows = [
        row
        for name in given.networks or NETWORKS
        for row in measure(name, base, budget, asked, given.limit, given.loss)
    ]
    show("mixed precision, deployed", rows, given.json)


if __name__ == "__main__":
    main()
