"""Codecs: exact ways to write an array of unsigned integers (a tensor's bytes, whatever they mean) in fewer bytes.

A codec's description (frequency tables and the like) and its payload are written apart: descriptions stand together in
the index of a container, where LZMA finds what they have in common.
"""

from dataclasses import dataclass
from itertools import accumulate
from typing import Any, ClassVar, Protocol

import numpy as np
from numpy.typing import NDArray

from lowbit.errors import InputError
from lowbit.storage.ans import Ans
from lowbit.storage.wire import Reader, join, numbers

Elements = NDArray[Any]

WIDTHS: dict[int, Any] = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}
MAX_DEPTH = 2
"""Planes of what is sparse, of a palette's codes or of a sparse tensor's values; no codec needs more."""


class Codec(Protocol):
    """What every codec keeps.

    decode(encode(elements), len(elements)) == elements, bit for bit
    decode accepts any bytes: what encode could not have written is an InputError, found before more is allocated
    than the `count` elements asked for
    children are the codecs of the parts that this one splits its elements into; numbers() describe the rest of it
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
    def numbers(self) -> list[int]: ...


@dataclass(frozen=True)
class Raw:
    """Elements of `width` bytes as they are, little-endian."""

    tag: ClassVar[int] = 0
    name: ClassVar[str] = "raw"
    children: ClassVar[tuple[Codec, ...]] = ()
    width: int = 1

    def encode(self, elements: Elements) -> bytes:
        return elements.tobytes()

    def decode(self, data: bytes | memoryview, count: int) -> Elements:
        if len(data) != count * self.width:
            raise InputError(f"raw data is damaged: {count} elements of {self.width} bytes in {len(data)} bytes.")
        return np.frombuffer(data, WIDTHS[self.width])

    def numbers(self) -> list[int]:
        return []


@dataclass(frozen=True)
class Planes:
    """Elements cut into fields of `bits` bits, one plane of bytes for each, the most significant first.

    bits     8: the bytes of wider elements; 2 or 4: the codes that share a byte
    rotate   elements are first rotated left by one bit, so that of a float32 or bfloat16 the first plane is exactly
             the exponent and the sign, which is random, goes to the end
    """

    tag: ClassVar[int] = 2
    width: int
    bits: int
    rotate: bool
    children: tuple[Codec, ...]

    @property
    def name(self) -> str:
        names = [child.name for child in self.children]
        return f"planes({names[0]})" if len(set(names)) == 1 else f"planes({' '.join(names)})"

    @property
    def shifts(self) -> range:
        """Where each field begins in its element."""
        return range(8 * self.width - self.bits, -1, -self.bits)

    def split(self, elements: Elements) -> list[Elements]:
        """The planes."""
        kind = WIDTHS[self.width]
        if self.rotate:
            elements = elements << kind(1) | elements >> kind(8 * self.width - 1)
        return [(elements >> kind(shift) & kind((1 << self.bits) - 1)).astype(np.uint8) for shift in self.shifts]

    def encode(self, elements: Elements) -> bytes:
        return join([child.encode(part) for child, part in zip(self.children, self.split(elements), strict=True)])

    def decode(self, data: bytes | memoryview, count: int) -> Elements:
        kind = WIDTHS[self.width]
        elements = np.zeros(count, kind)
        parts = Reader(data, "a tensor of planes").parts(len(self.children))
        for child, part, shift in zip(self.children, parts, self.shifts, strict=True):
            elements |= child.decode(part, count).astype(kind) << kind(shift)
        return elements << kind(8 * self.width - 1) | elements >> kind(1) if self.rotate else elements

    def numbers(self) -> list[int]:
        return [self.bits, self.rotate]


@dataclass(frozen=True)
class Sparse:
    """The elements that differ from `background`, and the gaps between them.

    gaps[i] elements of the background lie before values[i]; a gap of 255 may be followed by the background itself, a
    filler, from which counting goes on. Source: relative indices, Han et al. 2016 (arXiv 1510.00149), section 3.
    """

    tag: ClassVar[int] = 3
    background: int
    children: tuple[Codec, Codec]

    @property
    def width(self) -> int:
        return self.children[1].width

    @property
    def name(self) -> str:
        gaps, values = self.children
        return f"sparse+{gaps.name}" if gaps.name == values.name else f"sparse+{gaps.name}+{values.name}"

    @staticmethod
    def split(elements: Elements, background: int) -> tuple[Elements, Elements]:
        """(m,) gaps and (m,) the element that follows each. What comes after the last one is background."""
        at = np.flatnonzero(elements != background)
        fillers, gaps = np.divmod(np.diff(at, prepend=-1) - 1, 256)
        ends = np.cumsum(fillers + 1) - 1
        all_gaps = np.full(at.size + fillers.sum(), 255, np.uint8)
        values = np.full(all_gaps.size, background, elements.dtype)
        all_gaps[ends], values[ends] = gaps, elements[at]
        return all_gaps, values

    def encode(self, elements: Elements) -> bytes:
        gaps, values = self.split(elements, self.background)
        return numbers([gaps.size]) + join([self.children[0].encode(gaps), self.children[1].encode(values)])

    def decode(self, data: bytes | memoryview, count: int) -> Elements:
        source = Reader(data, "a sparse tensor")
        entries = source.number(count)
        gaps, values = (child.decode(part, entries) for child, part in zip(self.children, source.parts(2), strict=True))
        at = np.cumsum(gaps + np.int64(1)) - 1
        if entries and at[-1] >= count:
            raise InputError(f"a sparse tensor is damaged: its entries lie beyond its {count} elements.")
        elements = np.full(count, self.background, WIDTHS[self.width])
        elements[at] = values
        return elements

    def numbers(self) -> list[int]:
        return [self.background]


@dataclass(frozen=True)
class Palette:
    """At most 256 different elements, listed once in rising order; bytes say which is where."""

    tag: ClassVar[int] = 4
    width: int
    values: tuple[int, ...]
    children: tuple[Codec]

    @property
    def name(self) -> str:
        return f"palette:{len(self.values)}({self.children[0].name})"

    def encode(self, elements: Elements) -> bytes:
        codes = np.searchsorted(np.array(self.values, WIDTHS[self.width]), elements)
        return self.children[0].encode(codes.astype(np.uint8))

    def decode(self, data: bytes | memoryview, count: int) -> Elements:
        codes = self.children[0].decode(data, count)
        if codes.max(initial=0) >= len(self.values):
            raise InputError(f"a palette tensor is damaged: code {codes.max()} of {len(self.values)} values.")
        return np.array(self.values, WIDTHS[self.width])[codes]

    def numbers(self) -> list[int]:
        steps = (after - before for before, after in zip((0, *self.values), self.values, strict=False))
        return [len(self.values) - 1, *steps]


CODECS: tuple[type[Any], ...] = (Raw, Ans, Planes, Sparse, Palette)
"""A file names a codec by its `tag`, its place in this table."""


def describe(codec: Codec) -> bytes:
    """The description of `codec`: its tag, its numbers, its children's descriptions."""
    return numbers([codec.tag, *codec.numbers()]) + b"".join(map(describe, codec.children))


