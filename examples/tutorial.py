"""The small CNN of the field's tutorials on CIFAR-10, trained in float, and in 8, 4 and 2 bits: one table.

Two convolutions (32 and 64 channels, each with a clip and 2×2 max-pool), two dense layers (64 and 10); pixels / 255,
Adam, batches of 32, 5 epochs. In few bits it trains from the first epoch, and from the float network for 5 epochs more,
on images that are moved and mirrored, as it knows them by then. "as long" is the float network after those 10 epochs.
Each figure is that of the deployed file on the test images.

    python examples/tutorial.py [--quick]     # quick: 2,000 images and one epoch
"""

import argparse
import os
from copy import deepcopy
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

import lowbit as lb
from lowbit.training.augment import crop_and_flip

FOLDER = Path(os.environ.get("LOWBIT_DATA", "../shared/data"))
RECIPES = {8: "qnnpack", 4: "w4a4-lsq", 2: "w2a2"}  # ranges follow the extremes in 8 bits, and learn in fewer
RATE = 2e-3  # Adam's
RANGE_RATE = 10  # Adam moves ranges by RATE of themselves a step: new weights would outgrow them
Samples = tuple[NDArray[np.float32], NDArray[np.int64]]


def samples(*names: str) -> Samples:
    """Images (n, 3, 32, 32) in 0 … 1 and their classes."""
    parts = [np.load(FOLDER / f"cifar10-{name}.npz") for name in names]
    images = np.concatenate([part["images"] for part in parts]).transpose(0, 3, 1, 2)
    return (images / np.float32(255)).astype(np.float32), np.concatenate([p["labels"] for p in parts]).astype(np.int64)


def network(clip: type[nn.Module] = nn.ReLU6) -> nn.Module:
    """The CNN, with weights drawn anew as ReLUs want them (He et al. 2015, arXiv 1502.01852)."""
    torch.manual_seed(0)
    module = nn.Sequential(
        *(nn.Conv2d(3, 32, 3, padding=1), clip(), nn.MaxPool2d(2)),
        *(nn.Conv2d(32, 64, 3, padding=1), clip(), nn.MaxPool2d(2)),
        *(nn.Flatten(), nn.Linear(64 * 8 * 8, 64), clip(), nn.Linear(64, 10)),
    )
    for layer in module:
        if isinstance(layer, (nn.Conv2d, nn.Linear)):
            nn.init.kaiming_uniform_(layer.weight, nonlinearity="relu")
            nn.init.zeros_(layer.bias)
    return module


def train(module: nn.Module, data: Samples, epochs: int, *, moved: bool = False) -> nn.Module:
    """An ordinary loop in float; the rate falls to 0 as a cosine, as `lb.train` lets it."""
    (x, y), generator = map(torch.from_numpy, data), torch.Generator().manual_seed(0)
    optimizer = torch.optim.Adam(module.parameters(), lr=RATE)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * (len(x) // 32))
    for _ in range(epochs):
        for rows in torch.randperm(len(x)).split(32)[: len(x) // 32]:
            optimizer.zero_grad()
            images = crop_and_flip(x[rows], generator) if moved else x[rows]
            nn.functional.cross_entropy(module(images), y[rows]).backward()
            optimizer.step()
            schedule.step()
    return module.eval()


def main(epochs: int = 5, most: int | None = None) -> dict[str, float]:
    """The rows of the table: what was trained → share of the test images that it gets right."""
    data, test = samples(*(f"train-{i}" for i in range(5 if most is None else 1))), samples("test")
    data, test = (data[0][:most], data[1][:most]), (test[0][:most], test[1][:most])
    pace = {"optimizer": "adam", "rate": RATE, "range_rate": RANGE_RATE}
    schedule = lb.Schedule(epochs=epochs, batch=32, weight_decay=0.0, **pace)
    later = replace(schedule, augment="crop-flip")
    found: dict[str, float] = {}

    def tell(row: str, model: lb.Model) -> None:
        found[row] = lb.evaluate(model, test, "top1")
        print(f"{row:<36} {100 * found[row]:6.2f} %", flush=True)

    def tell_float(row: str, module: nn.Module) -> None:
        tell(f"float, {row}", lb.load(module, torch.from_numpy(data[0][:1])))

    for clip in (nn.ReLU, nn.ReLU6):
        trained = train(network(clip), data, epochs)
        tell_float(clip.__name__, trained)
    tell_float("ReLU6, as long", train(deepcopy(trained), data, epochs, moved=True))
    for bits, recipe in RECIPES.items():
        tell(f"{bits} bits from the first epoch", lb.train(network(), data, recipe, schedule, distill=0.0))
        tell(f"{bits} bits from the float network", lb.train(trained, data, recipe, later))
    return found


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="2,000 images and one epoch")
    main(**({"epochs": 1, "most": 2000} if parser.parse_args().quick else {}))
