"""Training in few bits on CIFAR-10: what the methods reach on one schedule, and what a step costs.

    python -m benchmarks.training methods [--epochs 10] [--output folder]   # one row a method: the deployed file
    python -m benchmarks.training run w2a2 [--epochs 10] [--rate 0.02] [--network resnet8]  # one recipe
    python -m benchmarks.training steps                                     # needs `pip install brevitas` for its row

Needs the CIFAR-10 files and the networks in LOWBIT_DATA. The last 2,000 training images are left out of training:
settings were chosen on them. Test images are looked at once, at the end. With --output a run that was stopped goes on
from its checkpoint; rows of `methods` whose file is there are evaluated only.
"""

import argparse
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

import lowbit as lb
from benchmarks.networks import FOLDER
from benchmarks.timing import alternating
from lowbit.recipe import FLOAT, PREPARE, Recipe, Rule, TensorSpec

NETWORKS = {"resnet20": "cifar10-resnet20.onnx", "resnet8": "cifar10-resnet8-mlperf-tiny.onnx"}
RAW = ("resnet8",)  # take pixels of 0 … 255
MEAN, STD = np.array([0.485, 0.456, 0.406], np.float32), np.array([0.229, 0.224, 0.225], np.float32)
HELD_OUT = 2000
BATCH = 128
ROUNDS = 10
Samples = tuple[NDArray[np.float32], NDArray[np.int64]]


def whole_apot(bits: int) -> lb.Format:
    """APoT's values as whole numbers up to 127: integer kernels compute with these as they are."""
    values = lb.AdditivePow2(bits).values()
    factor = next(n for n in range(127, 0, -1) if np.allclose(values * n, np.rint(values * n)))
    return lb.Format(lb.Codebook(tuple(float(v) for v in np.rint(values * factor))), lb.channel(0))


lb.FORMATS.update({f"whole-apot{bits}": whole_apot(bits) for bits in (2, 4)})
# Method → weights and activations in so many bits. A basis is no integer: layers with it compute in float (LQ-Nets).
METHODS: dict[str, Callable[[int], tuple[TensorSpec, TensorSpec]]] = {
    "LSQ": lambda bits: (TensorSpec(f"lloyd{bits} channel:0", "lsq"), TensorSpec(f"uint{bits}", "lsq")),
    "PACT": lambda bits: (TensorSpec(f"lloyd{bits} channel:0", "dorefa"), TensorSpec(f"uint{bits}", "pact")),
    "DoReFa": lambda bits: (TensorSpec(f"lloyd{bits} channel:0", "dorefa"), TensorSpec(f"uint{bits}", "dorefa")),
    "LQ-Nets": lambda bits: (TensorSpec(f"bases{bits} channel:0", "lqnets"), FLOAT),
    "APoT": lambda bits: (TensorSpec(f"whole-apot{bits} channel:0", "apot"), TensorSpec(f"uint{bits}", "lsq")),
}


def samples(network: str, *names: str) -> Samples:
    """Images as the network takes them, and their classes."""
    parts = [np.load(FOLDER / f"cifar10-{name}.npz") for name in names]
    images = np.concatenate([part["images"] for part in parts]).astype(np.float32)
    labels = np.concatenate([part["labels"] for part in parts]).astype(np.int64)
    pixels = images if network in RAW else (images / 255 - MEAN) / STD
    return np.ascontiguousarray(pixels.transpose(0, 3, 1, 2)), labels


def recipe(bits: int, method: str) -> Recipe:
    """The preset `w2a2`, by another method."""
    weights, activations = METHODS[method](bits)
    wide = TensorSpec("uint8", "ema:minmax")
    end = TensorSpec("int8 channel:0", "ema:minmax"), wide
    rules = Rule("*", weights, activations), Rule("at:residual", None, wide), Rule("at:input", *end)
    return Recipe((*rules, Rule("at:output", *end)), (*PREPARE, "split_residuals"))


def run(chosen: "str | Recipe", settings: argparse.Namespace, output: Path | None = None) -> float:
    """Train, deploy; share of the test images that the file gets right."""
    images, labels = samples(settings.network, *(f"train-{i}" for i in range(5)))
    count = min(settings.samples, len(images) - HELD_OUT)
    held_out = images[-HELD_OUT:], labels[-HELD_OUT:]
    schedule = lb.Schedule(
        epochs=settings.epochs, rate=settings.rate, warm_up=0.1, augment="crop-flip", channels_last=True
    )
    told: Callable[[str, int, int, str], None] = lambda phase, done, total, note: (  # noqa: E731
        print(f"    {note}", flush=True) if phase == "epoch" else None
    )
    checkpoint = None if output is None else output.with_name(f"{output.name}.state")
    trained = lb.train(
        *(lb.load(FOLDER / NETWORKS[settings.network]), (images[:count], labels[:count]), chosen, schedule),
        test=held_out,
        progress=told,
        checkpoint=checkpoint,
    )
    if output is not None:
        trained.save(output)
    return lb.evaluate(trained, samples(settings.network, "test"), "top1")


