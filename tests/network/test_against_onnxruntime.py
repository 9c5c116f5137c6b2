"""The simulated network against onnxruntime, to 1e-4 of the output's scale: real models, and families from torch."""

import io
import os
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from network import networks
from PIL import Image
from torch import nn

from lowbit.model import Model, load
from lowbit.network.build import build
from lowbit.network.engine_node import EngineNode

TOLERANCE = 1e-4


def distance(model: Model, batch: dict[str, np.ndarray], double: bool = False) -> float:
    """Largest difference from onnxruntime on any output, in units of that output's largest value."""
    module = build(model.program).eval()
    tensors = [torch.from_numpy(batch[port.name]) for port in model.inputs]
    if double:
        module = module.double()
        tensors = [t.double() if t.is_floating_point() else t for t in tensors]
    with torch.no_grad():
        results = module(*tensors)
    wanted = model.run(batch)
    assert list(results) == list(wanted)
    return max(float(np.abs(results[k].numpy() - w).max() / np.abs(w).max()) for k, w in wanted.items())


def random_batch(model: Model, size: int, **sizes: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    batch = {}
    for port in model.inputs:
        shape = tuple(d if isinstance(d, int) else sizes.get(str(d), size) for d in port.shape)
        integers = port.dtype.kind != "f"
        batch[port.name] = rng.integers(0, 50, shape) if integers else rng.standard_normal(shape).astype(port.dtype)
    return batch


REAL = [
    "cifar10-resnet20", "cifar10-resnet32", "cifar10-resnet8-mlperf-tiny", "imagenet-squeezenet1_1", "speech/kws-dscnn",
    "imagenet-mobilenet_v1_0.25_128", "vww-mobilenet_v1_0.25_96", "text/charlstm-charlotte_bronte",
    "detection/face-RFB-320", "detection/face-slim-320",
    pytest.param("detection/deeplabv3-mobilenetv2-voc", marks=pytest.mark.slow),
]  # fmt: skip


@pytest.mark.parametrize("name", REAL)
def test_real_models_agree_with_onnxruntime(name: str, data: Path) -> None:
    model = load(data / f"{name}.onnx")
    batch = random_batch(model, size=1 if "detection" in name else 3)
    assert distance(model, batch) < TOLERANCE  # measured 1e-7 … 2e-6


@pytest.mark.slow
def test_cifar10_resnet20_agrees_on_real_images(data: Path) -> None:
    images = np.load(data / "cifar10-test.npz")["images"][:64]
    mean, std = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
    x = ((images / 255 - mean) / std).astype(np.float32).transpose(0, 3, 1, 2).copy()
    model = load(data / "cifar10-resnet20.onnx")
    assert distance(model, {model.inputs[0].name: x}) < TOLERANCE


@pytest.mark.slow
def test_yolox_agrees_on_a_real_image(data: Path) -> None:
    """In float64, so that only the operators are compared.

    This network loses four digits in float32: against float64 onnxruntime is off by 3e-5 … 1.3e-4 and torch by
    4e-5 … 1.3e-4, so two float32 runs may differ by more than 1e-4.
    """
    with zipfile.ZipFile(data / "detection" / "coco-val-sample-a.zip") as archive:
        name = next(n for n in sorted(archive.namelist()) if n.endswith(".jpg"))
        image = Image.open(io.BytesIO(archive.read(name))).convert("RGB")
    image.thumbnail((416, 416))
    pixels = np.full((416, 416, 3), 114, np.float32)
    pixels[: image.height, : image.width] = np.asarray(image)[..., ::-1]
    batch = {"images": pixels.transpose(2, 0, 1)[None].copy()}
    model = load(data / "detection" / "yolox_nano.onnx")
    assert distance(model, batch, double=True) < TOLERANCE  # measured 3.3e-5
    assert distance(model, batch) < 3 * TOLERANCE


def test_silero_agrees_and_only_its_if_runs_in_the_engine(data: Path) -> None:
    model = load(data / "speech" / "silero_vad_16k_op15.onnx")
    rng = np.random.default_rng(0)
    batch = {
        "input": rng.standard_normal((1, 576)).astype(np.float32) * 0.1,
        "state": rng.standard_normal((2, 1, 128)).astype(np.float32) * 0.1,
        "sr": np.array(16000),
    }
    assert distance(model, batch) < TOLERANCE
    engines = [m.label for m in build(model.program).modules() if isinstance(m, EngineNode)]
    assert all(label.startswith("operator If ") for label in engines)
    assert len(engines) <= 1


IMAGE = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
IDS = torch.randint(0, 50, (3, 12), generator=torch.Generator().manual_seed(0))
EXPORTED: dict[str, tuple[Callable[[], nn.Module], torch.Tensor]] = {
    "resnet": (networks.resnet, IMAGE),
    "mobilenet v2": (lambda: networks.mobilenet(nn.ReLU6, excite=False), IMAGE),
    "mobilenet v3": (lambda: networks.mobilenet(nn.Hardswish, excite=True), IMAGE),
    "u-net": (networks.UNet, IMAGE),
    "lstm": (lambda: networks.TokenClassifier(nn.LSTM), IDS),
    "gru": (lambda: networks.TokenClassifier(nn.GRU), IDS),
    "rnn": (lambda: networks.TokenClassifier(nn.RNN), IDS),
    "norms": (networks.Normalized, torch.randn(2, 4, 32, generator=torch.Generator().manual_seed(0))),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", EXPORTED)
def test_what_torch_exports_agrees_with_onnxruntime_at_another_batch(name: str) -> None:
    torch.manual_seed(0)
    make, example = EXPORTED[name]
    network = make().eval()
    model = load(network, example)
    x = torch.cat([example, example.flip(0), example])
    assert distance(model, {model.inputs[0].name: x.numpy()}) < TOLERANCE
    with torch.no_grad():
        (ours,) = build(model.program)(x).values()
        torch.testing.assert_close(ours, network(x), rtol=1e-4, atol=1e-4)


def transformer(name: str) -> tuple[nn.Module, dict[str, torch.Tensor]]:
    transformers = pytest.importorskip("transformers")
    size: dict[str, Any] = {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 64,
    }
    if name == "vit":
        config = transformers.ViTConfig(image_size=32, patch_size=8, num_labels=5, **size)
        return transformers.ViTForImageClassification(config), {"pixel_values": IMAGE[:, :, :32, :32].contiguous()}
    mask = (torch.arange(12) < torch.tensor([[12], [7], [9]])).long()
    inputs = {"input_ids": IDS, "attention_mask": mask}
    if name == "bert":
        return transformers.BertModel(transformers.BertConfig(vocab_size=50, **size)), inputs
    if name == "gpt2":
        config = transformers.GPT2Config(vocab_size=50, n_embd=32, n_layer=2, n_head=4, use_cache=False)
        return transformers.GPT2LMHeadModel(config), inputs
    config = transformers.LlamaConfig(vocab_size=50, num_key_value_heads=2, use_cache=False, **size)
    return transformers.LlamaForCausalLM(config), inputs


@pytest.mark.slow
@pytest.mark.parametrize("name", ["vit", "bert", "gpt2", "llama"])
def test_transformers_agree_with_onnxruntime(name: str) -> None:
    os.environ["HF_HUB_OFFLINE"] = "1"
    torch.manual_seed(0)
    network, inputs = transformer(name)
    model = load(network.eval(), inputs)
    batch = {port.name: inputs[port.name].numpy() for port in model.inputs}
    assert distance(model, batch) < TOLERANCE
