"""What a recipe keeps of trained networks, on the deployed file, by default int8; `--peers` adds other quantizers.

`python -m benchmarks.accuracy [NETWORK …] [--recipe RECIPE] [--limit N] [--peers] [--no-data] [--splits N]`. With
`--target openvino`, lowbit's file is for OpenVINO and runs there, and its operators are not counted. With
`--splits`, a network that is calibrated on the first of its own samples is calibrated N times, each time on other ones,
and evaluated on all the rest; the last row is the mean. "worst step" is the largest difference between a code of the
file and the simulation's; "integers" counts the operators with weights that onnxruntime runs in integers in a default
session, and all of them. Calibration has 200 samples without labels (fewer where there are no more); none of them is
evaluated. onnxruntime's own quantizer runs with each of its calibrators, and its best counts.
Bytes are a share of the float file's without its exporter's notes.
"""

import json
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch

import lowbit as lb
from benchmarks import peers
from benchmarks.networks import CALIBRATION, CASES, Case
from benchmarks.optimized import operators, optimized
from benchmarks.tables import arguments, show
from lowbit.engines.compile import ENGINES, Batch, Run
from lowbit.errors import LowbitError
from lowbit.flows.fidelity import Closeness, Fidelity
from lowbit.flows.metrics import Tally, metric_of
from lowbit.graph.notes import sizes
from lowbit.presets import find_recipe
from lowbit.targets import find_target

BATCH = 25
# also as QLinearConv, FusedConv, …
MULTIPLYING = ("Conv", "MatMul", "Gemm", "MatMulInteger", "MatMulIntegerToFloat", "MatMulNBits")


@dataclass(frozen=True)
class Candidate:
    """A network to be judged: where it came from, the file, how it runs, and the seconds that quantizing took."""

    name: str
    file: Path
    run: Run
    seconds: float | None = None


def candidates(
    case: Case, folder: Path, with_peers: bool, recipe: str, data: bool = True, target: str = "onnxruntime"
) -> Iterator[Candidate]:
    """The float file, lowbit's, and those of the peers; one that fails is named and left out."""
    source = case.file()
    yield compiled("float", source)
    model = lb.load(source)
    calibration = case.calibration(model)
    start = time.process_time()
    quantized = lb.quantize(model, calibration if data else None, recipe, target=target)
    seconds = time.process_time() - start
    quantized.save(folder / "lowbit.onnx")
    yield compiled("lowbit", folder / "lowbit.onnx", find_target(target).engine, seconds)
    if not with_peers:
        return
    source = folder / "float.onnx"  # at a current opset: per-channel weights need 13
    model.save(source)
    batches = [inputs for inputs, _ in calibration.batches(1)]
    if own := peers.without_data(find_recipe(recipe)):
        yield from _attempt(own[0], "onnxruntime", own[1], source, folder / "own.onnx")
        return
    for per_channel, methods in ((True, case.calibrators), (False, case.calibrators[:1])):
        for method in methods:
            name = f"onnxruntime {method}, per {'channel' if per_channel else 'tensor'}"
            file = folder / f"{method}-{per_channel}.onnx"
            yield from _attempt(
                name,
                "onnxruntime",
                peers.onnxruntime_static,
                source,
                batches,
                file,
                method=method,
                per_channel=per_channel,
            )
    yield from _attempt(
        "NNCF", "openvino", peers.nncf_openvino, source, batches, folder / "nncf.xml", transformer=case.transformer
    )


