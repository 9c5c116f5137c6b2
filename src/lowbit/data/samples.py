"""Samples as a network takes them, and how they are cut and joined into batches."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from lowbit.errors import DataError

if TYPE_CHECKING:
    from lowbit.model import Port


BATCH_NAMES = ("batch", "batch_size", "batchsize")


@dataclass(frozen=True)
class SampleBatch:
    """Some samples, ready for the network.

    inputs has exactly the network's inputs, each with its type and, where it is stated, its shape
    count samples lie along each input's batch axis; an input without one is the same for all of them
    labels is None, or has `count` entries along its first axis
    """

    inputs: dict[str, np.ndarray]
    labels: np.ndarray | None
    count: int


@dataclass(frozen=True)
class Batching:
    """Which axis of each input counts samples, and how many samples the network takes at once.

    axes    input → axis, None where it has none
    fixed   the only number of samples that it takes, None: any
    symbol  what the shape of the leading input says about that axis
    """

    axes: Mapping[str, int | None]
    fixed: int | None
    symbol: int | str | None = None

    @classmethod
    def of(cls, inputs: "Sequence[Port]") -> "Batching":
        """Read off the shapes: an axis called `batch` leads, else the first axis of the first input; others follow.

        They follow its symbol, or its size where it is fixed.
        """
        symbols = (side for port in inputs for side in port.shape if isinstance(side, str))
        if named := next((symbol for symbol in symbols if symbol.lower() in BATCH_NAMES), None):
            return cls({port.name: _axis_like(port, named) for port in inputs}, None, named)
        lead = next((port for port in inputs if isinstance(_first(port), str)), None)
        lead = lead or next((port for port in inputs if port.shape), None)
        if lead is None:
            return cls({port.name: None for port in inputs}, 1)
        axes = {port.name: _axis_like(port, lead.shape[0]) for port in inputs}
        return cls(axes, lead.shape[0] if isinstance(lead.shape[0], int) else None, lead.shape[0])

    def axes_of(self, outputs: "Sequence[Port]") -> dict[str, int | None]:
        """Which axis of each output counts samples, by the same symbol or size."""
        return {port.name: _axis_like(port, self.symbol) for port in outputs}

    def slice(self, samples: SampleBatch, start: int, stop: int) -> SampleBatch:
        """Samples start … stop."""
        start, stop = min(start, samples.count), min(stop, samples.count)
        if (start, stop) == (0, samples.count):
            return samples
        inputs = {
            name: array if (axis := self.axes[name]) is None else array[(slice(None),) * axis + (slice(start, stop),)]
            for name, array in samples.inputs.items()
        }
        return SampleBatch(inputs, None if samples.labels is None else samples.labels[start:stop], stop - start)

    def join(self, parts: Sequence[SampleBatch]) -> SampleBatch:
        """One after the other."""
        if len(parts) == 1:
            return parts[0]
        inputs = {
            name: parts[0].inputs[name] if axis is None else np.concatenate([part.inputs[name] for part in parts], axis)
            for name, axis in self.axes.items()
        }
        labels = [part.labels for part in parts if part.labels is not None]
        return SampleBatch(inputs, stacked(labels) if labels else None, sum(part.count for part in parts))

    def joinable(self, first: SampleBatch, second: SampleBatch) -> bool:
        """Whether both fit in one batch: equal shapes but for the batch axis, equal inputs where there is none."""
        for name, axis in self.axes.items():
            a, b = first.inputs[name], second.inputs[name]
            if axis is None:
                if not np.array_equal(a, b):
                    return False
            elif a.shape[:axis] + a.shape[axis + 1 :] != b.shape[:axis] + b.shape[axis + 1 :]:
                return False
        return (first.labels is None) == (second.labels is None)

    def regrouped(self, parts: Iterable[SampleBatch], size: int) -> Iterator[SampleBatch]:
        """Batches of `size`; fewer only at the end, or where the next samples have another shape."""
        waiting: list[SampleBatch] = []
        count = 0
        for part in parts:
            if waiting and not self.joinable(waiting[0], part):
                yield self.join(waiting)
                waiting, count = [], 0
            waiting.append(part)
            count += part.count
            if count >= size:
                joined = self.join(waiting)
                whole = count - count % size
                yield from (self.slice(joined, first, first + size) for first in range(0, whole, size))
                rest = self.slice(joined, whole, count)
                waiting, count = ([rest] if rest.count else []), rest.count
        if waiting:
            yield self.join(waiting)


def _first(port: "Port") -> int | str | None:
    return port.shape[0] if port.shape else None


def _axis_like(port: "Port", lead: int | str | None) -> int | None:
    if not port.shape:
        return None
    if isinstance(lead, int):
        return 0 if port.shape[0] == lead else None
    if lead is not None and lead in port.shape:
        return list(port.shape).index(lead)
    return None if isinstance(port.shape[0], int) else 0


def stacked(parts: Sequence[np.ndarray]) -> np.ndarray:
    """All samples in one array, or, where their shapes differ, in an array of objects."""
    if all(part.dtype != object and part.shape[1:] == parts[0].shape[1:] for part in parts):
        return np.concatenate(parts)
    return _objects([entry for part in parts for entry in part])


def _objects(entries: Sequence[Any]) -> np.ndarray:
    array = np.empty(len(entries), object)
    for index, entry in enumerate(entries):
        array[index] = entry
    return array


def _out_of_torch(value: Any) -> Any:
    """A tensor as an array, without importing torch for those who have none; anything else as it is."""
    if type(value).__module__.partition(".")[0] != "torch":
        return value
    value = value.detach().cpu()
    return (value.float() if str(value.dtype) == "torch.bfloat16" else value).numpy()


def as_array(value: Any, what: str) -> np.ndarray:
    """A NumPy array out of an array, a torch tensor, a number or nested lists of numbers."""
    try:
        array = np.asarray(_out_of_torch(value))
    except ValueError:
        raise DataError(f"{what} is a list of unequal lengths; pad it, or give one sample at a time.") from None
    if array.dtype.kind not in "biuf" and array.dtype.name != "bfloat16":
        kind = type(value).__name__ if array.dtype == object else f"an array of {array.dtype}"
        raise DataError(f"{what} is {kind}; numbers are needed: a NumPy array or a torch tensor.")
    return array


def as_labels(value: Any, count: int, what: str, lone: bool = False) -> np.ndarray:
    """Labels with one entry a sample; anything that is no plain array stays a list of objects (boxes, sentences, …).

    lone   the value belongs to one sample that came without a batch axis, so that it is one entry itself
    """
    value = _out_of_torch(value)
    if lone and np.shape(value) != (1,):
        value = [value]
    try:
        array = np.asarray(value)
    except ValueError:
        array = _objects(list(value))
    if array.dtype == object and not isinstance(value, np.ndarray):
        array = _objects(list(value))
    array = array[None] if array.ndim == 0 else array
    if len(array) != count:
        raise DataError(f"{what}: {count} samples but {len(array)} labels.")
    return array


def check_finite(samples: SampleBatch, first: int, batching: Batching) -> None:
    """Raises a DataError that names the input and the sample where a number is NaN or infinite."""
    for name, array in samples.inputs.items():
        if array.dtype.kind != "f" or np.isfinite(array).all():
            continue
        axis = batching.axes[name]
        bad = np.argwhere(~np.isfinite(array))[0]
        value = array[tuple(bad)]
        where = "" if axis is None else f" in sample {first + int(bad[axis])}"
        raise DataError(
            f"input '{name}' holds {value}{where}, at {tuple(map(int, bad))} of its batch. Clean or drop it."
        )
