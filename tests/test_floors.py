"""Floors under real networks: the default recipe, some hundred samples without labels, the saved file in onnxruntime.

Each floor is the bar that the network has to clear, and the number behind it is what was measured.
"""

from pathlib import Path

import pytest

import lowbit as lb

pytestmark = pytest.mark.slow

IMAGENET = "scale=255 mean=.485,.456,.406 std=.229,.224,.225"
CIFAR = f"{IMAGENET} layout=NCHW"


def compared(
    folder: Path,
    saved: Path,
    name: str,
    calibration: str,
    test: str,
    preprocess: str | None,
    recipe: str = "int8",
    limit: int | None = None,
) -> lb.Comparison:
    """Float and saved quantized file on samples that took no part in calibration."""
    model = lb.load(folder / f"{name}.onnx")
    few = lb.Data.of(folder / calibration, model.inputs, preprocess=preprocess, limit=200)
    lb.quantize(model, few, recipe).save(saved)
    skip = 200 if test == calibration else 0
    samples = lb.Data.of(folder / test, model.inputs, preprocess=preprocess, skip=skip, limit=limit)
    return lb.compare(folder / f"{name}.onnx", saved, samples, metric="top1", layers=False, latency=False, batch=50)


def test_resnet20_is_within_a_tenth_of_a_point_of_float_on_all_of_cifar10(data, tmp_path):
    found = compared(data, tmp_path / "net.onnx", "cifar10-resnet20", "cifar10-train-0.npz", "cifar10-test.npz", CIFAR)
    assert found.reference.metric == pytest.approx(0.9173, abs=1e-4)
    assert found.drop <= 0.1  # points; measured -0.07: 91.80 %
    assert found.outputs[0].sqnr_db > 30.5  # 31.5
    assert found.times_smaller > 3.4  # 3.47; the largest part of the rest is what a node and its names weigh


def test_keyword_spotting_keeps_its_answers(data, tmp_path):
    features = "speech/kws-features.npz"
    found = compared(data, tmp_path / "net.onnx", "speech/kws-dscnn", features, features, None)
    assert found.agreement >= 0.985  # measured 0.990: 8 of 800 answers changed, and 99.2 is the aim
    assert found.outputs[0].sqnr_db > 33  # 34.0


def test_squeezenet_keeps_its_answers(data, tmp_path):
    photos = "imagenet-sample-a.zip"
    found = compared(data, tmp_path / "net.onnx", "imagenet-squeezenet1_1", photos, photos, IMAGENET)
    assert found.agreement >= 0.95  # measured 0.957
    assert found.outputs[0].sqnr_db > 33.5  # 35.3


def test_a_mobilenet_of_a_quarter_of_the_width_keeps_its_answers(data, tmp_path):
    """Quantizers that leave the channels of depthwise layers unequal reach 78.9 % and 14.5 dB here."""
    photos = "imagenet-sample-a.zip"
    found = compared(
        *(data, tmp_path / "net.onnx", "imagenet-mobilenet_v1_0.25_128", photos, photos),
        "size=128 scale=127.5 mean=1",
    )
    assert found.agreement >= 0.895  # measured 0.913
    assert found.outputs[0].sqnr_db > 20  # 21.8


def test_resnet20_with_4_bit_weights_keeps_its_accuracy(data, tmp_path):
    """All 10,000 images: of 2,000 each is 0.05 points. Rounded to nearest it has 90.43 % and 12.4 dB."""
    files = "cifar10-resnet20", "cifar10-train-0.npz", "cifar10-test.npz"
    found = compared(data, tmp_path / "net.onnx", *files, CIFAR, "w4a8", limit=None)
    assert found.reference.metric == pytest.approx(0.9173, abs=1e-4)
    assert found.drop <= 0.1  # points; measured -0.03: 91.76 %
    assert found.agreement >= 0.98  # measured 0.9866
    assert found.outputs[0].sqnr_db > 23.5  # 24.5


def test_squeezenet_with_4_bit_weights_is_a_network_still(data, tmp_path):
    """Rounded to nearest it answers 9.7 % of the photos right. The quick recipe: `w4a8` takes minutes here."""
    photos = "imagenet-sample-a.zip"
    found = compared(data, tmp_path / "net.onnx", "imagenet-squeezenet1_1", photos, photos, IMAGENET, "w4a8-fast")
    assert found.agreement >= 0.79  # measured 0.807
    assert found.outputs[0].sqnr_db > 21.5  # 22.4
