"""What quantizing costs: whole runs from the float file to the quantized file, beside other quantizers.

`python -m benchmarks.calibration [NETWORK …] [--no-peers]`. Every run is a process of its own: seconds are wall time,
GB the peak of its memory, as `/usr/bin/time -v` gives them. All read the same prepared samples. The random weights of
ResNet-50 and MobileNet v2 are enough here: only shapes count.
"""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from benchmarks import stored_samples
from benchmarks.tables import Row, arguments, show

# A small process in between: what a large one forks is charged for the memory of its parent.
MEASURE = """
import json, resource, subprocess, sys, time
start = time.perf_counter()
done = subprocess.run(sys.argv[1:], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
seconds = time.perf_counter() - start
peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
sys.stderr.write(done.stderr)
print(json.dumps({"s": seconds, "GB": peak / 2**20}))
sys.exit(done.returncode)
"""
IMAGENET = "size=224 fit=crop short=256 scale=255 mean=.485,.456,.406 std=.229,.224,.225"
GROWTH = (50, 200, 5000)  # samples; up to 200 are kept in memory, and more should need no more


@dataclass(frozen=True)
class Network:
    """prepare(folder) writes float.onnx and samples.npz there; `bar` is what must be reached, in words."""

    prepare: Callable[[Path], None]
    bar: str
    transformer: bool = False


def _random_weights(shape: str, samples: int, folder: Path) -> None:
    import torch

    import lowbit as lb
    from benchmarks.networks import PHOTOS
    from benchmarks.shapes import SHAPES

    torch.manual_seed(0)
    model = lb.load(SHAPES[shape]().eval(), torch.zeros(1, 3, 224, 224))
    model.save(folder / "float.onnx")
    _write_samples(lb.Data.of(PHOTOS, model.inputs, preprocess=IMAGENET, limit=samples), folder)


def _trained(case: str, samples: int, folder: Path) -> None:
    import lowbit as lb
    from benchmarks.networks import CASES

    model = lb.load(CASES[case].file())
    model.save(folder / "float.onnx")  # at a current opset: onnxruntime's weights per channel need 13
    calibration = CASES[case].calibration(model)
    _write_samples(calibration.take(samples), folder)


def _deeplab(folder: Path) -> None:
    """All 39 images: what is evaluated elsewhere may calibrate here, where only time and memory are read."""
    import lowbit as lb
    from benchmarks.networks import CASES

    model = lb.load(CASES["deeplab"].file())
    model.save(folder / "float.onnx")
    _write_samples(CASES["deeplab"].evaluation(model), folder)


def _write_samples(data: "object", folder: Path) -> None:
    stored_samples.write(folder / "samples.npz", [inputs for inputs, _ in data.batches(1)])  # type: ignore[attr-defined]


NETWORKS: dict[str, Network] = {
    "resnet50": Network(partial(_random_weights, "ResNet-50", 100), "2× NNCF, 2 GB"),
    "mobilenetv2": Network(partial(_random_weights, "MobileNet v2", 100), "2× NNCF, 2 GB"),
    "squeezenet": Network(partial(_trained, "squeezenet", 200), "2× NNCF, 2 GB"),
    "minilm": Network(partial(_trained, "minilm", 200), "12 s, 1.2 GB", transformer=True),
    "deeplab": Network(_deeplab, "2× onnxruntime, 2 GB"),
    "yolox": Network(partial(_trained, "yolox", 64), "25 s, 1.2 GB"),
}


def commands(network: Network, folder: Path, with_peers: bool) -> dict[str, list[str]]:
    """How each quantizer is started, by its name."""
    source = folder / "float.onnx"
    lowbit = [sys.executable, "-m", "lowbit", "quantize", str(source), "--json"]
    lowbit += ["--data", f"{Path(stored_samples.__file__)}:samples"]
    found = {
        "lowbit": [*lowbit, "--output", str(folder / "int8.onnx")],
        "fast": [*lowbit, "--output", str(folder / "fast.onnx"), "--recipe", "int8-fast"],
    }
    if with_peers:
        child = [sys.executable, "-m", "benchmarks.calibration", "--child", str(folder)]
        found["ort"] = [*child, "ort"]
        found["NNCF"] = [*child, "NNCF-transformer" if network.transformer else "NNCF"]
    return found


