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
    """Bits of a byte source, taken whole byte by whole byte."""

    def __init__(self, source: Bytes) -> None:
        self.source, self.held, self.count = source, 0, 0

    def read(self, bits: int) -> int:
        while self.count < bits:
            self.held |= self.source.number(1) << self.count
            self.count += 8
        value = self.held & ((1 << bits) - 1)
        self.held >>= bits
        self.count -= bits
        return value

    def golomb(self, order: int) -> int:
        zeros = 0
        while not self.read(1):
            zeros += 1
        head = (1 << zeros) | self.read(zeros)
        return (head - 1 << order) | self.read(order)


def unzigzag(value: int) -> int:
    return value // 2 if value % 2 == 0 else -(value + 1) // 2


def blob(data: bytes) -> bytes:
    source = Bytes(data)
    form, size, crc = source.number(1), source.varint(), source.number(4)
    rest = source.rest()
    if form == 1:
        rest = zlib.decompress(rest, -15)
    if form == 2:
        rest = lzma.decompress(rest, lzma.FORMAT_RAW, filters=[{"id": lzma.FILTER_LZMA2, "dict_size": 1 << 24}])
    assert (len(rest), zlib.crc32(rest)) == (size, crc)
    return rest


def parts(data: bytes, count: int) -> list[bytes]:
    source = Bytes(data)
    lengths = [source.varint() for _ in range(count - 1)]
    return [source.take(length) for length in lengths] + [source.rest()]


