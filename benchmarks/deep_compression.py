"""Deep Compression on real networks: bytes on disk against accuracy, measured on the file that reopens.

    LOWBIT_DATA=../shared/data python -m benchmarks.deep_compression lenet-300-100 lenet-5 resnet20 squeezenet

LeNets are trained here (a few minutes), then compressed. Every row is a .lowbit file: its bytes, the network's float32
parameters over them, the error of the reopened file in onnxruntime on the whole test set, and where its bytes went.
Training images are shifted by a pixel (MNIST) or shifted and mirrored (CIFAR) while compressing; the float LeNets are
trained without. An interrupted run resumes.
"""

import argparse
import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from torch import Tensor, nn

import lowbit as lb
from lowbit.model import Model
from lowbit.storage.container import pack
from lowbit.storage.inspect import inspect

FOLDER = Path(os.environ.get("LOWBIT_DATA", "../shared/data"))
IMAGENET = "scale=255 mean=.485,.456,.406 std=.229,.224,.225"
Arrays = dict[str, np.ndarray]


@dataclass(frozen=True)
class Case:
    """A network, what it learns from, what it is judged on, and the compressions to try.

    settings arguments of `lb.compress`, by label
    judge    "labels": error on the test set; "agreement": share of classes that differ from the float network's
    """

    model: Callable[[Path], Model]
    training: Callable[[Model], Any]
    test: Callable[[Model], Any]
    settings: dict[str, dict[str, Any]]
    augment: Callable[[Tensor, torch.Generator], Tensor] | None = None
    judge: str = "labels"
    bar: str = ""