def child(folder: Path, quantizer: str) -> None:
    """A peer, in the process of its own."""
    from benchmarks import peers

    source, batches = folder / "float.onnx", stored_samples.Stored(folder / "samples.npz")
    if quantizer == "ort":
        peers.onnxruntime_static(source, batches, folder / "ort.onnx")
    else:
        peers.nncf_openvino(source, batches, folder / "nncf.xml", transformer=quantizer.endswith("transformer"))


def measured(command: Sequence[str], **environment: str) -> dict[str, float]:
    """{"s": wall seconds, "GB": peak of the memory}; empty where the command failed, with its last line on stderr."""
    whole = [sys.executable, "-I", "-S", "-c", MEASURE, *command]
    done = subprocess.run(whole, capture_output=True, text=True, check=False, env=os.environ | environment)
    if done.returncode:
        said = done.stderr.strip().splitlines() or ["killed"]
        print(f"{' '.join(command[1:5])}: {said[-1][:200]}", file=sys.stderr)
        return {}
    found: dict[str, float] = json.loads(done.stdout.strip().splitlines()[-1])
    return found


def whole_runs(name: str, with_peers: bool) -> Row:
    """A row: seconds and GB of each quantizer, and how lowbit's times compare."""
    network = NETWORKS[name]
    with tempfile.TemporaryDirectory(prefix="lowbit-") as text:
        folder = Path(text)
        network.prepare(folder)
        runs = commands(network, folder, with_peers)
        found = {key: measured(run, SAMPLES=str(folder / "samples.npz")) for key, run in runs.items()}
    row: dict[str, object] = {"network": name}
    for key, figures in found.items():
        row |= {f"{key} {unit}": figures.get(unit) for unit in ("s", "GB")}
    for key, peer in (("lowbit", "NNCF"), ("lowbit", "ort"), ("fast", "ort")):
        if found.get(key) and found.get(peer):
            row[f"{key}/{peer}"] = found[key]["s"] / found[peer]["s"]
    return {**row, "bar": network.bar}


def growth() -> list[Row]:
    """Peak memory of ResNet-20 with few and with many samples."""
    from benchmarks.networks import FOLDER

    source, data = FOLDER / "cifar10-resnet20.onnx", FOLDER / "cifar10-train-0.npz"
    words = IMAGENET[IMAGENET.index("scale") :] + " layout=NCHW"
    command = [sys.executable, "-m", "lowbit", "quantize", str(source), "--data", str(data), "--preprocess", words]
    with tempfile.TemporaryDirectory(prefix="lowbit-") as folder:
        command += ["--json", "--output", f"{folder}/int8.onnx", "--limit"]
        return [{"samples": count, **measured([*command, str(count)])} for count in GROWTH]


def main(arguments_given: list[str] | None = None) -> None:
    parser = arguments(__doc__ or "", list(NETWORKS))
    parser.add_argument("--no-peers", action="store_true", help="lowbit alone")
    parser.add_argument("--child", nargs=2, metavar=("FOLDER", "PEER"), help="quantize as a peer does, nothing else")
    given = parser.parse_args(arguments_given)
    if given.child:
        child(Path(given.child[0]), given.child[1])
        return
    digits = {"lowbit/NNCF": 2, "lowbit/ort": 2, "fast/ort": 2}
    rows = [whole_runs(name, not given.no_peers) for name in given.networks or NETWORKS]
    columns = dict.fromkeys(c for row in rows for c in row)
    digits |= {c: 2 if c.endswith(" GB") else 1 for c in columns if c.endswith((" s", " GB"))}
    show("Whole runs, default recipe and int8-fast, beside onnxruntime MinMax and NNCF", rows, given.json, digits)
    if not given.networks:
        show("Memory while samples grow, ResNet-20", growth(), given.json)


if __name__ == "__main__":
    main()
