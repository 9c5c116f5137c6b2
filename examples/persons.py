"""Is there a person in the picture: `--data examples/persons.py:images --metric top1`.

Reads detection/coco-val-sample-a.zip (images and YOLO labels) in the folder LOWBIT_DATA.
"""

import io
import os
import zipfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image

from lowbit.data import Preprocessing

ARCHIVE = Path(os.environ.get("LOWBIT_DATA", "../shared/data")) / "detection" / "coco-val-sample-a.zip"
PREPARE = Preprocessing.parse("size=96 scale=255")


def images() -> Iterator[tuple[np.ndarray, int]]:
    """(3, 96, 96) and 1 where a box of class 0, a person, covers more than half a percent of the image, else 0."""
    with zipfile.ZipFile(ARCHIVE) as archive:
        for name in sorted(name for name in archive.namelist() if name.endswith(".jpg")):
            pixels = np.asarray(Image.open(io.BytesIO(archive.read(name))).convert("RGB"))
            text = archive.read(name.replace("images/", "labels/").replace(".jpg", ".txt")).decode()
            rows = np.asarray([line.split() for line in text.splitlines()], float).reshape(-1, 5)
            persons = (rows[:, 0] == 0) & (rows[:, 3] * rows[:, 4] > 0.005)
            yield PREPARE.images(pixels[None])[0], int(persons.any())
