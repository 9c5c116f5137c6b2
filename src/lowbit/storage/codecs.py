"""Codecs: exact, self-contained ways to write an array in fewer bytes, and the choice of the smallest.

A codec's configuration (frequency tables and the like) and its payload are written apart, so that several tensors can
share one configuration. Elements are unsigned integers: what a tensor's bytes are, whatever they mean.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import numpy as np
from numpy.typing import NDArray

from lowbit.errors import InputError
from lowbit.storage import bits as bit_packing
from lowbit.storage import sparse, varints
from lowbit.storage.ans import Ans
from lowbit.storage.huffman import Huffman
from lowbit.storage.wire import Reader, varint

Elements = NDArray[Any]
ReadChild = Callable[[int], "Codec"]
"""Reads the configuration of a child codec whose elements have the given width in bytes."""

WIDTHS = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}


class Codec(Protocol):
    """What every codec keeps.

    decode(encode(elements), len(elements)) == elements, bit for bit
    decode accepts any bytes: what encode could not have written is an InputError, found before more is allocated
    than the `count` elements asked for
    children are the codecs of the parts that this one splits its elements into
    """

    tag: ClassVar[int]

    @property
    def name(self) -> str: ...
    @property
    def width(self) -> int: ...
    @property
    def children(self) -> tuple["Codec", ...]: ...
    def encode(self, elements: Elements) -> bytes: ...
    def decode(self, data: bytes | memoryview, count: int) -> Elements: ...
    def config(self) -> bytes: ...


@dataclass(frozen=True)
class Raw:
    """Elements of `width` bytes as they are, little-endian."""

    tag: ClassVar[int] = 1
    width: int = 1
    name: ClassVar[str] = "raw"
    children: ClassVar[tuple[Codec, ...]] = ()

    def encode(self, elements: Elements) -> bytes:
        return elements.astype(WIDTHS[self.width], copy=False).tobytes()

    def decode(self, data: bytes | memoryview, count: int) -> Elements:
        if len(data) != count * self.width:
            raise InputError(f"raw data is damaged: {count} elements of {self.width} bytes in {len(data)} bytes.")
        return np.frombuffer(data, WIDTHS[self.width])

    def config(self) -> bytes:
        return bytes([self.width])

    @staticmethod
    def read(source: Reader, read_child: ReadChild) -> "Raw":
        return Raw(_width(source))


@dataclass(frozen=True)
class Packed:
    """Bytes from `offset` up, `bits` bits each, 0 … 7; with 0 bits all are `offset`."""

    tag: ClassVar[int] = 2
    offset: int
    bits: int
    width: ClassVar[int] = 1
    children: ClassVar[tuple[Codec, ...]] = ()

    @property
    def name(self) -> str:
        return f"packed:{self.bits}" if self.bits else "constant"

    def encode(self, elements: Elements) -> bytes:
        codes = elements - np.uint8(self.offset)
        if not self.bits:
            if codes.any():
                raise InputError(f"an element is not {self.offset}, which the codec 'constant' writes.")
            return b""
        return bit_packing.pack(codes, self.bits).tobytes()

    def decode(self, data: bytes | memoryview, count: int) -> Elements:
        if not self.bits:
            if len(data):
                raise InputError(f"a constant tensor is damaged: it has {len(data)} bytes of data.")
            return np.full(count, self.offset, np.uint8)
        codes = bit_packing.unpack(np.frombuffer(data, np.uint8), self.bits, count)
        return codes + np.uint8(self.offset)

    def config(self) -> bytes:
        return bytes([self.offset, self.bits])

    @staticmethod
    def read(source: Reader, read_child: ReadChild) -> "Packed":
        offset, bits = source.byte(), source.byte()
        if bits > 7:
            raise InputError(f"{source.what} is damaged: {bits}-bit codes (at most 7).")
        return Packed(offset, bits)


@dataclass(frozen=True)
class Planes:
    """Elements of several bytes as one plane for each byte, the most significant first.

    rotate: elements are first rotated left by one bit, so that of a float32 or bfloat16 the first plane is exactly
    the exponent and the sign, which is random, goes to the end
    """

    tag: ClassVar[int] = 5
    rotate: bool
    children: tuple[Codec, ...]

    @property
    def width(self) -> int:
        return len(self.children)

    @property
    def name(self) -> str:
        return "planes(" + " ".join(child.name for child in self.children) + ")"

    def split(self, elements: Elements) -> Iterator[Elements]:
        """Each plane in turn."""
        kind = WIDTHS[self.width]
        if self.rotate:
            elements = elements << kind(1) | elements >> kind(8 * self.width - 1)
        for i in reversed(range(self.width)):
            yield (elements >> kind(8 * i)).astype(np.uint8)

    def encode(self, elements: Elements) -> bytes:
        return join_parts([c.encode(plane) for c, plane in zip(self.children, self.split(elements), strict=True)])

    def decode(self, data: bytes | memoryview, count: int) -> Elements:
        kind = WIDTHS[self.width]
        elements = np.zeros(count, kind)
        for child, part in zip(self.children, split_parts(data, self.width), strict=True):
            elements = elements << kind(8) | child.decode(part, count)
        return elements << kind(8 * self.width - 1) | elements >> kind(1) if self.rotate else elements

    def config(self) -> bytes:
        return bytes([self.width, self.rotate])

    @staticmethod
    def read(source: Reader, read_child: ReadChild) -> "Planes":
        width, rotate = _width(source), source.byte()
        if width == 1 or rotate > 1:
            raise InputError(f"{source.what} is damaged: byte planes of {width} bytes, rotation {rotate}.")
        return Planes(bool(rotate), tuple(read_child(1) for _ in range(width)))


@dataclass(frozen=True)
class Sparse:
    """The elements that differ from `background`, and the distances between them, at most 2**gap_bits - 1."""

    tag: ClassVar[int] = 6
    background: int
    gap_bits: int
    children: tuple[Codec, Codec]

    @property
    def width(self) -> int:
        return self.children[1].width

    @property
    def name(self) -> str:
        gaps, values = self.children
        return f"sparse+{gaps.name}" if gaps.name == values.name else f"sparse+{gaps.name}+{values.name}"

    def encode(self, elements: Elements) -> bytes:
        gaps, values = sparse.split(elements, self.background, self.gap_bits)
        return varint(gaps.size) + join_parts([self.children[0].encode(gaps), self.children[1].encode(values)])

    def decode(self, data: bytes | memoryview, count: int) -> Elements:
        source = Reader(data, "a sparse tensor")
        entries = source.varint(count)
        parts = list(split_parts(source.take(source.left), 2))
        gaps, values = (child.decode(part, entries) for child, part in zip(self.children, parts, strict=True))
        return sparse.join(gaps, values, self.background, count)

    def config(self) -> bytes:
        return bytes([self.width, self.gap_bits]) + self.background.to_bytes(self.width, "little")

    @staticmethod
    def read(source: Reader, read_child: ReadChild) -> "Sparse":
        width, gap_bits = _width(source), source.byte()
        if not 1 <= gap_bits <= 8:
            raise InputError(f"{source.what} is damaged: relative indices of {gap_bits} bits.")
        background = int.from_bytes(source.take(width), "little")
        return Sparse(background, gap_bits, (read_child(1), read_child(width)))


@dataclass(frozen=True)
class Palette:
    """At most 256 different elements, listed once in rising order; bytes say which is where."""

    tag: ClassVar[int] = 7
    width: int
    values: tuple[int, ...]
    children: tuple[Codec]

    @property
    def name(self) -> str:
        return f"palette:{len(self.values)}({self.children[0].name})"

    def encode(self, elements: Elements) -> bytes:
        values = np.array(self.values, WIDTHS[self.width])
        codes = np.searchsorted(values, elements)
        if codes.max(initial=0) >= len(values) or (values[codes] != elements).any():
            raise InputError("an element is not in this codec's palette.")
        return self.children[0].encode(codes.astype(np.uint8))

    def decode(self, data: bytes | memoryview, count: int) -> Elements:
        codes = self.children[0].decode(data, count)
        if codes.max(initial=0) >= len(self.values):
            raise InputError(f"a palette tensor is damaged: code {codes.max()} of {len(self.values)} values.")
        return np.array(self.values, WIDTHS[self.width])[codes]

    def config(self) -> bytes:
        return bytes([self.width, len(self.values) - 1]) + np.array(self.values, WIDTHS[self.width]).tobytes()

    @staticmethod
    def read(source: Reader, read_child: ReadChild) -> "Palette":
        width, count = _width(source), source.byte() + 1
        values = np.frombuffer(source.take(width * count), WIDTHS[width])
        return Palette(width, tuple(values.tolist()), (read_child(1),))


@dataclass(frozen=True)
class Unpacked:
    """Bytes that hold several codes of `bits` bits (2 or 4) each, the first in the lowest bits: coded code by code."""

    tag: ClassVar[int] = 8
    bits: int
    children: tuple[Codec]
    width: ClassVar[int] = 1

    @property
    def name(self) -> str:
        return f"int{self.bits}({self.children[0].name})"

    def encode(self, elements: Elements) -> bytes:
        return self.children[0].encode(self.split(elements))

    def split(self, elements: Elements) -> Elements:
        """The codes, 8 / bits for each byte."""
        return bit_packing.unpack(elements, self.bits, elements.size * 8 // self.bits)

    def decode(self, data: bytes | memoryview, count: int) -> Elements:
        codes = self.children[0].decode(data, count * 8 // self.bits)
        if codes.max(initial=0) >> self.bits:
            raise InputError(f"a tensor of {self.bits}-bit codes is damaged: it holds the code {codes.max()}.")
        return bit_packing.pack(codes, self.bits)

    def config(self) -> bytes:
        return bytes([self.bits])

    @staticmethod
    def read(source: Reader, read_child: ReadChild) -> "Unpacked":
        bits = source.byte()
        if bits not in (2, 4):
            raise InputError(f"{source.what} is damaged: packed codes of {bits} bits.")
        return Unpacked(bits, (read_child(1),))


@dataclass(frozen=True)
class Varints:
    """The bytes of protobuf varints, coded number by number; each must be written as short as it can be.

    The child's elements are the low bytes of the numbers; signed: their sign fills the rest of the 64 bits.
    """

    tag: ClassVar[int] = 9
    signed: bool
    children: tuple[Codec]
    width: ClassVar[int] = 1

    @property
    def name(self) -> str:
        return f"varints({self.children[0].name})"

    def encode(self, elements: Elements) -> bytes:
        numbers = varints.parse(elements)
        if numbers is None:
            raise InputError("bytes that are not varints cannot be coded as varints.")
        return varint(numbers.size) + self.children[0].encode(numbers.astype(WIDTHS[self.children[0].width]))

    def decode(self, data: bytes | memoryview, count: int) -> Elements:
        source = Reader(data, "a tensor of varints")
        size = source.varint(count)
        numbers = self.children[0].decode(source.take(source.left), size)
        kind = f"{'i' if self.signed else 'u'}{self.children[0].width}"
        return varints.write(numbers.view(kind).astype(np.int64), count)

    def config(self) -> bytes:
        return bytes([self.children[0].width, self.signed])

    @staticmethod
    def read(source: Reader, read_child: ReadChild) -> "Varints":
        width, signed = _width(source), source.byte()
        if signed > 1:
            raise InputError(f"{source.what} is damaged: signedness {signed} of varints.")
        return Varints(bool(signed), (read_child(width),))


CODECS: dict[str, Any] = {
    "raw": Raw,
    "packed": Packed,
    "huffman": Huffman,
    "ans": Ans,
    "planes": Planes,
    "sparse": Sparse,
    "palette": Palette,
    "unpacked": Unpacked,
    "varints": Varints,
}
"""Name → codec class. A file names a codec by its `tag`, which never changes."""


def _width(source: Reader) -> int:
    width = source.byte()
    if width not in WIDTHS:
        raise InputError(f"{source.what} is damaged: elements of {width} bytes.")
    return width


def join_parts(parts: list[bytes]) -> bytes:
    """The length of each part but the last (varint), then the parts."""
    return b"".join([*(varint(len(part)) for part in parts[:-1]), *parts])


def split_parts(data: bytes | memoryview, count: int) -> Iterator[memoryview]:
    """The `count` parts that join_parts put together."""
    source = Reader(data, "a tensor of several parts")
    lengths = [source.varint(source.left) for _ in range(count - 1)]
    for length in lengths:
        yield source.take(length)
    yield source.take(source.left)
