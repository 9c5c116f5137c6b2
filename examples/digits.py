"""From a torch module to a verified int8 file, and to one ten times smaller: what `make demo` runs, in a minute.

Needs scikit-learn for its digits: 1,797 images of 8×8 pixels, 1,000 to train, 200 of these to calibrate (no labels),
the other 797 to compare.
"""

from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.datasets import load_digits
from torch import nn

import lowbit as lb

TRAINING, CALIBRATION = 1000, 200
Images = NDArray[np.float32]
Labels = NDArray[np.int64]


def digits() -> tuple[Images, Labels]:
    """Images (1797, 1, 8, 8) in 0 … 1 and their digits, shuffled."""
    found = load_digits()
    order = np.random.default_rng(0).permutation(len(found.target))
    images = (found.images / 16).astype(np.float32)[:, None]
    return images[order], found.target[order].astype(np.int64)


def network(width: int = 64) -> nn.Module:
    """A small convolutional network with batch norms."""

    def layer(inputs: int, outputs: int, stride: int = 1) -> list[nn.Module]:
        convolution = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        return [convolution, nn.BatchNorm2d(outputs), nn.ReLU()]

    return nn.Sequential(
        *layer(1, width),
        *layer(width, width),
        *layer(width, 2 * width, stride=2),
        *layer(2 * width, 2 * width),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(2 * width, 10),
    )


def train(module: nn.Module, images: Images, labels: Labels, epochs: int = 12) -> nn.Module:
    """Train in place, an ordinary loop; lowbit takes no part in it."""
    torch.manual_seed(0)
    x, y = torch.from_numpy(images), torch.from_numpy(labels)
    optimizer = torch.optim.AdamW(module.parameters(), lr=2e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-2, total_steps=epochs * -(-len(x) // 50))
    module.train()
    for epoch in range(epochs):
        total = 0.0
        for rows in torch.randperm(len(x)).split(50):
            loss = nn.functional.cross_entropy(module(x[rows]), y[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            total += loss.item() * len(rows)
        print(f"epoch {epoch + 1:2d} of {epochs}: loss {total / len(x):.4f}")
    return module.eval()


def main(folder: Path = Path("build"), epochs: int = 12) -> lb.Comparison:
    """Train, quantize, compare; compress, compare. Both comparisons are printed, the first is returned."""
    torch.manual_seed(0)
    images, labels = digits()
    module = train(network(), images[:TRAINING], labels[:TRAINING], epochs)

    folder.mkdir(exist_ok=True)
    model = lb.load(module, torch.from_numpy(images[:1]))
    quantized = lb.quantize(model, images[:CALIBRATION])
    model.save(folder / "digits.onnx")
    quantized.save(folder / "digits.int8.onnx")

    test = (images[TRAINING:], labels[TRAINING:])
    report = lb.compare(folder / "digits.onnx", folder / "digits.int8.onnx", test, metric="top1", layers=False)
    print(f"\n{report}")

    small = lb.compress(model, images[:CALIBRATION], ratio=10)
    lb.pack(small, folder / "digits.lowbit")
    print(f"\n{lb.compare(folder / 'digits.onnx', folder / 'digits.lowbit', test, metric='top1', layers=False)}")
    return report


if __name__ == "__main__":
    main()
