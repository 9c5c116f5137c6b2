"""Latency of one call, one thread: float, lowbit's file, and the engine's own quantizer on the same network, in turn.

`python -m benchmarks.latency [NETWORK …] [--engine onnxruntime|openvino]`. Milliseconds are processor time, medians.
In OpenVINO the file of onnxruntime's quantizer runs in the same turns as NNCF's.
`--recipe "int4 group:32" --recipe nf4` times such files beside float in onnxruntime instead, minima of one run;
onnxruntime's own quantizer is added where it has one that needs no data, for int8-dynamic and for 4-bit weights.
"""

import contextlib
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch

import lowbit as lb
from benchmarks import optimized, peers
from benchmarks.shapes import SHAPES
from benchmarks.tables import arguments, show
from benchmarks.timing import alternating
from lowbit.engines.compile import ENGINES
from lowbit.errors import LowbitError
from lowbit.presets import find_recipe

Batch = dict[str, np.ndarray]
CALIBRATION = 8  # random inputs: the values of the ranges do not matter here
STATIC = "quantize_static"
OWN = {"onnxruntime": STATIC, "openvino": "NNCF"}


@dataclass(frozen=True)
class Network:
    """How to write it to a file, and one random input of it."""

    write: Callable[[Path], object]
    sample: Callable[[np.random.Generator], Batch]
    transformer: bool = False


def _shape(name: str) -> Network:
    def write(path: Path) -> None:
        torch.manual_seed(0)
        lb.load(SHAPES[name]().eval(), torch.zeros(1, 3, 224, 224)).save(path)

    return Network(write, lambda generator: {"input": generator.normal(size=(1, 3, 224, 224)).astype(np.float32)})


def _trained(name: str, shape: tuple[int, ...]) -> Network:
    from benchmarks.networks import FOLDER

    def sample(generator: np.random.Generator) -> Batch:
        port = lb.load(FOLDER / name).inputs[0]
        return {port.name: generator.normal(size=shape).astype(np.float32)}

    return Network(lambda path: path.write_bytes((FOLDER / name).read_bytes()), sample)


def _minilm(tokens: int) -> Network:
    from examples.sentences import export

    def sample(generator: np.random.Generator) -> Batch:
        words = generator.integers(1000, 20000, (1, tokens))
        return {"input_ids": words, "attention_mask": np.ones((1, tokens), np.int64)}

    def write(path: Path) -> None:
        with contextlib.redirect_stdout(sys.stderr):
            export(str(path))

    return Network(write, sample, transformer=True)


