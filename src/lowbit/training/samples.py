"""What is trained on: all samples, each by its number; in memory, or beyond a limit in a mapped file."""

import tempfile
from dataclasses import dataclass, field
from typing import IO, Any

import numpy as np
import torch
from torch import Tensor

from lowbit.errors import DataError

MEMORY = 2**32
"""Bytes of samples that are held in memory."""


@dataclass(frozen=True)
class Samples:
    """All samples, in an order that stays.

    inputs    one tensor for each network input, samples along axis 0
    labels    (n,) class numbers, or None
    """

    inputs: tuple[Tensor, ...]
    labels: Tensor | None

    @staticmethod
    def of(batches: Any, most_bytes: int = MEMORY) -> "Samples":
        """All batches of `Data.batches`, joined. Above `most_bytes` they lie in a temporary file without a name."""
        columns: list[_Column] = []
        labelled, held = False, 0
        for batch, marks in batches:
            labelled = marks is not None
            parts = [*batch.items(), *([("labels", marks)] if labelled else [])]
            columns = columns or [_Column(name, array) for name, array in parts]
            held += sum(array.nbytes for _, array in parts)
            for column, (_, array) in zip(columns, parts, strict=True):
                column.add(array, aside=held > most_bytes)
        if not columns:
            raise DataError("there is no sample to train on.")
        tensors = [column.tensor() for column in columns]
        return Samples(tuple(tensors[:-1] if labelled else tensors), tensors[-1] if labelled else None)

    def __len__(self) -> int:
        return len(self.inputs[0])

    def parts(self, size: int, most: int) -> list[tuple[Tensor, ...]]:
        """Inputs of the first `most` samples, `size` at a time."""
        count = min(most, len(self))
        return [self.take(torch.arange(i, min(i + size, count))).inputs for i in range(0, count, size)]

    def take(self, rows: Tensor) -> "Samples":
        """Some of the samples."""
        return Samples(tuple(x[rows] for x in self.inputs), None if self.labels is None else self.labels[rows])


@dataclass
class _Column:
    """One array of the samples as it grows: a list of parts, then a file."""

    name: str
    like: np.ndarray
    parts: list[np.ndarray] = field(default_factory=list)
    count: int = 0
    file: IO[bytes] | None = None

    def add(self, part: np.ndarray, aside: bool) -> None:
        if part.shape[1:] != self.like.shape[1:] or part.dtype != self.like.dtype:
            raise DataError(
                f"'{self.name}' has samples of shape {list(part.shape[1:])} and of {list(self.like.shape[1:])}; "
                "training mixes samples in a batch: give all one shape."
            )
        self.count += len(part)
        self.parts.append(np.array(part))
        if aside:
            try:
                self.file = self.file or tempfile.TemporaryFile(prefix="lowbit-")  # noqa: SIM115  # lives as its map
                for waiting in self.parts:
                    self.file.write(waiting.data)
            except OSError as error:
                raise DataError(
                    f"{self.count} samples take more memory than is allowed, and there is no room for them in "
                    f"'{tempfile.gettempdir()}': {error.strerror}. Set TMPDIR to a folder with more room."
                ) from None
            self.parts.clear()

    def tensor(self) -> Tensor:
        if self.like.dtype == object:
            raise DataError(f"'{self.name}' is a list of objects (boxes, sentences); training needs numbers.")
        if self.file is None:
            return torch.from_numpy(np.concatenate(self.parts))
        self.file.flush()
        shape = (self.count, *self.like.shape[1:])
        return torch.from_numpy(np.memmap(self.file, self.like.dtype, "r+", shape=shape))
