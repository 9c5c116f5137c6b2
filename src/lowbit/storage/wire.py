"""Whole numbers in bytes, and a reader that never runs past its end.

A number is little-endian in base 128; the top bit of a byte says that another byte follows (LEB128, as in protobuf).
"""

from collections.abc import Iterable, Sequence

from lowbit.errors import InputError


def numbers(values: Iterable[int]) -> bytes:
    """Whole numbers, 0 or more, one after the other."""
    digits = bytearray()
    for value in values:
        while value > 0x7F:
            digits.append(value & 0x7F | 0x80)
            value >>= 7
        digits.append(value)
    return bytes(digits)


def join(parts: Sequence[bytes]) -> bytes:
    """The length of each part but the last, then the parts."""
    return numbers(len(part) for part in parts[:-1]) + b"".join(parts)


class Reader:
    """Reads bytes in order; asking for more than there is raises InputError naming `what` is being read."""

    def __init__(self, data: bytes | memoryview, what: str) -> None:
        self.data = memoryview(data)
        self.position = 0
        self.what = what

    @property
    def left(self) -> int:
        """Bytes not read yet."""
        return len(self.data) - self.position

    def take(self, count: int) -> memoryview:
        """The next `count` bytes."""
        if count > self.left:
            raise InputError(f"{self.what} ends early: {count} more bytes were announced, {self.left} are left.")
        self.position += count
        return self.data[self.position - count : self.position]

    def number(self, most: int = 2**64 - 1) -> int:
        """The next number, at most `most`."""
        value = shift = 0
        while True:
            digit = self.take(1)[0]
            value |= (digit & 0x7F) << shift
            if digit < 0x80:
                break
            shift += 7
            if shift > 63:
                raise InputError(f"{self.what} is damaged: a number runs over ten bytes.")
        if value > most:
            raise InputError(f"{self.what} is damaged: it says {value} where at most {most} is possible.")
        return value

    def column(self, count: int, most: int = 2**64 - 1) -> list[int]:
        """The next `count` numbers."""
        return [self.number(most) for _ in range(count)]

    def parts(self, count: int) -> list[memoryview]:
        """The `count` parts that `join` put together; the last one takes all that is left."""
        lengths = self.column(count - 1, self.left)
        return [*(self.take(length) for length in lengths), self.take(self.left)]
