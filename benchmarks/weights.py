"""Weights alone in every format: noise, and what the network still does. `python -m benchmarks.weights [NETWORK …]`

The first table is the signal-to-noise of the weights, mean over a network's tensors, by the bits of each format.
With `--accuracy`, the second is the metric of the deployed file in onnxruntime, on `--samples` evaluation samples (all
other numbers of the network stay float).
"""

import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

import lowbit as lb
from benchmarks.accuracy import BATCH
from benchmarks.networks import CASES, Case
from benchmarks.tables import Row, arguments, show
from lowbit.engines.compile import ENGINES
from lowbit.flows.metrics import Tally, metric_of
from lowbit.flows.weight_formats import COMPARED, formats_on, weights_on
from lowbit.ranges import MinMax
from lowbit.report.ledger import Ledger

NETWORKS = ("resnet20", "mobilenet", "squeezenet", "minilm", "charlstm")


def noise(networks: list[str], formats: tuple[str, ...]) -> list[Row]:
    """A row for each format, fewest bits first: bits a weight (mean over the networks), SQNR on each network."""
    rows: dict[str, dict[str, Any]] = {words: {"format": words, "bits": 0.0} for words in formats}
    for name in networks:
        for row in formats_on(lb.load(CASES[name].file()), formats):
            rows[row.format]["bits"] += row.bits / len(networks)
            rows[row.format][name] = row.sqnr_db
    return by_bits(rows.values())


def accuracy(networks: list[str], formats: tuple[str, ...], samples: int | None) -> tuple[list[Row], list[str]]:
    """A row for each format, fewest bits first, below that of float: the metric on each network.

    Beside them, in words, what a format did not store in a network.
    """
    rows: dict[str, dict[str, Any]] = {words: {"format": words, "bits": 0.0} for words in formats}
    exact: dict[str, Any] = {"format": "float", "bits": 32.0}
    notes: list[str] = []
    for name in networks:
        case = CASES[name]
        model = lb.load(case.file())
        data, unit = _first(case.evaluation(model), samples), 100 if case.percent else 1
        exact[name] = unit * metric_on(case, data, case.file())
        sample = _first(case.calibration(model), 8)
        for words in formats:
            rows[words]["bits"] += formats_on(model, (words,), MinMax())[0].bits / len(networks)
            with tempfile.TemporaryDirectory(prefix="lowbit-") as folder:
                file = Path(folder) / "network.onnx"
                quantized = lb.quantize(model, sample, words)
                quantized.save(file)
                rows[words][name] = unit * metric_on(case, data, file)
            notes += [f"{name}, {words}: {left}" for left in left_in_float(model, quantized)]
    return [exact, *by_bits(rows.values())], notes


def metric_on(case: Case, data: lb.Data, file: Path) -> float:
    """The network's metric, of the file as onnxruntime runs it."""
    run, tally = ENGINES["onnxruntime"].compile(file, threads=1), Tally(metric_of(case.metric))
    for inputs, labels in data.batches(BATCH):
        tally.add(run(inputs), labels)
    return float(tally.value())


def by_bits(rows: Iterable[Row]) -> list[Row]:
    """Formats of equal cost beside each other."""
    return sorted(rows, key=lambda row: round(float(row["bits"]), 1))


def left_in_float(model: lb.Model, quantized: lb.Model) -> list[str]:
    """Weights that recipes reach and that are float in the quantized file, and why."""
    wanted = weights_on(model)
    reasons = {row["tensor"]: row.get("reason") for row in Ledger.of(quantized).rows}
    left = [name for name in weights_on(quantized) if name in wanted]
    return [f"{name} is float: {reasons.get(name, 'no reason given')}" for name in left]


def _first(data: lb.Data, samples: int | None) -> lb.Data:
    return data if samples is None else data.take(samples)


def main(given_arguments: list[str] | None = None) -> None:
    parser = arguments(__doc__ or "", NETWORKS)
    parser.add_argument("--accuracy", action="store_true", help="also run the deployed files")
    parser.add_argument("--samples", type=int, default=1000, help="evaluation samples a network; default 1000")
    parser.add_argument("--formats", nargs="*", help="in words; default: one of each kind, at every cost")
    given = parser.parse_args(given_arguments)
    torch.set_num_threads(1)
    networks = list(given.networks or NETWORKS)
    one = {"bits": 2} | dict.fromkeys(networks, 1)
    show("SQNR of the weights, dB", noise(networks, tuple(given.formats or COMPARED)), given.json, one)
    if given.accuracy:
        rows, notes = accuracy(networks, tuple(given.formats or COMPARED), given.samples)
        digits = {"bits": 2} | {name: 1 if CASES[name].percent else 3 for name in networks}
        show(f"Metric of the deployed file, at most {given.samples} samples", rows, given.json, digits)
        print("\n".join(notes) or "Every weight of every network took every format.")


if __name__ == "__main__":
    main()