def bounds(count: int, segments: int) -> list[tuple[int, int]]:
    return [(count * i // segments, count * (i + 1) // segments) for i in range(segments)]


def segments_of(data: bytes) -> list[bytes]:
    assert data[0] in (1, 4)
    return parts(data[1:], data[0])


def frequency_table(bits: Bits, size: int) -> list[int]:
    first, span, mantissa, stride, order = bits.read(8), bits.read(8) + 1, bits.read(2), bits.read(3), bits.read(2)
    knots = [bits.golomb(order)]
    for _ in range(-(-(span - 1) // 2**stride)):
        knots.append(knots[-1] + unzigzag(bits.golomb(order)))
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
    bits = Bits(source)
    power = bits.read(4) + 5
    size = 1 << power
    frequencies = frequency_table(bits, size)
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
            stream = Bits(Bytes(segment))
            while not stream.read(1):
                pass
            state = stream.read(power)
            for _ in range(start, stop):
                symbol, fresh, following = table[state]
                symbols.append(symbol)
                state = following + stream.read(fresh)
            assert state == 0
            assert stream.count == 0
            assert stream.source.rest() == b""
        return symbols

    return 1, decode


def read_huffman(source: Bytes) -> Any:
    bits = Bits(source)
    first, span, order = bits.read(8), bits.read(8) + 1, bits.read(2)
    lengths = []
    for _ in range(span):
        lengths.append((lengths[-1] if lengths else 0) + unzigzag(bits.golomb(order)))
    codes = {}
    code = 0
    before = 0
    for length, symbol in sorted((length, first + i) for i, length in enumerate(lengths) if length):
        code <<= length - before
        codes[length, code] = symbol
        code, before = code + 1, length
    assert code == 1 << before

    def decode(data: bytes, count: int) -> list[int]:
        symbols = []
        segments = segments_of(data)
        for segment, (start, stop) in zip(segments, bounds(count, len(segments)), strict=True):
            stream = Bits(Bytes(segment))
            for _ in range(start, stop):
                length, code = 1, stream.read(1)
                while (length, code) not in codes:
                    length, code = length + 1, code << 1 | stream.read(1)
                symbols.append(codes[length, code])
            assert stream.source.rest() == b""
        return symbols

    return 1, decode


def read_codec(source: Bytes, known: list[Any]) -> Any:
    """(width, decode(payload, count) → list of unsigned integers)."""
    tag = source.number(1)
    if tag == 0:
        return known[source.varint()]
    if tag in (3, 4):
        known.append((read_huffman if tag == 3 else read_ans)(source))
        return known[-1]
    if tag == 1:
        width = source.number(1)
        return width, lambda data, count: [
            int.from_bytes(data[i * width : (i + 1) * width], "little") for i in range(count)
        ]
    if tag == 2:
        offset, bits = source.number(1), source.number(1)

        def unpack(data: bytes, count: int) -> list[int]:
            stream = Bits(Bytes(data))
            return [(stream.read(bits) + offset) % 256 for _ in range(count)]

        return 1, unpack
    if tag == 8:
        bits = source.number(1)
        codes = read_codec(source, known)[1]

        def repack(data: bytes, count: int) -> list[int]:
            each, loose = 8 // bits, codes(data, count * 8 // bits)
            return [
                sum(code << bits * j for j, code in enumerate(loose[i : i + each])) for i in range(0, len(loose), each)
            ]

        return 1, repack
    if tag == 7:
        width, count_ = source.number(1), source.number(1) + 1
        values = [source.number(width) for _ in range(count_)]
        codes = read_codec(source, known)[1]
        return width, lambda data, count: [values[code] for code in codes(data, count)]
    if tag == 9:
        return 1, read_varints(source, known)
    if tag == 5:
        width, rotate = source.number(1), source.number(1)
        children = [read_codec(source, known)[1] for _ in range(width)]
        return width, lambda data, count: join_planes(
            [child(part, count) for child, part in zip(children, parts(data, width), strict=True)], rotate
        )
    assert tag == 6
    width, _, background = source.number(1), source.number(1), 0
    background = source.number(width)
    gaps_of, values_of = read_codec(source, known)[1], read_codec(source, known)[1]

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

    return width, spread


def join_planes(planes: list[list[int]], rotate: int) -> list[int]:
    bits = 8 * len(planes)
    elements = [int.from_bytes(element, "big") for element in zip(*planes, strict=True)]
    return [(e >> 1) | (e & 1) << bits - 1 for e in elements] if rotate else elements


def read_varints(source: Bytes, known: list[Any]) -> Any:
    width, signed = source.number(1), source.number(1)
    numbers_of = read_codec(source, known)[1]

    def decode(data: bytes, count: int) -> list[int]:
        payload = Bytes(data)
        size = payload.varint()
        out: list[int] = []
        for number in numbers_of(payload.rest(), size):
            if signed and number >> 8 * width - 1:
                number += (1 << 64) - (1 << 8 * width)
            while number > 127:
                out.append(number & 127 | 128)
                number >>= 7
            out.append(number)
        assert len(out) == count
        return out

    return decode


def multiplied(data: bytes, factor: bytes) -> bytes:
    """A product of two float32 is exact in Python's float64, and rounded once when it is packed."""
    (by,) = struct.unpack("<f", factor)
    return b"".join(struct.pack("<f", number * by) for (number,) in struct.iter_unpack("<f", data))


def unpack(container: bytes) -> dict[str, bytes]:
    """Name → contents of every file; the model's name is empty."""
    length = int.from_bytes(container[:8], "little")
    header = json.loads(container[8 : 8 + length])
    assert header["__metadata__"] == {"lowbit": "1"}
    part = {
        name: container[8 + length + header[name]["data_offsets"][0] : 8 + length + header[name]["data_offsets"][1]]
        for name in ("data", "program", "index")
    }
    index, payloads, program = Bytes(blob(part["index"])), Bytes(part["data"]), Bytes(blob(part["program"]))
    assert index.number(1) in (1, 2)
    files: list[Any] = []
    sizes: list[int] = []
    for _ in range(index.varint()):
        name, size, digest, cuts = index.take(index.varint()).decode(), index.varint(), index.take(32), []
        for _ in range(index.varint()):
            skip, cut_length, place = index.varint(), index.varint(), index.varint()
            unit = len(sizes) if place == 0 else len(sizes) - 1 - (place - 1) // 3
            if place == 0:
                sizes.append(0)
            offset = sizes[unit] if place == 0 or place % 3 == 1 else index.varint()
            factor = index.take(4) if place and place % 3 == 0 else b""
            sizes[unit] = max(sizes[unit], offset + cut_length)
            cuts.append((skip, cut_length, unit, offset, factor))
        files.append((name, size, digest, cuts))
    units = []
    known: list[Any] = []
    for size in sizes:
        width, decode = read_codec(index, known)
        payload, crc = payloads.take(index.varint()), index.number(4)
        units.append(b"".join(e.to_bytes(width, "little") for e in decode(payload, size // width)))
        assert (len(units[-1]), zlib.crc32(units[-1])) == (size, crc)
    restored = {}
    for name, size, digest, cuts in files:
        out = b""
        for skip, cut_length, unit, offset, factor in cuts:
            repeated = units[unit][offset : offset + cut_length]
            out += program.take(skip) + (multiplied(repeated, factor) if factor else repeated)
        out += program.take(size - len(out))
        assert sha256(out).digest() == digest
        restored[name] = out
    return restored
