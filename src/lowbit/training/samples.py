"""What is trained on: all samples, each by its number; in memory, or in a mapped file that processes share."""

import os
import platform
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lowbit import processes
from lowbit.errors import DataError, LowbitError

LABELS = "class labels"  # no name that an input has
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
        """All batches of `Data.batches`, joined. Above `most_bytes` they lie in a temporary file.

        Of several processes on one machine the first reads the batches into such a file, and all map it: a process
        then holds what it draws.
        """
        if processes.count() == 1:
            return _joined({column.name: column.tensor() for column in _read(batches, most_bytes)})
        folder = os.stat(tempfile.gettempdir())
        machines = processes.gathered((platform.node(), folder.st_dev, folder.st_ino))
        reader = machines.index(machines[processes.number()])
        read: list[_Column] = []
        problem: LowbitError | None = None
        if reader == processes.number():
            try:
                read = _read(batches, most_bytes=-1)
            except LowbitError as error:
                problem = error
        told = processes.gathered((problem, [column.place() for column in read]))
        if problem := next((said for said, _ in told if said is not None), None):
            raise problem
        tensors = {name: _mapped(file, dtype, shape) for name, file, dtype, shape in told[reader][1]}
        processes.gathered(None)  # a file of the reader loses its name when the reader lets go of it
        return _joined(tensors)

    def __len__(self) -> int:
        return len(self.inputs[0])

    def parts(self, size: int, most: int) -> Iterator[tuple[Tensor, ...]]:
        """Inputs of the first `most` samples, `size` at a time."""
        count = min(most, len(self))
        for i in range(0, count, size):
            yield self.take(torch.arange(i, min(i + size, count))).inputs

    def take(self, rows: Tensor) -> "Samples":
        """Some of the samples."""
        return Samples(tuple(x[rows] for x in self.inputs), None if self.labels is None else self.labels[rows])


def _read(batches: Any, most_bytes: int) -> "list[_Column]":
    columns: list[_Column] = []
    held = 0
    for batch, marks in batches:
        parts = [*batch.items(), *([] if marks is None else [(LABELS, marks)])]
        columns = columns or [_Column(name, array) for name, array in parts]
        held += sum(array.nbytes for _, array in parts)
        for column, (_, array) in zip(columns, parts, strict=True):
            column.add(array, aside=held > most_bytes)
    if not columns:
        raise DataError("there is no sample to train on.")
    return columns


def _joined(tensors: dict[str, Tensor]) -> Samples:
    labels = tensors.pop(LABELS, None)
    return Samples(tuple(tensors.values()), labels)


def _mapped(file: str, dtype: np.dtype, shape: tuple[int, ...]) -> Tensor:
    return torch.from_numpy(np.memmap(file, dtype, "r+", shape=shape))


@dataclass
class _Column:
    """One array of the samples as it grows: a list of parts, then a file."""

    name: str
    like: np.ndarray
    parts: list[np.ndarray] = field(default_factory=list)
    count: int = 0
    file: "tempfile._TemporaryFileWrapper[bytes] | None" = None

    def add(self, part: np.ndarray, aside: bool) -> None:
        if self.like.dtype == object:
            raise DataError(f"'{self.name}' is a list of objects (boxes, sentences); training needs numbers.")
        if part.shape[1:] != self.like.shape[1:] or part.dtype != self.like.dtype:
            raise DataError(
                f"'{self.name}' has samples of shape {list(part.shape[1:])} and of {list(self.like.shape[1:])}; "
                "training mixes samples in a batch: give all one shape."
            )
        self.count += len(part)
        self.parts.append(np.array(part))
        if aside:
            try:
                self.file = self.file or tempfile.NamedTemporaryFile(prefix="lowbit-")  # noqa: SIM115  # lives as its map
                for waiting in self.parts:
                    self.file.write(waiting.data)
            except OSError as error:
                raise DataError(
                    f"{self.count} samples take more memory than is allowed, and there is no room for them in "
                    f"'{tempfile.gettempdir()}': {error.strerror}. Set TMPDIR to a folder with more room."
                ) from None
            self.parts.clear()

    def tensor(self) -> Tensor:
        if self.file is not None:
            _, file, dtype, shape = self.place()
            return _mapped(file, dtype, shape)
        return torch.from_numpy(np.concatenate(self.parts))

    def place(self) -> tuple[str, str, np.dtype, tuple[int, ...]]:
        """Its name, and where it lies: file, type, shape."""
        assert self.file is not None
        self.file.flush()
        return self.name, self.file.name, self.like.dtype, (self.count, *self.like.shape[1:])
