"""A binary network for MNIST, trained and deployed: weights of two values, activations of one bit, 8 bits at both ends.

Weights by XNOR-Net (sign and mean magnitude), activations 0 or 1 times a step that learns (LSQ).

    python examples/binary.py [--quick]     # quick: 5,000 images and two epochs
"""

import argparse
import os
from pathlib import Path

import numpy as np
import torch
from torch import nn

import lowbit as lb
from lowbit.recipe import Recipe, Rule, TensorSpec

FOLDER = Path(os.environ.get("LOWBIT_DATA", "../shared/data"))
END = TensorSpec("int8 channel:0", "ema:minmax"), TensorSpec("uint8", "ema:minmax")
RECIPE = Recipe(
    (
        Rule("*", TensorSpec("binary channel:0", "xnor"), TensorSpec("uint1", "lsq")),
        Rule("at:input", *END),
        Rule("at:output", *END),
    ),
    ("simplify_reshapes", "fold_batchnorm", "fuse_gemm"),
)


def network(width: int = 64) -> nn.Module:
    """Three convolutions with batch norms, and a dense layer."""

    def layer(inputs: int, outputs: int, stride: int) -> list[nn.Module]:
        return [nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()]

    torch.manual_seed(0)
    return nn.Sequential(
        *layer(1, width, 2),
        *layer(width, width, 2),
        *layer(width, 2 * width, 2),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2 * width, 10)),
    )


def main(folder: Path = Path("build"), epochs: int = 5, most: int | None = None) -> float:
    """Share of the test images that the deployed file gets right."""
    folder.mkdir(exist_ok=True)
    digits = np.load(FOLDER / "mnist.npz")

    def part(name: str) -> tuple[np.ndarray, np.ndarray]:
        images = digits[f"{name}_images"][:most, None] / np.float32(255)
        return images.astype(np.float32), digits[f"{name}_labels"][:most].astype(np.int64)

    schedule = lb.Schedule(epochs=epochs, batch=100, optimizer="adam", rate=3e-3, weight_decay=0.0, distill=0.0)
    model = lb.train(network(), part("train"), RECIPE, schedule)
    reached = lb.evaluate(model, part("test"), "top1")
    model.save(folder / "binary.onnx")
    print(f"{100 * reached:.2f} % of the test images, {(folder / 'binary.onnx').stat().st_size:,} bytes")
    return reached


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="5,000 images and two epochs")
    main(**({"epochs": 2, "most": 5000} if parser.parse_args().quick else {}))
