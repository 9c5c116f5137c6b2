"""Samples that calibration keeps in memory, bounded in bytes: some to fit to, others to judge by."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from lowbit.data import Data
from lowbit.data.samples import SampleBatch
from lowbit.engines.compile import Batch
from lowbit.network.footprint import Footprint

BATCH = 16  # samples that go through the network at once, where memory has room for them
KEPT = 200  # samples, from the start of the calibration data
JUDGING = 16  # of the kept ones; a third where there are few


@dataclass(frozen=True)
class Kept:
    """The two have no sample in common, unless `shared`: there was only one, or the network takes all at once."""

    judging: list[SampleBatch]
    fitting: list[SampleBatch]
    shared: bool


def keep(data: Data, stream: Iterator[SampleBatch], most_bytes: int) -> Kept:
    """Take the first samples from the stream, KEPT of them or as many as `most_bytes` has room for."""
    taken: list[SampleBatch] = []
    while sum(s.count for s in taken) < KEPT and sum(map(_bytes, taken)) < most_bytes:
        if (samples := next(stream, None)) is None:
            break
        taken.append(samples)
    wanted = min(JUDGING, max(1, sum(s.count for s in taken) // 3))
    judging: list[SampleBatch] = []
    fitting: list[SampleBatch] = []
    for samples in taken:
        missing = wanted - sum(s.count for s in judging)
        head, *tail = data.pieces(samples, missing) if missing > 0 else (samples,)
        (judging if missing > 0 else fitting).append(head)
        fitting += tail
    return Kept(judging, fitting or judging, shared=not fitting)


def batches(data: Data, kept: Iterable[SampleBatch], footprint: Footprint, most_bytes: int) -> Iterator[Batch]:
    """These samples in batches whose activations take at most `most_bytes`, or one by one."""
    for piece in pieces(data, kept, footprint, most_bytes):
        yield piece.inputs


def pieces(data: Data, kept: Iterable[SampleBatch], footprint: Footprint, most_bytes: int) -> Iterator[SampleBatch]:
    """As `batches`, with the labels."""
    for samples in kept:
        yield from data.pieces(samples, max(1, min(BATCH, passing(footprint, samples, most_bytes))))


def passing(footprint: Footprint, samples: SampleBatch, most_bytes: int) -> int:
    """How many such samples make that many bytes on their way through a network."""
    return int(most_bytes // max(1.0, footprint.made * _bytes(samples) / samples.count))


def room(footprint: Footprint, samples: SampleBatch, most_bytes: int) -> int:
    """How many such samples can be alive in a network together."""
    return int(most_bytes // max(1.0, footprint.alive * _bytes(samples) / samples.count))


def first(data: Data, kept: Iterable[SampleBatch], count: int) -> Iterator[SampleBatch]:
    """The first `count` of them, at least one."""
    left = max(1, count)
    for samples in kept:
        if left <= 0:
            return
        piece = data.pieces(samples, left)[0]
        yield piece
        left -= piece.count


def _bytes(samples: SampleBatch) -> int:
    return sum(array.nbytes for array in samples.inputs.values())