class _Hidden(torch.nn.Module):
    """The last hidden state of a network of transformers."""

    def __init__(self, network: torch.nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        hidden: torch.Tensor = self.network(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        return hidden


def _bert(tokens: int) -> Network:
    """Two layers of BERT's size from transformers' configuration, random weights, a small vocabulary."""

    def sample(generator: np.random.Generator) -> Batch:
        return {
            "input_ids": generator.integers(0, 1000, (1, tokens)),
            "attention_mask": np.ones((1, tokens), np.int64),
        }

    def write(path: Path) -> None:
        from transformers import BertConfig, BertModel

        torch.manual_seed(0)
        network: torch.nn.Module = BertModel(BertConfig(num_hidden_layers=2, vocab_size=1000), add_pooling_layer=False)
        example = {name: torch.from_numpy(array) for name, array in sample(np.random.default_rng(0)).items()}
        axes = {name: {0: "batch", 1: "tokens"} for name in example}
        lb.load(_Hidden(network.eval()), example, dynamic_axes=axes).save(path)

    return Network(write, sample, transformer=True)


def _characters(count: int) -> Network:
    from benchmarks.networks import FOLDER

    file = FOLDER / "text/charlstm-charlotte_bronte.onnx"

    def sample(generator: np.random.Generator) -> Batch:
        return {lb.load(file).inputs[0].name: generator.integers(0, 64, (1, count))}

    return Network(lambda path: path.write_bytes(file.read_bytes()), sample)


NETWORKS: dict[str, Callable[[], Network]] = {
    **{name: partial(_shape, name) for name in SHAPES},
    "MiniLM-16": partial(_minilm, 16),
    "MiniLM-128": partial(_minilm, 128),
    "BERT-128": partial(_bert, 128),
    "charlstm-128": partial(_characters, 128),
    "resnet20": partial(_trained, "cifar10-resnet20.onnx", (1, 3, 32, 32)),
    "squeezenet": partial(_trained, "imagenet-squeezenet1_1.onnx", (1, 3, 224, 224)),
    "yolox": partial(_trained, "detection/yolox_nano.onnx", (1, 3, 416, 416)),
}


def files(network: Network, engine: str, folder: Path) -> tuple[dict[str, Path], Batch]:
    """The float file, lowbit's and the peers', and an input to time them with."""
    generator = np.random.default_rng(0)
    source = folder / "float.onnx"
    network.write(source)
    model = lb.load(source)
    batches = [network.sample(generator) for _ in range(CALIBRATION)]
    batches = [dict(zip((port.name for port in model.inputs), batch.values(), strict=True)) for batch in batches]
    lb.quantize(model, batches, target=engine).save(folder / "lowbit.onnx")
    written = {"float": source, "lowbit": folder / "lowbit.onnx"}
    written[STATIC] = peers.onnxruntime_static(source, batches, folder / "own.onnx")
    if engine == "openvino":
        written["NNCF"] = peers.nncf_openvino(source, batches, folder / "own.xml", transformer=network.transformer)
    return written, batches[0]


def measure(name: str, engine: str, seconds: float) -> tuple[dict[str, object], list[dict[str, object]]]:
    """The row of latencies, and for onnxruntime what each optimized graph computes in."""
    with tempfile.TemporaryDirectory(prefix="lowbit-") as folder:
        written, batch = files(NETWORKS[name](), engine, Path(folder))
        runs = {kind: ENGINES[engine].compile(path, threads=1) for kind, path in written.items()}
        times = alternating({kind: partial(run, batch) for kind, run in runs.items()}, seconds=seconds)
        graphs: list[dict[str, object]] = []
        if engine == "onnxruntime":
            for kind in list(written)[1:]:
                counts = optimized.operators(optimized.optimized(written[kind]))
                left = {"float": counts["float"], "conversions": counts["convert"]}
                graphs.append({"network": name, "file": kind, **{k: optimized.words(c) for k, c in left.items()}})
    row: dict[str, object] = {
        "network": name,
        "engine": engine,
        "float ms": times["float"],
        "lowbit ms": times["lowbit"],
    }
    row |= {
        "own": OWN[engine],
        "own ms": times[OWN[engine]],
        "lowbit faster than float": times["float"] / times["lowbit"],
    }
    row["lowbit faster than own"] = times[OWN[engine]] / times["lowbit"]
    row["lowbit, of own"] = times["lowbit"] / times[OWN[engine]]
    if engine == "openvino":
        row[f"{STATIC}, of own"] = times[STATIC] / times[OWN[engine]]
    return row, graphs


def beside_float(name: str, recipes: list[str], seconds: float) -> list[dict[str, object]]:
    """A row for float and for each recipe: the least time of a call, all taken in turn."""
    with tempfile.TemporaryDirectory(prefix="lowbit-") as folder:
        network, generator = NETWORKS[name](), np.random.default_rng(0)
        network.write(source := Path(folder) / "float.onnx")
        model = lb.load(source)
        batches = [network.sample(generator) for _ in range(CALIBRATION)]
        written = {"float": source}
        for index, recipe in enumerate(recipes):
            written[recipe] = Path(folder) / f"{index}.onnx"
            lb.quantize(model, batches, recipe).save(written[recipe])
            if own := peers.without_data(find_recipe(recipe)):
                written[own[0]] = own[1](source, Path(folder) / f"own-{index}.onnx")
        calls = {
            recipe: partial(ENGINES["onnxruntime"].compile(path, threads=1), batches[0])
            for recipe, path in written.items()
        }
        times = alternating(calls, seconds=seconds, of=min)
    return [{"network": name, "file": file, "ms": ms, "of float": ms / times["float"]} for file, ms in times.items()]


def main(arguments_given: list[str] | None = None) -> None:
    parser = arguments(__doc__ or "", list(NETWORKS))
    parser.add_argument("--engine", choices=list(OWN), action="append", help="default: both")
    parser.add_argument("--seconds", type=float, default=4.0, help="to time each network for")
    parser.add_argument("--recipe", action="append", help="time files of these recipes beside float, in onnxruntime")
    given = parser.parse_args(arguments_given)
    torch.set_num_threads(1)
    if given.recipe:
        found = [row for name in given.networks or NETWORKS for row in beside_float(name, given.recipe, given.seconds)]
        show("Least time of a call beside float, batch 1, one thread, processor time", found, given.json)
        return
    rows, graphs = [], []
    for name in given.networks or NETWORKS:
        for engine in given.engine or OWN:
            try:
                row, found = measure(name, engine, given.seconds)
            except LowbitError as error:
                row, found = {"network": name, "engine": engine, "own": f"failed: {error}"}, []
            rows.append(row)
            graphs += found
    show("Latency, batch 1, one thread, processor time", rows, given.json)
    if graphs:
        show("What onnxruntime leaves in float", graphs, given.json)


if __name__ == "__main__":
    main()
