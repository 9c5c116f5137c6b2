"""Training in several processes is training in one, and a worker that is killed costs nothing but time."""

import hashlib
import os
import re
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from in_processes import torchrun
from test_train import LSQ2, as_bytes, data, floats, trained
from toy_networks import convolutions, images

from lowbit import processes
from lowbit.network.calibrate import observe
from lowbit.network.network import Network
from lowbit.network.place import place
from lowbit.presets import RECIPES
from lowbit.ranges import MSE, MovingAverage
from lowbit.recipe import Recipe, Rule, TensorSpec
from lowbit.training.checkpoints import Checkpoints

pytestmark = pytest.mark.slow
SCRIPT = "from test_train_in_processes import run; run()"


def run() -> None:
    """What each process does; the one with the number 1 is killed once where the command line says so."""
    torch.set_num_threads(1)
    Checkpoints.__init__.__defaults__ = (0.0, *Checkpoints.__init__.__defaults__[1:])  # type: ignore[index]
    once, is_victim = Path("killed"), os.environ["RANK"] == "1" and "kill" in sys.argv

    def told(phase: str, done: int, total: int, note: str) -> None:
        if phase == "training" and processes.number() == 0:
            print(f"step {done}: {note.rpartition(' ')[2]}", flush=True)
        if is_victim and (phase, done) == ("training", 11) and not once.exists():
            once.write_text("")
            os.kill(os.getpid(), signal.SIGKILL)

    with processes.joined():
        print(f"ranges {ranges()}", flush=True)
        small = training(told, Path("run.state"))
        print(f"file {hashlib.sha256(small).hexdigest()}", flush=True)
        Path("run.state").unlink(missing_ok=True)


def training(told: Callable[..., None], checkpoint: Path | None) -> bytes:
    model, test = floats(), data(100, seed=1)
    judged = {model.inputs[0].name: test["x"], "labels": test["labels"]}
    ema = Recipe((Rule("*", TensorSpec("int4 channel:0", "lsq"), TensorSpec("uint4", "ema")),), LSQ2.passes)
    options = {"test": judged, "progress": told, "augment": "crop-flip", "checkpoint": checkpoint}
    return as_bytes(trained(model, **options)) + as_bytes(trained(model, epochs=1, recipe=ema))


def ranges() -> str:
    """A hash of what calibration on 7 batches has seen."""
    model, pixels = convolutions(), images(56)
    network = Network(model.program, place(model.program, RECIPES["int8"]()))
    assert observe(network, [{model.inputs[0].name: pixels[i : i + 8]} for i in range(0, 56, 8)]) == 7
    said = hashlib.sha256()
    for _, quantizer in sorted(network.activations().items()):
        seen = quantizer.statistics
        bounds = [bound for kind in (MovingAverage(), MSE()) for bound in kind.bounds(seen, quantizer.format)]
        for array in (seen.seen.counts, *(tensor.numpy() for tensor in (seen.minimum, seen.maximum, *bounds))):
            said.update(array.tobytes())
    return said.hexdigest()


def said(told: str, what: str) -> list[str]:
    """Hashes that processes printed; their lines may run into each other."""
    return re.findall(rf"{what} ([0-9a-f]{{64}})", told)


def losses(told: str) -> list[float]:
    return [float(number) for number in re.findall(r"step \d+: (\d+\.\d{5})", told)]


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> str:
    return torchrun(2, SCRIPT, tmp_path_factory.mktemp("two"))


@pytest.mark.parametrize("count", [2, 4])
def test_losses_and_ranges_of_several_processes_are_those_of_one(count: int, two: str, tmp_path: Path) -> None:
    alone: list[float] = []

    def note_loss(phase: str, done: int, total: int, note: str) -> None:
        if phase == "training":
            alone.append(float(note.rpartition(" ")[2]))

    training(note_loss, None)
    told = two if count == 2 else torchrun(count, SCRIPT, tmp_path)
    assert said(told, "ranges") == [ranges()] * count  # bit for bit
    assert len(losses(told)) == 16
    assert losses(told) == pytest.approx(alone, abs=1e-4)  # measured 0.00000
    assert said(told, "file") == said(told, "file")[:1] * count


def test_a_run_whose_worker_is_killed_ends_with_the_same_file(two: str, tmp_path: Path) -> None:
    told = torchrun(2, SCRIPT, tmp_path, "--max-restarts=1", arguments=("kill",))
    assert (tmp_path / "killed").exists()
    assert losses(told)[:10] == losses(two)[:10]
    assert said(told, "file") == said(two, "file")


MAPPED = """
import os, numpy as np, torch
from lowbit import processes
from lowbit.errors import DataError
from lowbit.training.samples import Samples

def batches():
    open(f"read-by-{os.environ['RANK']}", "w").close()
    for i in range(5):
        yield {"x": np.full((4, 3), i, np.float32)}, np.arange(4) + 4 * i

def broken():
    yield from [({"x": np.zeros((2, 5), np.float32)}, np.zeros(2, int)), ({"x": np.zeros((2, 3))}, np.zeros(2, int))]

with processes.joined():
    samples = Samples.of(batches())
    part = samples.take(torch.tensor([19, 4]))
    maps = open("/proc/self/maps").read().count("lowbit-") if os.path.exists("/proc/self/maps") else 2
    said = f"{len(samples)} {part.inputs[0].tolist()} {part.labels.tolist()} {maps}"
    try:
        Samples.of(broken())
    except DataError as error:
        said += f" {error}"
    open(f"said-by-{os.environ['RANK']}", "w").write(said)
"""


def test_one_process_reads_the_samples_and_all_map_them(tmp_path: Path) -> None:
    torchrun(2, MAPPED, tmp_path)
    assert [path.name for path in tmp_path.glob("read-by-*")] == ["read-by-0"]
    for process in (0, 1):  # none waits for one that failed
        told = (tmp_path / f"said-by-{process}").read_text()
        assert told.startswith(
            "20 [[4.0, 4.0, 4.0], [1.0, 1.0, 1.0]] [19, 4] 2 'x' has samples of shape [3] and of [5]"
        )
