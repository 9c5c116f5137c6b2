"""What calibration costs: time beside plain float passes and beside other quantizers, and memory as samples grow.

`python -m benchmarks.calibration [--no-peers]`. Seconds are processor time of one thread, memory is the peak of a
process of its own. Five ranges mean minmax, moving average, percentile, entropy and MSE of every activation.
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch

import lowbit as lb
from benchmarks import peers
from benchmarks.networks import CASES, FOLDER, IMAGENET
from benchmarks.tables import Row, show
from lowbit.deploy.engines import ENGINES
from lowbit.flows.calibrate import forward, observe
from lowbit.flows.ptq import BATCH
from lowbit.graph import PASSES
from lowbit.ranges import MSE, Entropy, MinMax, MovingAverage, Percentile, Range
from lowbit.recipe import find_recipe
from lowbit.simulate.fakequant import Simulation
from lowbit.simulate.place import place

Batch = dict[str, np.ndarray]
RANGES: tuple[Range, ...] = (MinMax(), MovingAverage(), Percentile(99.99), Entropy(), MSE())
ROUNDS = 3
SAMPLES = {"lowbit": (50, 5000), "onnxruntime Entropy": (50, 200), "onnxruntime MinMax": (50, 200)}
MEMORY_NETWORK = "cifar10-resnet20.onnx"


def simulation_of(model: lb.Model) -> Simulation:
    """The simulated network of the default recipe, as `quantize` builds it."""
    prepared, recipe = model.copy(), find_recipe("int8")
    for name in recipe.passes:
        if name in PASSES:
            PASSES[name](prepared.program)
    return Simulation(prepared.program, place(prepared.program, recipe))


def answer_all(simulation: Simulation) -> int:
    """Bounds of every activation in each of the five ranges; the number of answers."""
    quantizers = list(simulation.activations().values())
    for quantizer in quantizers:
        for range_ in RANGES:
            range_.bounds(quantizer.statistics, quantizer.format)
    return len(quantizers) * len(RANGES)


def timed(call: Callable[[], object]) -> float:
    """Seconds of processor time."""
    start = time.process_time()
    call()
    return time.process_time() - start


def ranges_beside_forward(name: str) -> list[Row]:
    """One pass that answers five ranges, beside plain passes of the same network over the same samples."""
    case = CASES[name]
    model = lb.load(case.file())
    batches = [inputs for inputs, _ in case.calibration(model).batches(BATCH)]
    run = ENGINES["onnxruntime"].compile(model.program, threads=1)
    seconds: dict[str, list[float]] = {"plain": [], "onnxruntime": [], "observe": [], "bounds": []}
    answers = 0
    for _ in range(ROUNDS):
        simulation = simulation_of(model)
        forward(simulation, batches[0])  # kernels are compiled and memory is allocated before the clock starts
        seconds["plain"].append(timed(lambda s=simulation: [forward(s, batch) for batch in batches]))  # type: ignore[misc]
        seconds["onnxruntime"].append(timed(lambda: [run(batch) for batch in batches]))
        seconds["observe"].append(timed(lambda s=simulation: observe(s, batches)))  # type: ignore[misc]
        start = time.process_time()
        answers = answer_all(simulation)
        seconds["bounds"].append(time.process_time() - start)
    middle = {key: float(np.median(found)) for key, found in seconds.items()}
    whole = middle["observe"] + middle["bounds"]
    rows: list[Row] = [
        {"network": name, "what": "float passes, torch", "CPU s": middle["plain"]},
        {"network": name, "what": "float passes, onnxruntime", "CPU s": middle["onnxruntime"]},
        {"network": name, "what": "the same pass, observed", "CPU s": middle["observe"]},
        {"network": name, "what": f"five ranges of every activation ({answers} answers)", "CPU s": middle["bounds"]},
        {"network": name, "what": "observed and answered", "CPU s": whole},
    ]
    return [{**row, "of torch's passes": row["CPU s"] / middle["plain"]} for row in rows]


def whole_quantization(name: str, with_peers: bool) -> list[Row]:
    """Float file in, quantized file out."""
    case = CASES[name]
    model = lb.load(case.file())
    calibration = case.calibration(model)
    batches = [inputs for inputs, _ in calibration.batches(1)]
    with tempfile.TemporaryDirectory(prefix="lowbit-") as text:
        folder = Path(text)
        calls: dict[str, Callable[[], object]] = {
            "lowbit": lambda: lb.quantize(model, calibration).save(folder / "lowbit.onnx")
        }
        if with_peers:
            for method in case.calibrators:
                calls[f"onnxruntime {method}"] = lambda method=method: peers.onnxruntime_static(  # type: ignore[misc]
                    case.file(), batches, folder / f"{method}.onnx", method=method
                )
            calls["NNCF"] = lambda: peers.nncf_openvino(case.file(), batches, folder / "nncf.xml")
        return [{"network": name, "quantizer": key, "CPU s": timed(call)} for key, call in calls.items()]


def memory(quantizer: str, samples: int) -> Row:
    """Peak memory of a process that quantizes with this many samples, and what it had before it started."""
    command = [sys.executable, "-m", "benchmarks.calibration", "--child", quantizer, str(samples)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    row: Row = {"quantizer": quantizer, "samples": samples}
    if done.returncode:
        return {**row, "failed": (done.stderr.strip().splitlines() or ["no message"])[-1][:120]}
    return {**row, **json.loads(done.stdout.strip().splitlines()[-1])}


def child(quantizer: str, samples: int) -> Row:
    """In the process of its own: quantize resnet20 with CIFAR-10 images."""
    torch.set_num_threads(1)
    source = FOLDER / MEMORY_NETWORK
    model = lb.load(source)
    words = IMAGENET + " layout=NCHW"
    data = lb.Data.of(FOLDER / "cifar10-train-0.npz", model.inputs, preprocess=words, limit=samples)
    next(iter(data.batches(1)))
    if quantizer == "lowbit":
        lb.quantize(model, data.take(2))  # libraries and compiled kernels are there in either case
        before = peak_megabytes()
        lb.quantize(model, data)
    else:
        before = peak_megabytes()
        with tempfile.TemporaryDirectory(prefix="lowbit-") as folder:
            batches = [inputs for inputs, _ in data.batches(1)]
            method = quantizer.split()[-1]
            peers.onnxruntime_static(source, batches, Path(folder) / "own.onnx", method=method)
    peak = peak_megabytes()
    return {"peak MB": peak, "grown by MB": peak - before}


def peak_megabytes() -> float:
    """Largest resident memory of this process so far; ru_maxrss would count that of the parent, too, after a fork."""
    status = Path("/proc/self/status")
    if not status.exists():
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) / 1024


def main(arguments_given: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--network", choices=list(CASES), default="squeezenet", help="for the times")
    parser.add_argument("--no-peers", action="store_true", help="lowbit alone")
    parser.add_argument("--json", action="store_true", help="rows as JSON")
    parser.add_argument("--child", nargs=2, metavar=("QUANTIZER", "SAMPLES"), help=argparse.SUPPRESS)
    given = parser.parse_args(arguments_given)
    if given.child:
        print(json.dumps(child(given.child[0], int(given.child[1]))))
        return
    torch.set_num_threads(1)
    show("Five ranges in one pass, 200 samples", ranges_beside_forward(given.network), given.json)
    show("Time to quantize, 200 samples", whole_quantization(given.network, not given.no_peers), given.json)
    chosen = {name: counts for name, counts in SAMPLES.items() if name == "lowbit" or not given.no_peers}
    rows = [memory(name, count) for name, counts in chosen.items() for count in counts]
    show(f"Memory while calibrating, {MEMORY_NETWORK}", rows, given.json)


if __name__ == "__main__":
    main()
