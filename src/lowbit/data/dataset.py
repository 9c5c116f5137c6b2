"""Data of one network: opened from anything, checked, and handed out in batches."""

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from lowbit.data.fitting import Fitting
from lowbit.data.preprocess import Preprocessing
from lowbit.data.samples import SampleBatch, check_finite
from lowbit.data.sources import Source, open_source
from lowbit.errors import DataError

if TYPE_CHECKING:
    from lowbit.model import Port


@dataclass(frozen=True)
class Data:
    """Samples for one network, read again from their source at every pass.

    every batch has exactly the network's inputs, in their types, finite, on the stated axes
    samples come in the source's order: those from `skip` on, at most `limit` of them
    memory holds a batch or two, whatever the number of samples
    made_up: the samples are made up by shape and type (`made_up.py`)
    """

    source: Source
    fitting: Fitting
    skip: int = 0
    limit: int | None = None
    watch: Callable[[int], None] | None = None
    made_up: bool = False

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
        return cls(*open_source(source, fitting), skip, limit, watch)

    @classmethod
    def joined(cls, several: "Sequence[Data]") -> "Data":
        """The samples of several, one after the other."""
        if len(several) == 1:
            return several[0]

        def items(_: int) -> Iterator[object]:
            for data in several:
                for part in data.samples():
                    yield part.inputs if part.labels is None else (part.inputs, part.labels)

        name, counts = ", ".join(data.source.name for data in several), [data.count for data in several]
        count = None if None in counts else sum(count or 0 for count in counts)
        source = Source(name, items, count, repeatable=all(data.source.repeatable for data in several))
        return cls(source, replace(several[0].fitting, preprocess=None, renames={}))

    def batches(self, size: int | None = None) -> Iterator[tuple[dict[str, np.ndarray], np.ndarray | None]]:
        """Batches of `size` samples and their labels, or None; without a size, as the source gives them.

        A network with a fixed batch gets exactly that many at a time. The last batch may be smaller, and so may any
        after which the samples change their shape (sentences of other lengths are never padded).
        """
        for samples in self.samples(size):
            yield samples.inputs, samples.labels

    def samples(self, size: int | None = None, most_bytes: int | None = None) -> Iterator[SampleBatch]:
        """As `batches`, with the number of samples in each; fewer than `size` where they would take `most_bytes`."""
        batching, parts = self.fitting.batching, self._chosen()
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

    def pieces(self, samples: SampleBatch, size: int) -> list[SampleBatch]:
        """These samples, `size` at a time; all at once where the network takes a fixed number."""
        if self.fixed_batch or size >= samples.count:
            return [samples]
        starts = range(0, samples.count, size)
        return [self.fitting.batching.slice(samples, start, start + size) for start in starts]

    def cut(self, samples: SampleBatch, count: int) -> SampleBatch:
        """The first `count` of these samples; all of them where the network takes a fixed number at once."""
        return self.pieces(samples, count)[0]

    def take(self, count: int) -> "Data":
        """The first `count` samples."""
        return self._narrowed(0, count)

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
        return self.fitting.batching.fixed

    def _narrowed(self, skip: int, limit: int | None) -> "Data":
        if self.limit is not None:
            rest = max(0, self.limit - skip)
            limit = rest if limit is None else min(rest, limit)
        return replace(self, skip=self.skip + skip, limit=limit)

    def _chosen(self) -> Iterator[SampleBatch]:
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
                chosen = self.fitting.batching.slice(samples, start, stop)
                check_finite(chosen, position + start, self.fitting.batching)
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
