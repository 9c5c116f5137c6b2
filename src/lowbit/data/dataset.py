"""Data of one network: opened from anything, checked, and handed out in batches."""

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from lowbit.data.fitting import Fitting
from lowbit.data.preprocess import Preprocessing
from lowbit.data.samples import Batching, Samples, check_finite
from lowbit.data.sources import Columns, Items, Pictures, Source, Whole, from_memory, imported, open_path
from lowbit.errors import DataError

if TYPE_CHECKING:
    from lowbit.model import Port


@dataclass(frozen=True)
class Data:
    """Samples for one network, read again from their source at every pass.

    every batch has exactly the network's inputs, in their types, finite, on the stated axes
    samples come in the source's order: those from `skip` on, at most `limit` of them
    memory holds a batch or two, whatever the number of samples
    """

    source: Source
    fitting: Fitting
    skip: int = 0
    limit: int | None = None
    watch: Callable[[int], None] | None = None

    @classmethod
    def of(
        cls,
        source: Any,
        inputs: "Sequence[Port]",
        *,
        preprocess: str | Mapping[str, Any] | Preprocessing | None = None,
        names: Mapping[str, str] | None = None,
        skip: int = 0,
        limit: int | None = None,
        watch: Callable[[int], None] | None = None,
    ) -> "Data":
        """Data from a path, `module:function`, arrays, tensors, a dict, a tuple, or any iterable of batches.

        inputs      the network's inputs
        preprocess  what becomes of pixels or numbers before the network sees them
        names       network input (or `labels`) → array of the data, where names differ
        skip, limit samples to leave out at the start; most samples to use
        watch       called with the number of samples handed out in this pass, after each batch
        """
        if skip < 0 or (limit is not None and limit < 1):
            raise DataError(f"skip={skip} limit={limit}: skip is 0 or more, limit 1 or more.")
        if isinstance(source, Data):
            narrowed = source._narrowed(skip, limit)
            return narrowed if watch is None else replace(narrowed, watch=watch)
        stated = None if preprocess is None else Preprocessing.of(preprocess)
        fitting = Fitting(tuple(inputs), stated, dict(names or {}))
        opened = _from_text(source, fitting) if isinstance(source, (str, Path)) else from_memory(source, fitting)
        if isinstance(opened, (Columns, Whole)):
            fitting = replace(fitting, renames={})
        if isinstance(opened, Pictures):  # image files are prepared one by one, before they can be stacked
            fitting = replace(fitting, preprocess=Preprocessing())
        return cls(opened, fitting, skip, limit, watch)

    def batches(self, size: int | None = None) -> Iterator[tuple[dict[str, np.ndarray], np.ndarray | None]]:
        """Batches of `size` samples and their labels, or None; without a size, as the source gives them.

        A network with a fixed batch gets exactly that many at a time. The last batch may be smaller, and so may any
        after which the samples change their shape (sentences of other lengths are never padded).
        """
        for samples in self.samples(size):
            yield samples.inputs, samples.labels

    def samples(self, size: int | None = None, most_bytes: int | None = None) -> Iterator[Samples]:
        """As `batches`, with the number of samples in each; fewer than `size` where they would take `most_bytes`."""
        batching = Batching.of(self.fitting.inputs)
        parts = self._chosen(batching)
        wanted = batching.fixed or size or self.source.batch
        if wanted and most_bytes and (first := next(parts, None)) is not None:
            each = sum(array.nbytes for array in first.inputs.values()) / first.count
            wanted = batching.fixed or max(1, min(wanted, int(most_bytes // max(1.0, each))))
            parts = itertools.chain([first], parts)
        done = 0
        for samples in batching.regrouped(parts, wanted) if wanted else parts:
            if batching.fixed and samples.count != batching.fixed:
                raise DataError(
                    f"the network takes exactly {batching.fixed} samples at a time, {samples.count} are left over. "
                    f"Use a limit that is a multiple of {batching.fixed}."
                )
            yield samples
            done += samples.count
            if self.watch is not None:
                self.watch(done)
        if not done and not self.source.repeatable:
            raise DataError(
                "the generator is empty or was read before. Give a list, a DataLoader, or the function itself."
            )
        if not done:
            raise DataError(f"{self.source.name} has no samples{f' after the first {self.skip}' if self.skip else ''}.")

    def pieces(self, samples: Samples, size: int) -> list[Samples]:
        """These samples, `size` at a time; all at once where the network takes a fixed number."""
        if self.fixed_batch or size >= samples.count:
            return [samples]
        batching = Batching.of(self.fitting.inputs)
        return [batching.slice(samples, start, start + size) for start in range(0, samples.count, size)]

    def cut(self, samples: Samples, count: int) -> Samples:
        """The first `count` of these samples; all of them where the network takes a fixed number at once."""
        return samples if self.fixed_batch else Batching.of(self.fitting.inputs).slice(samples, 0, count)

    def take(self, count: int) -> "Data":
        """The first `count` samples."""
        return self._narrowed(0, count)

    def split(self, count: int) -> tuple["Data", "Data"]:
        """The first `count` samples, and the others; both can be read again and again only if the source can."""
        if self.source.repeatable:
            return self._narrowed(0, count), self._narrowed(count, None)
        return self._split_once(count)

    def _split_once(self, count: int) -> tuple["Data", "Data"]:
        """For a source that can be read only once: the first samples are kept in memory."""
        batching = Batching.of(self.fitting.inputs)
        stream, parts, passed = self._chosen(batching), [], 0
        while passed < count and (part := next(stream, None)) is not None:
            parts.append(part)
            passed += part.count
        over = parts.pop() if passed > count else None
        rest: Iterator[Samples] = stream
        if over is not None:
            kept = over.count - (passed - count)
            parts.append(batching.slice(over, 0, kept))
            rest = itertools.chain([batching.slice(over, kept, over.count)], stream)
        fitted = replace(self, fitting=replace(self.fitting, preprocess=None, renames={}), skip=0, limit=None)
        name = self.source.name
        return (
            replace(fitted, source=Items(name, [_item(part) for part in parts], True)),
            replace(fitted, source=Items(name, map(_item, rest), False)),
        )

    @property
    def count(self) -> int | None:
        """Number of samples, where the source knows it without being read."""
        if self.source.count is None:
            return None
        rest = max(0, self.source.count - self.skip)
        return rest if self.limit is None else min(rest, self.limit)

    @property
    def fixed_batch(self) -> int | None:
        """How many samples the network takes at once, where it takes one number only."""
        return Batching.of(self.fitting.inputs).fixed

    @property
    def repeatable(self) -> bool:
        """Whether the data can be read a second time; a generator cannot."""
        return self.source.repeatable

    def _narrowed(self, skip: int, limit: int | None) -> "Data":
        if self.limit is not None:
            rest = max(0, self.limit - skip)
            limit = rest if limit is None else min(rest, limit)
        return replace(self, skip=self.skip + skip, limit=limit)

    def _chosen(self, batching: Batching) -> Iterator[Samples]:
        """Samples from skip on, at most limit, each checked."""
        skipped = self.skip if self.source.skips else 0
        position, last = skipped, None if self.limit is None else self.skip + self.limit
        if last is not None and last <= self.skip:
            return
        has_labels: bool | None = None
        for item in self.source.items(self.skip):
            samples = self.fitting.samples(item, f"{self.source.name}, sample {position}")
            start = max(0, self.skip - position)
            stop = samples.count if last is None else min(samples.count, last - position)
            if start < stop:
                chosen = batching.slice(samples, start, stop)
                check_finite(chosen, position + start, batching)
                if has_labels is None:
                    has_labels = chosen.labels is not None
                elif has_labels != (chosen.labels is not None):
                    raise DataError(
                        f"{self.source.name}: some samples have labels, sample {position} is the first that differs."
                    )
                yield chosen
            position += samples.count
            if last is not None and position >= last:
                return


def _from_text(source: str | Path, fitting: Fitting) -> Source:
    path = Path(source)
    if path.exists():
        return open_path(path, fitting)
    text = str(source)
    if ":" in text and not text.endswith(":"):
        return Items(f"'{text}'", imported(text), True)
    raise DataError(
        f"there is no file '{source}'. Data is a .npz, a .npy, a folder or zip of images, or module:function."
    )


def _item(samples: Samples) -> object:
    return (samples.inputs, samples.labels) if samples.labels is not None else samples.inputs