def shifted(images: Tensor, generator: torch.Generator, by: int) -> Tensor:
    """Each image moved by up to `by` pixels, zeros moving in."""
    count, _, height, width = images.shape
    padded = nn.functional.pad(images, (by, by, by, by))
    offsets = torch.randint(0, 2 * by + 1, (count, 2), generator=generator)
    rows = offsets[:, 0, None] + torch.arange(height)
    columns = offsets[:, 1, None] + torch.arange(width)
    return padded[torch.arange(count)[:, None, None], :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


def shifted_digits(images: Tensor, generator: torch.Generator) -> Tensor:
    return shifted(images, generator, 1)


def shifted_pictures(images: Tensor, generator: torch.Generator) -> Tensor:
    """Shifted by up to four pixels, every second one mirrored."""
    mirror = torch.rand(len(images), generator=generator) < 0.5
    return shifted(torch.where(mirror[:, None, None, None], images.flip(3), images), generator, 4)


@cache
def digits() -> dict[str, np.ndarray]:
    with np.load(FOLDER / "mnist.npz") as arrays:
        return dict(arrays)


def mnist(part: str) -> Callable[[Model], Arrays]:
    def make(model: Model) -> Arrays:
        images = digits()[f"{part}_images"].astype(np.float32)[:, None] / 255
        return {model.inputs[0].name: images, "labels": digits()[f"{part}_labels"].astype(np.int64)}

    return make


def lenet(name: str, layers: Callable[[], list[nn.Module]], epochs: int) -> Callable[[Path], Model]:
    """A float network trained with Adam, decay and a cosine; kept in the folder."""

    def make(folder: Path) -> Model:
        path = folder / f"{name}.onnx"
        if not path.exists():
            torch.manual_seed(0)
            network = nn.Sequential(*layers())
            images = torch.from_numpy(digits()["train_images"].astype(np.float32)[:, None] / 255)
            labels = torch.from_numpy(digits()["train_labels"].astype(np.int64))
            train(network, images, labels, epochs)
            lb.load(network.eval(), images[:2]).save(path)
        return lb.load(path)

    return make


def train(network: nn.Module, images: Tensor, labels: Tensor, epochs: int, batch: int = 128) -> None:
    optimizer = torch.optim.AdamW(network.parameters(), 1.5e-3, weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * (len(images) // batch))
    generator = torch.Generator().manual_seed(0)
    with Progress(transient=True) as bar:
        for _ in bar.track(range(epochs), description="training float"):
            for rows in torch.randperm(len(images), generator=generator).unfold(0, batch, batch):
                optimizer.zero_grad()
                nn.functional.cross_entropy(network(images[rows]), labels[rows]).backward()  # type: ignore[no-untyped-call]
                optimizer.step()
                schedule.step()


def fully_connected() -> list[nn.Module]:
    """LeCun et al. 1998, 300 and 100 hidden units: 266,610 parameters."""
    return [nn.Flatten(), nn.Linear(784, 300), nn.ReLU(), nn.Linear(300, 100), nn.ReLU(), nn.Linear(100, 10)]


def convolutional() -> list[nn.Module]:
    """LeNet-5 in Caffe's variant, as the paper has it: 431,080 parameters."""
    return [
        nn.Conv2d(1, 20, 5), nn.MaxPool2d(2), nn.Conv2d(20, 50, 5), nn.MaxPool2d(2), nn.Flatten(),
        nn.Linear(800, 500), nn.ReLU(), nn.Linear(500, 10),
    ]  # fmt: skip


def cifar(*parts: str) -> Callable[[Model], Any]:
    def make(model: Model) -> Any:
        batches: list[Any] = []
        for part in parts:
            path, how = FOLDER / f"cifar10-{part}.npz", IMAGENET + " layout=NCHW"
            batches += lb.Data.of(path, model.inputs, preprocess=how).batches(1000)
        images = np.concatenate([next(iter(inputs.values())) for inputs, _ in batches])
        return {model.inputs[0].name: images, "labels": np.concatenate([labels for _, labels in batches])}

    return make


def photos(first: int, count: int) -> Callable[[Model], Any]:
    """ImageNet photographs, without their labels."""

    def make(model: Model) -> Any:
        data = lb.Data.of(FOLDER / "imagenet-sample-a.zip", model.inputs, preprocess=IMAGENET, skip=first, limit=count)
        return {model.inputs[0].name: np.concatenate([next(iter(b.values())) for b, _ in data.batches(50)])}

    return make


# The float LeNets never saw a shifted digit: what they say of one is worth less than its label.
DIGITS = {"schedule": "batch=128 distill=0 prune_epochs=16 code_epochs=3 value_epochs=1"}
SMALL = {"schedule": "batch=128 distill=0 prune_epochs=6 code_epochs=2 value_epochs=0.5"}
TRAINED = {"schedule": "batch=100 code_epochs=4 rate=0.002"}


def shared(prune: float) -> lb.Recipe:
    """16 values for each weight, chosen by their bits too: 2 % of a weight's mean square is worth one bit."""
    rule = lb.Rule("*", lb.TensorSpec("codebook4:linear:0.02", solve="kmeans"), prune=prune)
    return lb.Recipe((rule,), ("recognize_operators", "fold_batchnorm", "fuse_gemm"), rest="mantissa:7")


CASES = {
    "lenet-300-100": Case(
        lenet("lenet-300-100", fully_connected, 20), mnist("train"), mnist("test"),
        {"ratio 40": {"ratio": 40}} | {f"prune {p:.1%}": DIGITS | {"prune": p} for p in (0.94, 0.96)},
        shifted_digits, bar="60x at no more error than float (paper: 40x)",
    ),
    "lenet-5": Case(
        lenet("lenet-5", convolutional, 6), mnist("train"), mnist("test"),
        {"ratio 40": {"ratio": 40}} | {f"prune {p:.1%}": SMALL | {"recipe": shared(p)} for p in (0.967, 0.98)},
        shifted_digits, bar="100x at no more error than float (paper: 39x)",
    ),
    "resnet20": Case(
        lambda _: lb.load(FOLDER / "cifar10-resnet20.onnx"), cifar("train-0", "train-1"), cifar("test"),
        {f"ratio {r}": {"ratio": r} for r in (6, 8, 10, 12, 16, 20)}
        | {f"ratio {r}, trained": TRAINED | {"ratio": r} for r in (16, 20, 24)},
        shifted_pictures, bar="16x within 0.5, 10x within 0.1 of 91.73 %",
    ),
    "squeezenet": Case(
        lambda _: lb.load(FOLDER / "imagenet-squeezenet1_1.onnx"), photos(0, 300), photos(300, 200),
        {f"ratio {r}": {"ratio": r} for r in (4, 6, 8, 10)},
        judge="agreement", bar="the curve at 4x, 6x, 8x, without labels",
    ),
}  # fmt: skip


def classes(model: Model, images: np.ndarray) -> np.ndarray:
    name = model.inputs[0].name
    parts = [next(iter(model.run({name: images[i : i + 100]}).values())) for i in range(0, len(images), 100)]
    return np.asarray(np.concatenate(parts).reshape(len(images), -1).argmax(axis=1))


def rows(name: str, case: Case, folder: Path, only: str | None) -> Iterator[dict[str, Any]]:
    """The float network, then each compression."""
    network = case.model(folder)
    test = case.test(network)
    images = test[network.inputs[0].name]
    before = classes(network, images)
    wanted = test["labels"] if case.judge == "labels" else before
    parameters = 4 * sum(v.const_value.size for v in network.program.graph.initializers.values() if v.const_value)
    packed = pack(network, folder / f"{name}.float.lowbit")
    error = 100 * float((before != wanted).mean())
    yield {"network": name, "compression": "float", "bytes": parameters, "ratio": 1.0, "error %": error}
    yield {
        "network": name,
        "compression": "float, packed",
        "bytes": packed,
        "ratio": parameters / packed,
        "error %": error,
    }
    training = case.training(network)
    for label, settings in case.settings.items():
        if only is not None and label != only:
            continue
        stem = f"{name} {label}".replace(" ", "-").replace("%", "").replace(",", "")
        path = folder / f"{stem}.lowbit"
        if not path.exists():
            with Progress(transient=True) as bars:
                tasks: dict[str, Any] = {}

                def show(
                    phase: str, done: int, total: int, bars: Progress = bars, tasks: dict[str, Any] = tasks
                ) -> None:
                    tasks[phase] = tasks[phase] if phase in tasks else bars.add_task(phase, total=total)
                    bars.update(tasks[phase], completed=done)

                small = lb.compress(
                    network, training, **settings, checkpoint=folder / f"{stem}.state", progress=show,
                    augment=case.augment,
                )  # fmt: skip
                pack(small, path)
        report = inspect(path)
        error = 100 * float((classes(lb.load(path), images) != wanted).mean())
        weights = [t for t in report.tensors if t.type in ("uint4", "uint8")]
        zeros = sum(t.sparsity * t.elements for t in weights) / max(1, sum(t.elements for t in weights))
        yield {
            "network": name, "compression": label, "bytes": report.size, "ratio": parameters / report.size,
            "error %": error, "zeros": f"{zeros:.1%}", **report.bytes_by_use,
        }  # fmt: skip


def main(words: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("networks", nargs="*", metavar="NETWORK", help=", ".join(CASES))
    parser.add_argument("--folder", type=Path, default=Path("build/deep_compression"), help="where files are kept")
    parser.add_argument("--only", help="one compression of those listed")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args(words)
    arguments.folder.mkdir(parents=True, exist_ok=True)
    for name in arguments.networks or list(CASES):
        found = list(rows(name, CASES[name], arguments.folder, arguments.only))
        if arguments.json:
            print(json.dumps(found, indent=1))
            continue
        table = Table(title=f"{name}: {CASES[name].bar}", title_justify="left")
        for column in (columns := list(dict.fromkeys(key for row in found for key in row))):
            table.add_column(column, justify="left" if column in ("network", "compression") else "right")
        for row in found:
            table.add_row(*(f"{v:.2f}" if isinstance(v := row.get(c, ""), float) else str(v) for c in columns))
        Console(width=140).print(table)


if __name__ == "__main__":
    main()
