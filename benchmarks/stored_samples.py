"""Samples that were prepared once and are read one by one, so that every quantizer starts from the same arrays.

`--data benchmarks/stored_samples.py:samples` reads the file that SAMPLES names in the environment.
"""

import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np

Batch = Mapping[str, np.ndarray]


def write(file: Path, batches: Sequence[Batch]) -> None:
    """An .npz with one array for each input of each batch."""
    arrays = {f"{index}/{name}": array for index, batch in enumerate(batches) for name, array in batch.items()}
    np.savez(file, allow_pickle=False, **arrays)


class Stored(Sequence[dict[str, np.ndarray]]):
    """Batches that are read from the file each time they are asked for."""

    def __init__(self, file: Path) -> None:
        self.arrays = np.load(file)
        self.names = [name.partition("/")[2] for name in self.arrays.files if name.startswith("0/")]

    def __len__(self) -> int:
        return len(self.arrays.files) // len(self.names)

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:  # type: ignore[override]
        if index >= len(self):
            raise IndexError(index)
        return {name: self.arrays[f"{index}/{name}"] for name in self.names}


def samples() -> Iterator[dict[str, np.ndarray]]:
    yield from Stored(Path(os.environ["SAMPLES"]))
