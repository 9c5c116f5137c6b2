"""Canonical Huffman codes of at most 12 bits: whole bits for each symbol, several symbols a table look-up.

Source: Huffman 1952; lengths limited by package-merge (Larmore and Hirschberg 1990); the coder of Deep Compression
(Han et al. 2016, section 4). Long inputs are cut into four segments, decoded side by side.
"""

from dataclasses import dataclass
from itertools import pairwise
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from lowbit.errors import InputError
from lowbit.storage.kernel import kernel, load64, store64
from lowbit.storage.tables import SYMBOLS, Counts
from lowbit.storage.wire import BitReader, BitWriter, Reader, golomb_bits, unzigzag, varint, zigzag

MAX_LENGTH = 12
SEGMENTS = 4
ONE_SEGMENT_BYTES = 1 << 14
"""Below this many coded bytes one segment serves."""

Bytes = NDArray[np.uint8]


@dataclass(frozen=True)
class Huffman:
    """A canonical Huffman code.

    lengths[s] is the length of symbol s's code in bits, 0 if s does not occur; sum of 2**-length == 1
    codes of one length follow each other in the order of their symbols, shorter codes come first, the first is 0
    """

    tag: ClassVar[int] = 3
    name: ClassVar[str] = "huffman"
    width: ClassVar[int] = 1
    children: ClassVar[tuple[()]] = ()

    lengths: tuple[int, ...]

    @staticmethod
    def fit(counts: Counts) -> "Huffman":
        """The shortest code for symbols that occur `counts` (256,) times; at least two of them must occur."""
        return Huffman(tuple(_package_merge(counts).tolist()))

    def payload_bits(self, counts: Counts) -> float:
        """Bits that symbols occurring `counts` times will take; inf where one of them has no code."""
        lengths = np.array(self.lengths)
        if (lengths[counts > 0] == 0).any():
            return float("inf")
        total = float((counts * lengths).sum())
        return 8 + total + 4 if total < 8 * ONE_SEGMENT_BYTES else 8 + total + SEGMENTS * 4 + 24 * (SEGMENTS - 1)

    def _deltas(self) -> tuple[int, list[int]]:
        used = np.flatnonzero(self.lengths)
        shown = [0, *self.lengths[used[0] : used[-1] + 1]]
        return int(used[0]), [zigzag(b - a) for a, b in pairwise(shown)]

    def _order(self) -> int:
        return min(range(4), key=lambda order: sum(golomb_bits(delta, order) for delta in self._deltas()[1]))

    def config_bits(self) -> float:
        """Length of `config`, in bits."""
        order = self._order()
        return 18 + sum(golomb_bits(delta, order) for delta in self._deltas()[1])

    def config(self) -> bytes:
        """First symbol (8 bits), symbols described - 1 (8), Exp-Golomb order (2), each length less the one before."""
        first, deltas = self._deltas()
        order = self._order()
        writer = BitWriter()
        writer.write(first, 8)
        writer.write(len(deltas) - 1, 8)
        writer.write(order, 2)
        for delta in deltas:
            writer.golomb(delta, order)
        return writer.bytes()

    @staticmethod
    def read(source: Reader, read_child: Any = None) -> "Huffman":
        """The inverse of config. Lengths that are not a complete code are an InputError."""
        reader = BitReader(source)
        first, span, order = reader.read(8), reader.read(8) + 1, reader.read(2)
        if first + span > SYMBOLS:
            raise InputError(f"{source.what} is damaged: a Huffman code describes symbols {first}…{first + span - 1}.")
        lengths = [0] * SYMBOLS
        length = 0
        for symbol in range(first, first + span):
            length += unzigzag(reader.golomb(order))
            if not 0 <= length <= MAX_LENGTH:
                raise InputError(f"{source.what} is damaged: a Huffman code of {length} bits (at most {MAX_LENGTH}).")
            lengths[symbol] = length
        if sum(1 << MAX_LENGTH >> length for length in lengths if length) != 1 << MAX_LENGTH:
            raise InputError(f"{source.what} is damaged: the lengths of a Huffman code do not fit each other.")
        return Huffman(tuple(lengths))

    def encode(self, symbols: Bytes) -> bytes:
        """The number of segments (1 byte), the length of each but the last (varint), the segments."""
        lengths = np.array(self.lengths, np.int64)
        bits = int(_sum_of(lengths, symbols))
        if bits < 0:
            raise InputError("a symbol has no code in this Huffman code.")
        segments = 1 if bits < 8 * ONE_SEGMENT_BYTES else SEGMENTS
        out = np.empty(bits // 8 + 16 * segments, np.uint8)
        ends = _encode(symbols, segments, _codes(lengths), lengths, out)
        sizes = np.diff(ends, prepend=0).tolist()
        return b"".join([bytes([segments]), *(varint(size) for size in sizes[:-1]), out[: ends[-1]].tobytes()])

    def decode(self, data: bytes | memoryview, count: int) -> Bytes:
        """The `count` symbols of `encode`'s result. Every segment must end where its last symbol ends."""
        source = Reader(data, "a Huffman stream")
        segments = source.byte()
        if segments not in (1, SEGMENTS):
            raise InputError(f"a Huffman stream is damaged: it has {segments} segments, not 1 or {SEGMENTS}.")
        sizes = [source.varint(source.left) for _ in range(segments - 1)]
        ends = np.cumsum([*sizes, source.left - sum(sizes)])
        if (np.diff(ends, prepend=0) < 0).any():
            raise InputError("a Huffman stream is damaged: its segments are longer than it is.")
        padded = np.zeros(source.left + 8, np.uint8)  # so that words can be read at the last byte
        padded[:-8] = np.frombuffer(source.take(source.left), np.uint8)
        lengths = np.array(self.lengths, np.int64)
        symbols = np.empty(count, np.uint8)
        if not _decode(padded, ends, _table(_codes(lengths), lengths), symbols):
            raise InputError("a Huffman stream is damaged: it does not end where its symbols end.")
        return symbols


def _package_merge(counts: Counts) -> NDArray[np.int64]:
    """Code lengths of least total length, none above MAX_LENGTH.

    Each round pairs neighbours of the merged list of symbols and packages; a symbol's length is the number of rounds
    in which it is among the first 2 (n - 1) items that are taken, directly or inside a package.
    """
    used = np.flatnonzero(counts)
    order = used[np.argsort(counts[used], kind="stable")]
    leaves = counts[order]
    items = leaves
    is_leaf = [np.ones(len(leaves), bool)]
    for _ in range(MAX_LENGTH - 1):
        pairs = items[: len(items) & ~1].reshape(-1, 2).sum(axis=1)
        both = np.concatenate([leaves, pairs])
        by_weight = np.argsort(both, kind="stable")
        items = both[by_weight]
        is_leaf.append(by_weight < len(leaves))
    lengths = np.zeros(SYMBOLS, np.int64)
    taken = 2 * (len(leaves) - 1)
    for flags in reversed(is_leaf):
        symbols = int(flags[:taken].sum())
        lengths[order[:symbols]] += 1
        taken = 2 * (taken - symbols)
    return lengths


def _codes(lengths: NDArray[np.int64]) -> NDArray[np.int64]:
    """The canonical code of each symbol, its first bit in the least significant place."""
    codes = np.zeros(SYMBOLS, np.int64)
    following = 0
    for length in range(1, MAX_LENGTH + 1):
        following <<= 1
        for symbol in np.flatnonzero(lengths == length):
            codes[symbol] = int(f"{following:0{length}b}"[::-1], 2)
            following += 1
    return codes


@kernel
def _sum_of(lengths: Any, symbols: Any) -> int:
    """The sum of the symbols' lengths, or -1 if one of them is 0. Bounds: len(lengths) == 256."""
    total = 0
    missing = False
    for symbol in symbols:
        length = lengths[symbol]
        total += length
        missing |= length == 0
    return -1 if missing else total


@kernel
def _encode(symbols: Any, segments: int, codes: Any, lengths: Any, out: Any) -> Any:
    """Write the segments one after the other; return where each ends. Bounds: out has 16 bytes more a segment."""
    ends = np.empty(segments, np.int64)
    at = 0
    for i in range(segments):
        to, end = symbols.size * i // segments, symbols.size * (i + 1) // segments
        held = 0
        length = 0
        while to < end:
            for _ in range(min(4, end - to)):  # at most 7 + 4 * 12 bits are held
                symbol = symbols[np.uint64(to)]
                held |= codes[symbol] << length
                length += lengths[symbol]
                to += 1
            store64(out, at, held)
            at += length >> 3
            held >>= length & ~7
            length &= 7
        if length > 0:
            out[at] = held
            at += 1
        ends[i] = at
    return ends


@kernel
def _table(codes: Any, lengths: Any) -> Any:
    """(4096 + 256,) what the next 12 bits hold, then each symbol's length.

    Up to 6 symbols, the first in the lowest byte; << 48 the bits that they take; << 56 how many they are.
    """
    single = np.zeros(1 << MAX_LENGTH, np.int64)
    for symbol in range(codes.size):
        if lengths[symbol] > 0:
            for rest in range(1 << (MAX_LENGTH - lengths[symbol])):
                single[codes[symbol] | rest << lengths[symbol]] = lengths[symbol] << 8 | symbol
    table = np.empty((1 << MAX_LENGTH) + lengths.size, np.int64)
    for symbol in range(lengths.size):
        table[(1 << MAX_LENGTH) + symbol] = lengths[symbol]
    for bits in range(1 << MAX_LENGTH):
        entry = 0
        taken = 0
        count = 0
        while count < 6:
            code = single[bits >> taken]
            if taken + (code >> 8) > MAX_LENGTH:
                break
            entry |= (code & 255) << 8 * count
            taken += code >> 8
            count += 1
        table[bits] = entry | taken << 48 | count << 56
    return table


@kernel
def _decode(source: Any, ends: Any, table: Any, symbols: Any) -> bool:
    """Fill `symbols` from the segments that end at byte ends[i] of `source`; False if one ends early or late.

    Bounds: table is of _table, so that each look-up yields 1 to 6 symbols; `source` has 8 bytes after ends[-1].
    """
    segments = ends.size
    at = np.empty(4, np.int64)  # the next bit of each segment
    to = np.empty(4, np.int64)  # the next symbol of each segment
    stop = np.empty(4, np.int64)
    for i in range(segments):
        at[i] = ends[i - 1] * 8 if i > 0 else 0
        to[i], stop[i] = symbols.size * i // segments, symbols.size * (i + 1) // segments
    if segments == 4:
        _decode_rounds(source, ends, table, symbols, at, to, stop)
    for i in range(segments):
        while to[i] < stop[i]:
            entry = table[load64(source, at[i] >> 3) >> (at[i] & 7) & 4095]
            if to[i] + 8 <= stop[i]:
                store64(symbols, to[i], entry)
                to[i] += entry >> 56
                at[i] += entry >> 48 & 255
            else:
                symbols[to[i]] = entry & 255
                to[i] += 1
                at[i] += table[4096 + (entry & 255)]
            if at[i] > ends[i] * 8:
                return False
        if at[i] + 7 >> 3 != ends[i]:
            return False
    return True


@kernel
def _decode_rounds(source: Any, ends: Any, table: Any, symbols: Any, at: Any, to: Any, stop: Any) -> None:
    """Four look-ups in each of four segments, until one of them comes near its end."""
    a0, a1, a2, a3 = at[0], at[1], at[2], at[3]
    t0, t1, t2, t3 = to[0], to[1], to[2], to[3]
    while True:
        # A round takes at most 48 bits and 24 symbols of a segment, and writes 2 bytes past them.
        bits = min(min(ends[0] * 8 - a0, ends[1] * 8 - a1), min(ends[2] * 8 - a2, ends[3] * 8 - a3))
        room = min(min(stop[0] - t0, stop[1] - t1), min(stop[2] - t2, stop[3] - t3))
        safe = min(bits // 48, (room - 2) // 24)
        if safe <= 0:
            break
        for _ in range(safe):
            b0, b1 = load64(source, a0 >> 3) >> (a0 & 7), load64(source, a1 >> 3) >> (a1 & 7)
            b2, b3 = load64(source, a2 >> 3) >> (a2 & 7), load64(source, a3 >> 3) >> (a3 & 7)
            for _ in range(4):
                e0, e1 = table[np.uint64(b0 & 4095)], table[np.uint64(b1 & 4095)]
                e2, e3 = table[np.uint64(b2 & 4095)], table[np.uint64(b3 & 4095)]
                store64(symbols, t0, e0)
                store64(symbols, t1, e1)
                store64(symbols, t2, e2)
                store64(symbols, t3, e3)
                t0, t1, t2, t3 = t0 + (e0 >> 56), t1 + (e1 >> 56), t2 + (e2 >> 56), t3 + (e3 >> 56)
                n0, n1, n2, n3 = e0 >> 48 & 255, e1 >> 48 & 255, e2 >> 48 & 255, e3 >> 48 & 255
                b0, b1, b2, b3 = b0 >> n0, b1 >> n1, b2 >> n2, b3 >> n3
                a0, a1, a2, a3 = a0 + n0, a1 + n1, a2 + n2, a3 + n3
    at[0], at[1], at[2], at[3] = a0, a1, a2, a3
    to[0], to[1], to[2], to[3] = t0, t1, t2, t3