def methods(settings: argparse.Namespace) -> None:
    """The methods side by side."""
    if settings.output is not None:
        settings.output.mkdir(parents=True, exist_ok=True)
    print(
        f"{settings.epochs:g} epochs of {min(settings.samples, 50000 - HELD_OUT)} images, deployed files, test images"
    )
    for bits in (4, 2):
        for method in METHODS:
            activations = "float" if METHODS[method](bits)[1] == FLOAT else bits
            output = settings.output and settings.output / f"{method.lower()}-{bits}-{activations}.onnx"
            if output is not None and output.exists():
                share = lb.evaluate(lb.load(output), samples(settings.network, "test"), "top1")
            else:
                share = run(recipe(bits, method), settings, output)
            print(f"{method:<8} {bits}/{activations:<5} {100 * share:6.2f} %", flush=True)


# ---- what a step costs -------------------------------------------------------------------------------------------


class Block(nn.Module):
    """Two convolutions and a shortcut without weights; `quantizing` makes the parts."""

    def __init__(self, make: "Parts", into: int, out: int) -> None:
        super().__init__()
        stride = out // into
        self.into, self.out = into, out
        self.body = nn.Sequential(
            *(make.conv(into, out, stride), nn.BatchNorm2d(out), make.relu()),
            *(make.conv(out, out, 1), nn.BatchNorm2d(out)),
        )
        self.relu = make.relu()

    def forward(self, x: Tensor) -> Tensor:
        short, rest = x, (self.out - self.into) // 2
        if rest:
            short = functional.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, rest, rest))
        y: Tensor = self.relu(self.body(x) + short)
        return y


class Parts:
    """What a ResNet-20 is made of: torch's own."""

    def conv(self, into: int, out: int, stride: int) -> nn.Module:
        return nn.Conv2d(into, out, 3, stride, 1, bias=False)

    def relu(self) -> nn.Module:
        return nn.ReLU()


class Brevitas(Parts):
    """Brevitas's fake-quantized ones: 4 bits, scales of activations learn."""

    def __init__(self) -> None:
        self.layers: Any = import_module("brevitas.nn")
        self.weights = import_module("brevitas.quant").Int8WeightPerChannelFloat

    def conv(self, into: int, out: int, stride: int) -> nn.Module:
        kinds = {"weight_quant": self.weights, "weight_bit_width": 4}
        made: nn.Module = self.layers.QuantConv2d(into, out, 3, stride=stride, padding=1, bias=False, **kinds)
        return made

    def relu(self) -> nn.Module:
        made: nn.Module = self.layers.QuantReLU(bit_width=4)
        return made


def resnet20(make: Parts) -> nn.Module:
    torch.manual_seed(0)
    blocks, channels = [], 16
    for width in (16, 16, 16, 32, 32, 32, 64, 64, 64):
        blocks.append(Block(make, channels, width))
        channels = width
    stem = make.conv(3, 16, 1), nn.BatchNorm2d(16), make.relu()
    return nn.Sequential(*stem, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10))


def stepper(module: nn.Module, x: Tensor, y: Tensor, bfloat16: bool) -> Callable[[], None]:
    """One step of SGD."""
    module.train()
    optimizer = torch.optim.SGD(module.parameters(), lr=0.01, momentum=0.9)

    def step() -> None:
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=bfloat16):
            loss = functional.cross_entropy(module(x), y)
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()

    return step


def kept_bytes(module: nn.Module, x: Tensor) -> int:
    """Parameters, and all that a forward pass keeps for the backward one; each storage once."""
    found = {p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for p in module.parameters()}
    held = []

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        found[storage.data_ptr()] = storage.nbytes()
        held.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        module(x)
    return sum(found.values())


def steps(_: Any) -> None:
    """A step of batch 128 in float, with our quantizers and with Brevitas's, in turn: median processor time."""
    x, y = torch.randn(BATCH, 3, 32, 32), torch.randint(10, (BATCH,))
    modules = {"float": resnet20(Parts())}
    modules["lowbit w4a4-lsq"] = lb.prepare(resnet20(Parts()), x, "w4a4-lsq", calibration=x.numpy())
    try:
        modules["Brevitas 4/4"] = resnet20(Brevitas())
    except ImportError:
        print("Brevitas is not installed: no row of it.")
    for bfloat16 in (False, True):
        calls = {name: stepper(module, x, y, bfloat16) for name, module in modules.items()}
        medians = alternating(calls, seconds=0.0, least_rounds=ROUNDS)
        with torch.autocast("cpu", torch.bfloat16, enabled=bfloat16):
            memory = {name: kept_bytes(module, x) / 1e6 for name, module in modules.items()}
        print(
            f"batch {BATCH}, {torch.get_num_threads()} threads, {'bfloat16' if bfloat16 else 'float32'}: "
            f"median processor time of {ROUNDS} steps"
        )
        for name, value in medians.items():
            print(
                f"{name:<18}{value:8.0f} ms {value / medians['float']:5.2f}×{memory[name]:8.0f} MB "
                f"{memory[name] / memory['float']:5.2f}×"
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("methods", "run", "steps"))
    parser.add_argument("recipe", nargs="?", default="w4a4-lsq", help="of run: a preset or a TOML file")
    parser.add_argument("--network", choices=NETWORKS, default="resnet20")
    parser.add_argument("--epochs", type=float, default=10)
    parser.add_argument("--rate", type=float, default=0.02)
    parser.add_argument("--samples", type=int, default=50000)
    parser.add_argument("--output", type=Path, help="of run: where to write the file; of methods: a folder of files")
    settings = parser.parse_args()
    if settings.what == "run":
        print(f"{settings.recipe}: {100 * run(settings.recipe, settings, settings.output):.2f} % of the test images")
    else:
        {"methods": methods, "steps": steps}[settings.what](settings)


if __name__ == "__main__":
    main()