def splits(name: str, recipe: str, count: int, target: str) -> list[dict[str, object]]:
    """A row for each split of a network's own samples into those that calibrate and the rest, and their mean."""
    case = CASES[name]
    model = lb.load(case.file())
    samples = [*case.calibration(model).batches(1), *case.evaluation(model).batches(1)]
    size = min(CALIBRATION, len(samples) // count)
    rows: list[dict[str, object]] = []
    for split in range(count):
        chosen = range(split * size, (split + 1) * size)
        quantized = lb.quantize(model, [samples[i][0] for i in chosen], recipe, target=target)
        with tempfile.TemporaryDirectory(prefix="lowbit-") as folder:
            quantized.save(Path(folder) / "lowbit.onnx")
            runs = {"float": ENGINES["onnxruntime"].compile(case.file(), threads=1)}
            runs["lowbit"] = ENGINES[find_target(target).engine].compile(Path(folder) / "lowbit.onnx", threads=1)
            rest = [sample for i, sample in enumerate(samples) if i not in chosen]
            judged = judge(case, rest, runs)
        value, closeness = judged["lowbit"]
        shares = {"float": judged["float"][0], "metric": value, "agree %": closeness.agreement}
        row: dict[str, object] = {key: 100 * share for key, share in shares.items() if share is not None}
        rows.append({"network": name, "split": split + 1, **row, "SQNR dB": closeness.sqnr_db})
    means = {key: sum(float(str(row[key])) for row in rows) / count for key in list(rows[0])[2:]}
    return [*rows, {"network": name, "split": "mean", **means}]


def compiled(name: str, file: Path, engine: str = "onnxruntime", seconds: float | None = None) -> Candidate:
    """A candidate that its engine has loaded."""
    return Candidate(name, file, ENGINES[engine].compile(file, threads=1), seconds)


def _attempt(name: str, engine: str, quantizer: object, *inputs: object, **options: object) -> Iterator[Candidate]:
    start = time.process_time()
    try:
        file = quantizer(*inputs, **options)  # type: ignore[operator]
        yield compiled(name, file, engine, time.process_time() - start)
    except Exception as error:  # a peer's failure is a result
        print(f"{name}: {type(error).__name__}: {str(error)[:150]}".splitlines()[0], file=sys.stderr)


def judge(
    case: Case, batches: Iterable[tuple[Batch, Any]], runs: dict[str, Run]
) -> dict[str, tuple[float | None, Fidelity]]:
    """Metric and closeness to the first of the runs, all in one pass over the batches of inputs and labels."""
    metric = None if case.metric is None else metric_of(case.metric)
    tallies = {name: Tally(metric) for name in runs} if metric else {}
    sums = {name: Closeness() for name in runs}
    reference = next(iter(runs))
    for inputs, labels in batches:
        outputs = {name: run(inputs) for name, run in runs.items()}
        shown = case.output or next(iter(outputs[reference]))
        for name, output in outputs.items():
            sums[name].add(outputs[reference][shown], output[shown], labels)
            if tallies and labels is not None:
                tallies[name].add(output, labels)
    return {
        name: (tallies[name].value() if tallies else None, closeness.fidelity(name)) for name, closeness in sums.items()
    }


def measure(
    name: str,
    with_peers: bool = False,
    recipe: str = "int8",
    limit: int | None = None,
    data: bool = True,
    target: str = "onnxruntime",
) -> list[dict[str, object]]:
    """A row for each candidate; of onnxruntime's calibrators only the one with the best signal-to-noise."""
    case = CASES[name]
    with tempfile.TemporaryDirectory(prefix="lowbit-") as folder:
        found = list(candidates(case, Path(folder), with_peers, recipe, data, target))
        batches = case.evaluation(lb.load(found[0].file)).batches(BATCH)
        some = islice(batches, None if limit is None else -(-limit // BATCH))
        judged = judge(case, some, {c.name: c.run for c in found})
        sizes = {c.name: _bytes(c.file) for c in found}
        deployed = _deployed(found[1].file, find_target(target).engine == "onnxruntime")
    rows = []
    for candidate in found[1:]:
        value, closeness = judged[candidate.name]
        unit = 100 if case.percent else 1
        row: dict[str, object] = {"network": name, "quantizer": candidate.name}
        if case.metric is not None and value is not None and judged["float"][0] is not None:
            row |= {"float": unit * judged["float"][0], "metric": unit * value}
        row |= {
            "agree %": None if closeness.agreement is None else 100 * closeness.agreement,
            "SQNR dB": closeness.sqnr_db,
        }
        row |= {"cosine": closeness.cosine, "bytes": sizes[candidate.name] / sizes["float"], "CPU s": candidate.seconds}
        bar = case.bar if recipe == "int8" else ""
        rows.append(row | (deployed | {"bar": bar} if candidate.name == "lowbit" else {}))
    return _best_calibrator(rows)


def _deployed(file: Path, counted: bool) -> dict[str, object]:
    """How far codes are from the simulation, and the operators with weights that run in integers, of all of them."""
    parity = json.loads(lb.load(file).metadata["lowbit.parity"])
    if not counted:
        return {"worst step": parity["worst"][1]}
    counts = operators(optimized(file))
    found = {
        kind: sum(n for op, n in counts[kind].items() if op.endswith(MULTIPLYING)) for kind in ("integer", "float")
    }
    return {"worst step": parity["worst"][1], "integers": f"{found['integer']} of {sum(found.values())}"}


def _best_calibrator(rows: list[dict[str, object]]) -> list[dict[str, object]]:
    tried = [row for row in rows if "per channel" in str(row["quantizer"])]
    best = max(tried, key=lambda row: float(str(row["SQNR dB"])), default=None)
    return [row for row in rows if row not in tried or row is best]


def _bytes(file: Path) -> int:
    """On disk, without an exporter's notes."""
    if file.suffix == ".xml":
        return file.stat().st_size + file.with_suffix(".bin").stat().st_size
    whole, notes = sizes(file)
    return whole - notes


def main(arguments_given: list[str] | None = None) -> None:
    parser = arguments(__doc__ or "", list(CASES))
    parser.add_argument("--recipe", default="int8", help="a preset, a TOML file or a format; int8 by default")
    parser.add_argument("--limit", type=int, help="samples to evaluate; all by default")
    parser.add_argument("--peers", action="store_true", help="onnxruntime's quantizer and NNCF in the same run")
    parser.add_argument("--no-data", action="store_true", help="no calibration data, for recipes that need none")
    parser.add_argument("--splits", type=int, help="calibrate that many times, on other samples of the network's own")
    parser.add_argument("--target", default="onnxruntime", choices=ENGINES, help="of lowbit's file, and where it runs")
    given = parser.parse_args(arguments_given)
    torch.set_num_threads(1)
    rows: list[dict[str, object]] = []
    for name in given.networks or CASES:
        try:
            if given.splits:
                rows += splits(name, given.recipe, given.splits, given.target)
            else:
                rows += measure(name, given.peers, given.recipe, given.limit, not given.no_data, given.target)
        except LowbitError as error:
            rows.append({"network": name, "quantizer": "lowbit", "bar": f"failed: {error}"})
    fine = not any(CASES[name].percent for name in given.networks or CASES)  # bits, correlations
    digits = {"float": 4, "metric": 4} if fine else {}
    show(f"{given.recipe}, deployed; CPU s is the time to quantize", rows, given.json, digits)


if __name__ == "__main__":
    main()