def read_codec(source: Reader, width: int, depth: int = 0) -> Codec:
    """The inverse of describe, for elements of `width` bytes."""
    if depth > MAX_DEPTH:
        raise InputError(f"{source.what} is damaged: codecs inside codecs, {depth} deep (at most {MAX_DEPTH}).")
    tag = source.number()
    if tag == Raw.tag:
        return Raw(width)
    if tag == Sparse.tag:
        background = source.number(2 ** (8 * width) - 1)
        return Sparse(background, (read_codec(source, 1, depth + 1), read_codec(source, width, depth + 1)))
    if tag == Ans.tag and width == 1:
        return Ans.read(source)
    if tag == Planes.tag:
        bits, rotate = source.number(8), source.number(1)
        if bits not in (2, 4, 8) or bits == 8 * width:
            raise InputError(f"{source.what} is damaged: {width}-byte elements in fields of {bits} bits.")
        fields = 8 * width // bits
        return Planes(width, bits, bool(rotate), tuple(read_codec(source, 1, depth + 1) for _ in range(fields)))
    if tag == Palette.tag and width > 1:
        values = tuple(accumulate(source.column(source.number(255) + 1)))
        if values[-1] >> 8 * width:
            raise InputError(f"{source.what} is damaged: a value of a palette is over {width} bytes.")
        return Palette(width, values, (read_codec(source, 1, depth + 1),))
    raise InputError(
        f"{source.what} needs codec {tag} for {width}-byte elements, which this lowbit does not have; upgrade it."
    )
