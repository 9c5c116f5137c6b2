"""What it takes to keep the metric: the search on trained networks, to half a point of float by default.

`python -m benchmarks.search [NETWORK …] [--max-drop 0.5] [--trials N] [--target TARGET]`. "int8" is plain rounding by
the extremes of the calibration data (`int8-fast`), and "bytes" are of the result for each byte of it. Seconds are of
the whole search. Nothing that is tested on is calibrated on.
"""

import tempfile
import time
from pathlib import Path

import lowbit as lb
from benchmarks.networks import CASES
from benchmarks.tables import arguments, show
from lowbit.flows.judge import Judge
from lowbit.flows.metrics import metric_of

NETWORKS = ("resnet20", "resnet32", "resnet8", "kws", "squeezenet", "mobilenet", "vww", "yolox", "deeplab", "minilm")


def measure(name: str, max_drop: float, trials: int | None, target: str) -> tuple[dict[str, object], lb.Search]:
    """The row of a network, and the search."""
    case = CASES[name]
    model = lb.load(case.file())
    calibration, test = case.calibration(model), case.evaluation(model)
    start = time.perf_counter()
    found = lb.search(model, calibration, test, metric=case.metric, max_drop=max_drop, trials=trials, target=target)
    seconds = time.perf_counter() - start
    with tempfile.TemporaryDirectory(prefix="lowbit-") as folder:
        lb.quantize(model, calibration, "int8-fast", target=target).save(file := Path(folder) / "plain.onnx")
        plain = Judge.of(model, test, metric_of(case.metric), "onnxruntime").measure(file)
    best, before = found.best.measured, found.tries[-1].measured
    assert best is not None
    assert before is not None
    row: dict[str, object] = {"network": name, "metric": found.metric.name, "float": before.metric}
    row |= {"int8": plain.metric, "result": best.metric, "drop": best.drop, "reached": str(found.reached)}
    row |= {"bytes": best.bytes / plain.bytes, "faster than float": best.times_faster}
    row |= {"seconds": seconds, "tries": len(found.tries) - 1, "what it took": found.best.what}
    return row, found


def main(arguments_given: list[str] | None = None) -> None:
    parser = arguments(__doc__ or "", list(CASES))
    parser.add_argument("--max-drop", type=float, default=0.5, help="points")
    parser.add_argument("--trials", type=int, help="search settings with optuna, this many times")
    parser.add_argument("--target", default="onnxruntime")
    parser.add_argument("--tries", action="store_true", help="show the tries of each network")
    given = parser.parse_args(arguments_given)
    rows = []
    for name in given.networks or NETWORKS:
        row, found = measure(name, given.max_drop, given.trials, given.target)
        rows.append(row)
        if given.tries:
            print(name, found, sep="\n", flush=True)
    digits = {"float": 4, "int8": 4, "result": 4, "drop": 2, "bytes": 3, "seconds": 0, "faster than float": 2}
    show(f"A drop of at most {given.max_drop:g} points, on the deployed file", rows, given.json, digits)


if __name__ == "__main__":
    main()
