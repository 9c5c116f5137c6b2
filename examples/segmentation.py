"""DeepLab on COCO images: what `--data examples/segmentation.py:images --metric examples/segmentation.py:miou` means.

Reads detection/seg-coco-val-sample-a.zip (images and masks of the 21 VOC classes) in the folder LOWBIT_DATA.
"""

import io
import os
import zipfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image

ARCHIVE = Path(os.environ.get("LOWBIT_DATA", "../shared/data")) / "detection" / "seg-coco-val-sample-a.zip"
SIDE, CLASSES, UNLABELLED = 513, 21, 255


def images() -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """(3, 513, 513) and the true class of each pixel (513, 513), 255 where it is unknown or outside the image."""
    with zipfile.ZipFile(ARCHIVE) as archive:
        for name in sorted(name for name in archive.namelist() if name.endswith(".jpg")):
            image = Image.open(io.BytesIO(archive.read(name))).convert("RGB")
            mask = Image.open(io.BytesIO(archive.read(name.replace("images/", "masks/").replace(".jpg", ".png"))))
            ratio = SIDE / max(image.size)
            width, height = (round(side * ratio) for side in image.size)
            pixels = np.asarray(image.resize((width, height), Image.Resampling.BILINEAR), np.float32)
            classes = np.asarray(mask.resize((width, height), Image.Resampling.NEAREST))
            frame, truth = np.zeros((3, SIDE, SIDE), np.float32), np.full((SIDE, SIDE), UNLABELLED)
            frame[:, :height, :width] = (pixels / 127.5 - 1).transpose(2, 0, 1)
            truth[:height, :width] = classes
            yield frame, truth


def miou(outputs: dict[str, np.ndarray], labels: np.ndarray) -> float:
    """Intersection over union over all pixels of all images; the mean of the classes that occur or are predicted."""
    counts = np.zeros((CLASSES, CLASSES))
    for logits, truth in zip(outputs["logits"], labels, strict=True):
        known = truth != UNLABELLED
        pairs = CLASSES * truth[known] + enlarged(logits).argmax(0)[known]
        counts += np.bincount(pairs, minlength=CLASSES**2).reshape(CLASSES, CLASSES)
    shared = counts.diagonal()
    union = counts.sum(0) + counts.sum(1) - shared
    return float((shared[union > 0] / union[union > 0]).mean())


def enlarged(logits: np.ndarray) -> np.ndarray:
    """(classes, 65, 65) → (classes, 513, 513), bilinear, corners on corners."""
    for axis in (1, 2):
        position = np.linspace(0, logits.shape[axis] - 1, SIDE)
        low = np.minimum(position.astype(int), logits.shape[axis] - 2)
        part = (position - low).astype(np.float32)
        part = part[:, None] if axis == 1 else part
        logits = logits.take(low, axis) * (1 - part) + logits.take(low + 1, axis) * part
    return logits
