"""A second reader of `.lowbit` files, written from docs/container.md alone: nothing but Python's standard library."""

import json
import lzma
import struct
import zlib
from hashlib import sha256
from typing import Any


class Bytes:
    def __init__(self, data: bytes) -> None:
        self.data, self.at = data, 0

    def take(self, count: int) -> bytes:
        assert 0 <= count <= len(self.data) - self.at
        self.at += count
        return self.data[self.at - count : self.at]

    def number(self, count: int) -> int:
        return int.from_bytes(self.take(count), "little")

    def varint(self) -> int:
        value = shift = 0
        while True:
            digit = self.number(1)
            value |= (digit & 127) << shift
            shift += 7
            if digit < 128:
                return value

    def rest(self) -> bytes:
        return self.take(len(self.data) - self.at)


class Bits:
    """Bits of a byte string, the first in the lowest place of its first byte."""

    def __init__(self, data: bytes) -> None:
        self.held, self.left = int.from_bytes(data, "little"), 8 * len(data)

    def read(self, bits: int) -> int:
        assert bits <= self.left
        value = self.held & ((1 << bits) - 1)
        self.held >>= bits
        self.left -= bits
        return value


def unzigzag(value: int) -> int:
    return value // 2 if value % 2 == 0 else -(value + 1) // 2


def parts(data: bytes, count: int) -> list[bytes]:
    source = Bytes(data)
    lengths = [source.varint() for _ in range(count - 1)]
    return [source.take(length) for length in lengths] + [source.rest()]


