"""Protobuf's wire format, walked without building messages: where each field lies in the bytes.

Bytes may have holes: stretches that were cut out (the contents of tensors) but still count for positions and lengths,
so that one walk serves a whole file and what is left of it in a container.
"""

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate

from lowbit.errors import InputError

VARINT, FIXED64, BYTES, FIXED32 = 0, 1, 2, 5


@dataclass(frozen=True)
class Field:
    """One field of a message: its number, wire type, and the positions where its contents begin and end."""

    number: int
    wire: int
    start: int
    stop: int


class View:
    """The bytes of a file of `size` bytes, of which the stretches `holes`, (start, length) in order, are missing."""

    def __init__(self, data: bytes | memoryview, holes: Sequence[tuple[int, int]] = ()) -> None:
        self.data = memoryview(data)
        self.starts = [start for start, _ in holes]
        self.stops = [start + length for start, length in holes]
        self.missing = [0, *accumulate(length for _, length in holes)]
        self.size = len(self.data) + self.missing[-1]

    def take(self, start: int, stop: int) -> memoryview:
        """The bytes from start to stop, which must not reach into a hole."""
        before = bisect_right(self.stops, start)
        if stop > self.size or (stop > start and before < len(self.starts) and self.starts[before] < stop):
            raise InputError(
                f"a model is damaged: bytes {start} to {stop} of {self.size} do not hold what they should."
            )
        return self.data[start - self.missing[before] : stop - self.missing[before]]

    def varint(self, start: int, stop: int) -> tuple[int, int]:
        """The number at `start`, and the position after it."""
        value = shift = 0
        for position in range(start, min(start + 10, stop)):
            digit = self.take(position, position + 1)[0]
            value |= (digit & 0x7F) << shift
            if digit < 0x80:
                return value, position + 1
            shift += 7
        raise InputError(f"not a readable protobuf file: the number at byte {start} has no end.")

    def fields(self, start: int, stop: int) -> Iterator[Field]:
        """The fields of the message between start and stop."""
        while start < stop:
            key, start = self.varint(start, stop)
            number, wire = key >> 3, key & 7
            begin = start
            if wire == VARINT:
                _, start = self.varint(start, stop)
            elif wire == BYTES:
                length, begin = self.varint(start, stop)
                start = begin + length
            elif wire in (FIXED64, FIXED32):
                start += 8 if wire == FIXED64 else 4
            else:
                raise InputError(f"not a readable protobuf file: wire type {wire} at byte {begin - 1}.")
            if start > stop or number == 0:
                raise InputError(f"not a readable protobuf file: field {number} at byte {begin} runs past its message.")
            yield Field(number, wire, begin, start)
