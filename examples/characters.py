"""A character LSTM: `--data examples/characters.py:evaluation --metric bits-per-token`, `:calibration` to quantize.

Reads text/charlstm-charlotte_bronte-* in the folder LOWBIT_DATA.
"""

import json
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np

FOLDER = Path(os.environ.get("LOWBIT_DATA", "../shared/data")) / "text"
NAME = "charlstm-charlotte_bronte"
STREAMS = 16


def calibration() -> Iterator[np.ndarray]:
    """200 pieces of 128 characters."""
    pieces = ids("calib")[: 200 * 128].reshape(-1, 1, 128)
    yield from pieces


def evaluation() -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """The whole evaluation text in 16 streams from a zero state; the label of a character is the next one."""
    text = ids("eval")
    length = (len(text) - 1) // STREAMS
    yield text[: STREAMS * length].reshape(STREAMS, length), text[1 : STREAMS * length + 1].reshape(STREAMS, length)


def ids(part: str) -> np.ndarray:
    """The text as numbers of the network's alphabet; characters outside of it are left out."""
    alphabet = json.loads((FOLDER / f"{NAME}-vocab.json").read_text())
    text = (FOLDER / f"{NAME}-{part}.txt").read_text()
    return np.asarray([alphabet[character] for character in text if character in alphabet], np.int64)
