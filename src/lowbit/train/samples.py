"""What is trained on: all samples, in memory."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lowbit.errors import DataError


@dataclass(frozen=True)
class Samples:
    """All samples in memory.

    inputs    one tensor for each network input, samples along axis 0
    labels    (n,) class numbers, or None
    """

    inputs: tuple[Tensor, ...]
    labels: Tensor | None

    @staticmethod
    def of(batches: Any) -> "Samples":
        """All batches of `Data.batches`, joined."""
        parts: list[list[Tensor]] = []
        labels: list[Tensor] = []
        for batch, marks in batches:
            parts.append([torch.tensor(array) for array in batch.values()])
            if marks is not None:
                labels.append(torch.tensor(marks))
        if not parts:
            raise DataError("there is no sample to train on.")
        joined = tuple(torch.cat(column) for column in zip(*parts, strict=True))
        return Samples(joined, torch.cat(labels) if len(labels) == len(parts) else None)

    def __len__(self) -> int:
        return len(self.inputs[0])

    def parts(self, size: int, most: int) -> list[tuple[Tensor, ...]]:
        """Inputs of the first `most` samples, `size` at a time."""
        count = min(most, len(self))
        return [self.take(torch.arange(i, min(i + size, count))).inputs for i in range(0, count, size)]

    def take(self, rows: Tensor) -> "Samples":
        """Some of the samples."""
        return Samples(tuple(x[rows] for x in self.inputs), None if self.labels is None else self.labels[rows])
