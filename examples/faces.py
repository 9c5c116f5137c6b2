"""A face detector without labels: the float network's own decisions are the truth that the quantized one is held to.

`--data examples/faces.py:images --metric examples/faces.py:same_decisions` with face-RFB-320; for face-slim-320 set
FACE_MODEL=face-slim-320.onnx. Reads detection/face-images.zip in the folder LOWBIT_DATA.
"""

import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np

import lowbit as lb
from lowbit.data import Data

FOLDER = Path(os.environ.get("LOWBIT_DATA", "../shared/data")) / "detection"
MODEL = os.environ.get("FACE_MODEL", "face-RFB-320.onnx")
PREPARE = "size=240x320 mean=127 std=128"


def images() -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """(1, 3, 240, 320) and for each of the 4,420 anchors whether the float network sees a face (p > 0.7)."""
    model = lb.load(FOLDER / MODEL)
    for batch, _ in Data.of(FOLDER / "face-images.zip", model.inputs, preprocess=PREPARE).batches():
        yield batch["input"], model.run(batch)["scores"][..., 1] > 0.7


def same_decisions(outputs: dict[str, np.ndarray], labels: np.ndarray) -> float:
    """F1 of the anchors that hold a face: 1 where both networks see the same ones."""
    found = outputs["scores"][..., 1] > 0.7
    return float(2 * (found & labels).sum() / (found.sum() + labels.sum()))
