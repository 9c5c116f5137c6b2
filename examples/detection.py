"""YOLOX on COCO images: what `--data examples/detection.py:images --metric examples/detection.py:ap50` means.

Reads detection/coco-val-sample-a.zip (images and YOLO labels) in the folder LOWBIT_DATA.
"""

import io
import os
import zipfile
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image

from lowbit.data import Preprocessing

ARCHIVE = Path(os.environ.get("LOWBIT_DATA", "../shared/data")) / "detection" / "coco-val-sample-a.zip"
PREPARE = Preprocessing.parse("size=416 fit=letterbox-corner fill=114 color=BGR")
SIDE, STRIDES = 416, (8, 16, 32)


def images() -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """(3, 416, 416) and the true boxes (n, 5): class, then left, top, right, bottom in pixels of the 416 frame."""
    with zipfile.ZipFile(ARCHIVE) as archive:
        for name in sorted(name for name in archive.namelist() if name.endswith(".jpg")):
            pixels = np.asarray(Image.open(io.BytesIO(archive.read(name))).convert("RGB"))
            text = archive.read(name.replace("images/", "labels/").replace(".jpg", ".txt")).decode()
            rows = np.asarray([line.split() for line in text.splitlines()], float).reshape(-1, 5)
            height, width = pixels.shape[:2]
            centre, size = rows[:, 1:3] * (width, height), rows[:, 3:5] * (width, height)
            corners = np.concatenate([centre - size / 2, centre + size / 2], 1) * min(SIDE / height, SIDE / width)
            yield PREPARE.images(pixels[None])[0].astype(np.float32), np.concatenate([rows[:, :1], corners], 1)


def ap50(outputs: dict[str, np.ndarray], labels: np.ndarray) -> float:
    """Average precision at an overlap of one half, 101 recall points, mean over the classes that occur."""
    found: dict[int, list[tuple[float, bool]]] = defaultdict(list)
    wanted: dict[int, int] = defaultdict(int)
    for output, truth in zip(outputs["output"], labels, strict=True):
        boxes, scores = decode(output)
        for kind in range(scores.shape[1]):
            true = truth[truth[:, 0] == kind, 1:]
            wanted[kind] += len(true)
            found[kind] += matched(boxes, scores[:, kind], true)
    return float(np.mean([average_precision(found[kind], count) for kind, count in wanted.items() if count]))


def decode(output: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(3549, 85) → boxes (3549, 4) as corners in pixels, and scores (3549, 80)."""
    grids, strides = [], []
    for stride in STRIDES:
        count = SIDE // stride
        y, x = np.mgrid[:count, :count]
        grids.append(np.stack([x, y], -1).reshape(-1, 2))
        strides.append(np.full((count * count, 1), stride))
    steps = np.concatenate(strides)
    centre = (output[:, :2] + np.concatenate(grids)) * steps
    size = np.exp(output[:, 2:4]) * steps
    return np.concatenate([centre - size / 2, centre + size / 2], 1), output[:, 4:5] * output[:, 5:]


def matched(boxes: np.ndarray, scores: np.ndarray, true: np.ndarray) -> list[tuple[float, bool]]:
    """Score and rightness of each box that survives the suppression of its neighbours (0.45), best first."""
    candidates = np.flatnonzero(scores > 0.01)
    order = candidates[np.argsort(-scores[candidates], kind="stable")]
    free = np.ones(len(true), bool)
    results = []
    while len(order):
        best, order = order[0], order[1:]
        order = order[overlap(boxes[best], boxes[order]) <= 0.45]
        shares = np.where(free, overlap(boxes[best], true), 0)
        right = bool(len(true)) and bool(shares.max() >= 0.5)
        if right:
            free[shares.argmax()] = False
        results.append((float(scores[best]), right))
    return results


def overlap(box: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Intersection over union of one box with others."""
    low, high = np.maximum(box[:2], others[:, :2]), np.minimum(box[2:], others[:, 2:])
    shared = np.clip(high - low, 0, None).prod(1)
    area = (box[2:] - box[:2]).prod() + (others[:, 2:] - others[:, :2]).prod(1) - shared
    return np.asarray(shared / np.maximum(area, 1e-9))


def average_precision(found: list[tuple[float, bool]], count: int) -> float:
    right = np.asarray([right for _, right in sorted(found, key=lambda pair: -pair[0])], float)
    recall = right.cumsum() / count
    precision = right.cumsum() / np.arange(1, len(right) + 1)
    return float(np.mean([precision[recall >= level].max(initial=0) for level in np.linspace(0, 1, 101)]))