def bounds(count: int, segments: int) -> list[tuple[int, int]]:
    return [(count * i // segments, count * (i + 1) // segments) for i in range(segments)]


def segments_of(data: bytes) -> list[bytes]:
    assert data[0] in (1, 4)
    return parts(data[1:], data[0])


def frequency_table(source: Bytes, size: int) -> list[int]:
    first, span, mantissa, stride = source.varint(), source.varint() + 1, source.varint(), source.varint()
    knots = [0]
    for _ in range(-(-(span - 1) // 2**stride) + 1):
        knots.append(knots[-1] + unzigzag(source.varint()))
    knots = knots[1:]
    weights = [0] * 256
    m = 1 << mantissa
    for i in range(span):
        a, r = i >> stride, i % 2**stride
        following = knots[a + 1] if a + 1 < len(knots) else knots[a]
        level = (knots[a] * (2**stride - r) + following * r) >> stride
        weights[first + i] = level if level < m else (m + level % m) << (level // m - 1)
    total = sum(weights)
    frequencies = [max(1, w * size // total) if w else 0 for w in weights]
    missing = size - sum(frequencies)
    remainders = [w * size % total if w * size >= total else 0 for w in weights]
    for symbol in sorted(range(256), key=lambda s: (-remainders[s], s))[: max(0, missing)]:
        frequencies[symbol] += 1
    for _ in range(-missing):
        frequencies[frequencies.index(max(frequencies))] -= 1
    return frequencies


def read_ans(source: Bytes) -> Any:
    power = source.varint() + 5
    size = 1 << power
    frequencies = frequency_table(source, size)
    slots = [0] * size
    at = 0
    for symbol, frequency in enumerate(frequencies):
        for _ in range(frequency):
            slots[at] = symbol
            at = (at + size // 2 + size // 8 + 3) % size
    table = []
    seen = [0] * 256
    for symbol in slots:
        x = frequencies[symbol] + seen[symbol]
        seen[symbol] += 1
        fresh = 0
        while x << fresh < size:
            fresh += 1
        table.append((symbol, fresh, (x << fresh) - size))

    def decode(data: bytes, count: int) -> list[int]:
        symbols = []
        segments = segments_of(data)
        for segment, (start, stop) in zip(segments, bounds(count, len(segments)), strict=True):
            stream = Bits(segment)
            while not stream.read(1):
                pass
            state = stream.read(power)
            for _ in range(start, stop):
                symbol, fresh, following = table[state]
                symbols.append(symbol)
                state = following + stream.read(fresh)
            assert state == 0
            assert stream.left == 0
        return symbols

    return decode


def read_codec(source: Bytes, width: int) -> Any:
    """decode(payload, count) → list of unsigned integers of `width` bytes."""
    tag = source.varint()
    if tag == 0:
        return lambda data, count: [int.from_bytes(data[i * width : (i + 1) * width], "little") for i in range(count)]
    if tag == 1:
        return read_ans(source)
    if tag == 2:
        bits, rotate = source.varint(), source.varint()
        children = [read_codec(source, 1) for _ in range(8 * width // bits)]

        def merge(data: bytes, count: int) -> list[int]:
            elements = [0] * count
            for child, part in zip(children, parts(data, len(children)), strict=True):
                elements = [e << bits | field for e, field in zip(elements, child(part, count), strict=True)]
            return [(e >> 1) | (e & 1) << 8 * width - 1 for e in elements] if rotate else elements

        return merge
    if tag == 4:
        values = [source.varint() for _ in range(source.varint() + 1)]
        codes = read_codec(source, 1)
        return lambda data, count: [sum(values[: code + 1]) for code in codes(data, count)]
    assert tag == 3
    background = source.varint()
    gaps_of, values_of = read_codec(source, 1), read_codec(source, width)

    def spread(data: bytes, count: int) -> list[int]:
        payload = Bytes(data)
        entries = payload.varint()
        first, second = parts(payload.rest(), 2)
        elements = [background] * count
        at = -1
        for gap, value in zip(gaps_of(first, entries), values_of(second, entries), strict=True):
            at += gap + 1
            elements[at] = value
        return elements

    return spread


def multiplied(data: bytes, factor: int) -> bytes:
    """A product of two float32 is exact in Python's float64, and rounded once when it is packed."""
    (by,) = struct.unpack("<f", factor.to_bytes(4, "little"))
    return b"".join(struct.pack("<f", number * by) for (number,) in struct.iter_unpack("<f", data))


def unpack(container: bytes) -> dict[str, bytes]:
    """Name → contents of every file; the model's name is empty."""
    length = int.from_bytes(container[:8], "little")
    header = json.loads(container[8 : 8 + length])
    assert header["__metadata__"] == {"lowbit": "2"}
    start, middle = (8 + length + offset for offset in header["data"]["data_offsets"])
    payloads, squeezed = Bytes(container[start:middle]), Bytes(container[middle:])
    size, crc = squeezed.varint(), squeezed.number(4)
    filters = [{"id": lzma.FILTER_LZMA2, "dict_size": 1 << 24}]
    inside = lzma.decompress(squeezed.rest(), lzma.FORMAT_RAW, filters=filters)
    assert (len(inside), zlib.crc32(inside)) == (size, crc)
    index = Bytes(inside)
    units = []
    for _ in range(index.varint()):
        width, size, payload_bytes, crc = index.varint(), index.varint(), index.varint(), index.number(4)
        elements = read_codec(index, width)(payloads.take(payload_bytes), size // width)
        units.append(b"".join(e.to_bytes(width, "little") for e in elements))
        assert (len(units[-1]), zlib.crc32(units[-1])) == (size, crc)
    files = []
    for _ in range(index.varint()):
        name, digest, size, count = index.take(index.varint()).decode(), index.take(32), index.varint(), index.varint()
        files.append((name, digest, size, [[index.varint() for _ in range(count)] for _ in range(5)]))
    restored = {}
    for name, digest, size, columns in files:
        out = b""
        for skip, cut_length, unit, offset, factor in zip(*columns, strict=True):
            kept = units[unit][offset : offset + cut_length]
            out += index.take(skip) + (multiplied(kept, factor) if factor else kept)
        out += index.take(size - len(out))
        assert sha256(out).digest() == digest
        restored[name] = out
    assert index.rest() == b""
    return restored
