"""Weights alone in every format: noise, and what the network still does. `python -m benchmarks.weights [NETWORK …]`

The first table is the signal-to-noise of the weights, mean over a network's tensors, by the bits of each format.
With `--accuracy`, the second is the metric of the deployed file in onnxruntime, on `--samples` evaluation samples (all
other numbers of the network stay float).
"""

import tempfile
from pathlib import Path

import torch

import lowbit as lb
from benchmarks.accuracy import judge
from benchmarks.networks import CASES
from benchmarks.tables import arguments, show
from lowbit.deploy.engines import ENGINES
from lowbit.flows.formats import COMPARED, formats_on

NETWORKS = ("resnet20", "mobilenet", "squeezenet", "minilm", "charlstm")
# One of each kind, by bits a weight.
JUDGED = (
    *("int8 channel:0", "e4m3", "int6 channel:0", "mxfp6_e2m3", "mx6", "int5 channel:0", "int4 group:32", "nf4"),
    *("nvfp4", "vsq4", "mxfp4", "int4 channel:0", "e2m1 channel:0", "apot4 channel:0", "log4 channel:0", "pwlq4"),
    *("codebook4", "bases4 channel:0", "mx4", "int3 group:32", "codebook3 channel:0", "ternary channel:0"),
)


def noise(networks: list[str], formats: tuple[str, ...]) -> list[dict[str, object]]:
    """A row for each format: bits on the first network, SQNR of the weights on each."""
    rows: dict[str, dict[str, object]] = {}
    for name in networks:
        for row in formats_on(lb.load(CASES[name].file()), formats):
            rows.setdefault(row.format, {"format": row.format, "bits": row.bits})[name] = row.sqnr_db
    return list(rows.values())


def accuracy(networks: list[str], formats: tuple[str, ...], samples: int | None) -> list[dict[str, object]]:
    """A row for each format: the metric on each network, its float value first."""
    rows: dict[str, dict[str, object]] = {words: {"format": words} for words in ("float", *formats)}
    for name in networks:
        case = CASES[name]
        model = lb.load(case.file())
        data = case.evaluation(model)
        unit = 100 if case.percent else 1
        few = _first(data, samples)
        with tempfile.TemporaryDirectory(prefix="lowbit-") as folder:
            runs = {"float": ENGINES["onnxruntime"].compile(case.file(), threads=1)}
            sample = _first(case.calibration(model), 8)
            for index, words in enumerate(formats):
                file = Path(folder) / f"{index}.onnx"
                lb.quantize(model, sample, words).save(file)
                runs[words] = ENGINES["onnxruntime"].compile(file, threads=1)
            for words, (value, _) in judge(case, few, runs).items():
                rows[words][name] = None if value is None else unit * value
    return list(rows.values())


def _first(data: lb.Data, samples: int | None) -> lb.Data:
    return data if samples is None else data.take(samples)


def main(given_arguments: list[str] | None = None) -> None:
    parser = arguments(__doc__ or "", NETWORKS)
    parser.add_argument("--accuracy", action="store_true", help="also run the deployed files")
    parser.add_argument("--samples", type=int, default=1000, help="evaluation samples a network; default 1000")
    parser.add_argument("--formats", nargs="*", help="in words; default: one of each kind")
    given = parser.parse_args(given_arguments)
    torch.set_num_threads(1)
    networks = list(given.networks or NETWORKS)
    show("SQNR of the weights, dB", noise(networks, tuple(given.formats or COMPARED)), given.json)
    if given.accuracy:
        rows = accuracy(networks, tuple(given.formats or JUDGED), given.samples)
        show(f"Metric of the deployed file, {given.samples} samples", rows, given.json)


if __name__ == "__main__":
    main()
