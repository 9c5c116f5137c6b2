"""The trained networks, each with unlabelled samples to calibrate on and others to evaluate; in the folder LOWBIT_DATA.

Nothing that a network is evaluated on is calibrated on. Where a network's own data are too few to split, photographs
calibrate: those of COCO that it is not evaluated on, then ImageNet's.
"""

import contextlib
import io
import os
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
from examples import characters, detection, faces, persons, segmentation, sentences, voice_activity
from PIL import Image

import lowbit as lb

FOLDER = Path(os.environ.get("LOWBIT_DATA", "../shared/data"))
CALIBRATION = 200  # samples
PHOTOS = FOLDER / "imagenet-sample-a.zip"
COCO = {
    "segments": FOLDER / "detection/seg-coco-val-sample-a.zip",
    "boxes": FOLDER / "detection/coco-val-sample-a.zip",
}
IMAGENET = "scale=255 mean=.485,.456,.406 std=.229,.224,.225"
Maker = Callable[[lb.Model], lb.Data]


@dataclass(frozen=True)
class Case:
    """A network, its data, and how one judges it.

    metric       a name of lowbit's metrics or a function of (outputs, labels); None: only closeness to float
    output       the output whose agreement and signal-to-noise are shown; None: the first
    percent      the metric is a share that one reads in percent
    bar          what must be reached, in words
    transformer  as NNCF wants to be told
    calibrators  of onnxruntime; all but MinMax keep every activation of every sample in memory, tens of GB if large
    """

    file: Callable[[], Path]
    calibration: Maker
    evaluation: Maker
    metric: Any = "top1"
    output: str | None = None
    percent: bool = True
    bar: str = ""
    transformer: bool = False
    calibrators: tuple[str, ...] = ("MinMax", "Entropy", "Percentile")


def _at(name: str) -> Callable[[], Path]:
    return lambda: FOLDER / name


def _data(source: Any, preprocess: str | None = None, skip: int = 0, limit: int | None = CALIBRATION) -> Maker:
    return lambda model: lb.Data.of(source, model.inputs, preprocess=preprocess, skip=skip, limit=limit)


def _cifar(name: str, preprocess: str, bar: str) -> Case:
    train, test = (_data(FOLDER / f"cifar10-{part}.npz", preprocess + " layout=NCHW", limit=limit)
                   for part, limit in (("train-0", CALIBRATION), ("test", None)))  # fmt: skip
    return Case(_at(f"cifar10-{name}.onnx"), train, test, bar=bar)


def _imagenet(name: str, preprocess: str, bar: str) -> Case:
    rest = _data(PHOTOS, preprocess, skip=CALIBRATION, limit=None)
    return Case(_at(f"imagenet-{name}.onnx"), _data(PHOTOS, preprocess), rest, bar=bar)


def _photographs(evaluated: str, preprocess: str) -> Callable[[], Iterator[np.ndarray]]:
    """The COCO images that are not in the `evaluated` archive, then those of ImageNet, prepared one by one."""
    prepare = lb.Preprocessing.parse(preprocess)

    def images() -> Iterator[np.ndarray]:
        taken = {Path(name).name for name in zipfile.ZipFile(COCO[evaluated]).namelist()}
        for archive in (*COCO.values(), PHOTOS):
            with zipfile.ZipFile(archive) as file:
                for name in sorted(n for n in file.namelist() if n.endswith((".jpg", ".JPEG"))):
                    if Path(name).name not in taken:
                        pixels = np.asarray(Image.open(io.BytesIO(file.read(name))).convert("RGB"))
                        yield prepare.images(pixels[None])[0].astype(np.float32)

    return images


def _keywords() -> Iterator[tuple[np.ndarray, np.ndarray]]:
    with np.load(FOLDER / "speech/kws-features.npz") as arrays:
        features = (arrays["features_int8"].astype(np.float32) - arrays["zero_point"]) * arrays["scale"]
        yield from zip(features.astype(np.float32), arrays["labels"], strict=True)


def _frames(calibration: bool) -> Iterator[Any]:
    """Every ninth frame of the recording calibrates, the others are evaluated."""
    for index, frame in enumerate(voice_activity.frames()):
        if (index % 9 == 0) == calibration:
            yield frame[0] if calibration else frame


def _face_images(calibration: bool) -> Iterator[Any]:
    """Every second image calibrates, the others are evaluated."""
    for index, (image, labels) in enumerate(faces.images()):
        if (index % 2 == 0) == calibration:
            yield image if calibration else (image, labels)


@cache
def minilm() -> Path:
    """The sentence network, exported once in a process."""
    path = Path(tempfile.mkdtemp(prefix="lowbit-")) / "minilm.onnx"
    with contextlib.redirect_stdout(sys.stderr):
        sentences.export(str(path))
    return path


CASES: dict[str, Case] = {
    "resnet20": _cifar("resnet20", IMAGENET, "within 0.1 of float"),
    "resnet32": _cifar("resnet32", IMAGENET, "within 0.1 of float"),
    "resnet8": _cifar("resnet8-mlperf-tiny", "scale=1", ""),
    "kws": Case(
        _at("speech/kws-dscnn.onnx"),
        _data(_keywords),
        _data(_keywords, skip=CALIBRATION, limit=None),
        bar="agree 99.2, 33 dB",
    ),
    "squeezenet": _imagenet("squeezenet1_1", IMAGENET, "agree 95.0, 33.5 dB"),
    "mobilenet": _imagenet("mobilenet_v1_0.25_128", "size=128 scale=127.5 mean=1", "agree 78.9, 14.5 dB"),
    "vww": Case(
        _at("vww-mobilenet_v1_0.25_96.onnx"),
        _data(_photographs("boxes", "size=96 scale=255")),
        _data(persons.images, limit=None),
    ),
    "yolox": Case(
        _at("detection/yolox_nano.onnx"),
        _data(_photographs("boxes", "size=416 fit=letterbox-corner fill=114 color=BGR")),
        _data(detection.images, limit=None),
        detection.ap50,
        calibrators=("MinMax",),
        bar="within 1 % of float",
    ),
    "deeplab": Case(
        _at("detection/deeplabv3-mobilenetv2-voc.onnx"),
        _data(_photographs("segments", "size=513 fit=letterbox-corner scale=127.5 mean=1 fill=127.5")),
        _data(segmentation.images, limit=None),
        segmentation.miou,
        calibrators=("MinMax",),
        bar="within 1 % of float",
    ),
    "faces": Case(
        _at("detection/face-RFB-320.onnx"),
        _data(partial(_face_images, True)),
        _data(partial(_face_images, False), limit=None),
        faces.same_decisions,
        bar="within 1 % of float",
    ),
    "voice": Case(
        _at("speech/silero_vad_16k_op15.onnx"),
        _data(partial(_frames, True), limit=None),
        _data(partial(_frames, False), limit=None),
        voice_activity.same_decisions,
        bar="within 1 % of float",
    ),
    "minilm": Case(
        minilm,
        _data(sentences.calibration, limit=None),
        _data(sentences.pairs, limit=None),
        sentences.rank_correlation,
        percent=False,
        bar="0.820, cosine 0.99",
        transformer=True,
        calibrators=("MinMax",),
    ),
    "charlstm": Case(
        _at("text/charlstm-charlotte_bronte.onnx"),
        _data(characters.calibration),
        _data(characters.evaluation, limit=None),
        "bits-per-token",
        percent=False,
    ),
}

__all__ = ["CALIBRATION", "CASES", "FOLDER", "Case", "minilm"]
