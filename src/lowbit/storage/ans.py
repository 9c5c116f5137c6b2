"""Asymmetric numeral systems with tables (tANS): any distribution at its entropy, one table look-up a symbol.

Source: Duda 2013 (arXiv 1311.2540). The state is a number below 2**bits; decoding looks it up, yields a symbol, and
moves to a next state completed by a few fresh bits. Long inputs are cut into four segments with a state each, because
four chains of look-ups run side by side where one would wait for memory: on one core of a 2024 server four decode
1.7 GB/s of symbols, and the range variant (rANS, one multiplication a symbol) needs more work for the same bits.
"""

from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from lowbit.errors import InputError
from lowbit.machine_code import kernel
from lowbit.storage import tables
from lowbit.storage.tables import Counts, Table
from lowbit.storage.wire import Reader, join
from lowbit.storage.words import load64, store64

MIN_BITS, MAX_BITS = 5, 14
SEGMENTS = 4
ONE_SEGMENT_BYTES = 1 << 14
"""Below this many coded bytes one segment serves: three more would cost 0.1 % or more."""

Bytes = NDArray[np.uint8]


@dataclass(frozen=True)
class Ans:
    """tANS over symbols 0 … 255 whose frequencies `table` describes, with 2**bits states."""

    tag: ClassVar[int] = 1
    name: ClassVar[str] = "ans"
    width: ClassVar[int] = 1
    children: ClassVar[tuple[()]] = ()

    table: Table
    bits: int
    frequencies: Counts = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "frequencies", tables.normalize(self.table.weights(), 1 << self.bits))

    @staticmethod
    def fit(counts: Counts) -> "Ans":
        """The coder that makes table and payload shortest for symbols that occur `counts` (256,) times."""
        table = tables.fit(counts)
        fewest = max(MIN_BITS, int((table.weights() > 0).sum() - 1).bit_length())
        coders = [Ans(table, bits) for bits in range(fewest, MAX_BITS + 1)]
        costs = [coder.payload_bits(counts) for coder in coders]
        # A table that fits the nearest cache decodes a third faster than one of 2**14 states: 0.02 % is worth that.
        return next(coder for coder, cost in zip(coders, costs, strict=True) if cost <= min(costs) * 1.0002)

    def payload_bits(self, counts: Counts) -> float:
        """Bits that symbols occurring `counts` times will take; inf where one of them is not in the table."""
        used = counts > 0
        if (self.frequencies[used] == 0).any():
            return float("inf")
        ideal = float((counts[used] * (self.bits - np.log2(self.frequencies[used]))).sum())
        segments = 1 if ideal < 8 * ONE_SEGMENT_BYTES else SEGMENTS
        return 8 + ideal + segments * (self.bits + 6) + 24 * (segments - 1)

    def numbers(self) -> list[int]:
        """bits - 5, then the table."""
        return [self.bits - MIN_BITS, *self.table.numbers()]

    @staticmethod
    def read(source: Reader) -> "Ans":
        """The coder of these numbers."""
        bits = source.number(MAX_BITS - MIN_BITS) + MIN_BITS
        return Ans(Table.read(source), bits)

    def encode(self, symbols: Bytes) -> bytes:
        """The number of segments (1 byte), the length of each but the last, the segments."""
        counts = histogram(symbols)
        bits = self.payload_bits(counts)
        if bits == float("inf"):
            missing = int(np.flatnonzero((counts > 0) & (self.frequencies == 0))[0])
            raise InputError(f"symbol {missing} is not in this coder's frequency table.")
        segments = 1 if bits < 8 * ONE_SEGMENT_BYTES else SEGMENTS
        room = -(-symbols.size // segments) * self.bits // 8 + 24
        buffer = np.empty(room * segments, np.uint8)
        following, shift, offset = _encoding_tables(self.frequencies, self.bits)
        starts = _encode(symbols, segments, following, shift, offset, self.bits, buffer, room)
        parts = [buffer[start : (i + 1) * room].tobytes() for i, start in enumerate(starts.tolist())]
        return bytes([segments]) + join(parts)

    def decode(self, data: bytes | memoryview, count: int) -> Bytes:
        """The `count` symbols of `encode`'s result. Every segment must end where, and as, it should."""
        source = Reader(data, "an ANS stream")
        segments = source.number()
        if segments not in (1, SEGMENTS):
            raise InputError(f"an ANS stream is damaged: it has {segments} segments, not 1 or {SEGMENTS}.")
        parts = source.parts(segments)
        if not all(parts):
            raise InputError("an ANS stream is damaged: one of its segments is empty.")
        padded = np.frombuffer(b"".join([*parts, bytes(8)]), np.uint8)  # so that words can be read at the last byte
        ends = np.cumsum([len(part) for part in parts])
        symbols = np.empty(count, np.uint8)
        if not _decode(padded, ends, _decoding_table(self.frequencies, self.bits), self.bits, symbols):
            raise InputError("an ANS stream is damaged: it does not end where its symbols end.")
        return symbols


@kernel
def histogram(symbols: Any) -> Any:
    """(256,) how often each byte occurs. Four counters each: one would wait for its own last store in runs."""
    counts = np.zeros((4, 256), np.int64)
    n = symbols.size & ~3
    for i in range(0, n, 4):
        counts[0, symbols[i]] += 1
        counts[1, symbols[i + 1]] += 1
        counts[2, symbols[i + 2]] += 1
        counts[3, symbols[i + 3]] += 1
    for i in range(n, symbols.size):
        counts[0, symbols[i]] += 1
    for symbol in range(256):
        counts[0, symbol] += counts[1, symbol] + counts[2, symbol] + counts[3, symbol]
    return counts[0]


@kernel
def _spread(frequencies: Any, bits: int) -> Any:
    """(2**bits,) the symbol of each state: symbol by symbol, a step of 5/8 of the table + 3 from slot to slot."""
    size = 1 << bits
    states = np.empty(size, np.uint8)
    at = 0
    for symbol in range(frequencies.size):
        for _ in range(frequencies[symbol]):
            states[at] = symbol
            at = (at + (size >> 1) + (size >> 3) + 3) & (size - 1)
    return states


@kernel
def _decoding_table(frequencies: Any, bits: int) -> Any:
    """(2**bits,) for each state: next state's start << 16 | fresh bits << 8 | symbol; start + 2**fresh <= 2**bits."""
    size = 1 << bits
    states = _spread(frequencies, bits)
    seen = np.empty(frequencies.size, np.int64)
    for symbol in range(frequencies.size):
        seen[symbol] = frequencies[symbol]
    table = np.empty(size, np.uint32)
    for state in range(size):
        symbol = states[state]
        x = seen[symbol]
        seen[symbol] += 1
        fresh = 0
        while x << fresh < size:
            fresh += 1
        table[state] = (x << fresh) - size << 16 | fresh << 8 | symbol
    return table


@kernel
def _encoding_tables(frequencies: Any, bits: int) -> Any:
    """What undoes _decoding_table, x being size + state.

    The symbol s takes n = (x + shift[s]) >> 16 bits off x, and the next x is following[(x >> n) + offset[s]].
    """
    size = 1 << bits
    states = _spread(frequencies, bits)
    offset = np.empty(frequencies.size, np.int64)
    filled = np.empty(frequencies.size, np.int64)  # where each symbol's next state goes
    start = 0
    for symbol in range(frequencies.size):
        filled[symbol] = start
        offset[symbol] = start - frequencies[symbol]
        start += frequencies[symbol]
    following = np.empty(size, np.uint16)
    for state in range(size):
        symbol = states[state]
        following[filled[symbol]] = size + state
        filled[symbol] += 1
    shift = np.zeros(frequencies.size, np.int64)
    for symbol in range(frequencies.size):
        if frequencies[symbol] > 0:
            most = 0
            while frequencies[symbol] << most < size:
                most += 1
            shift[symbol] = (most << 16) - (frequencies[symbol] << most)
    return following, shift, offset


@kernel
def _encode(
    symbols: Any, segments: int, following: Any, shift: Any, offset: Any, bits: int, out: Any, room: int
) -> Any:
    """Write segment i backwards from out[(i + 1) * room]; return where each begins.

    Bounds: every symbol has a frequency; room >= symbols of a segment * bits / 8 + 24; out has segments * room bytes.
    `x` is the state, `held` the bits not written yet, `length` their number; the oldest bit is the most significant.
    """
    size = 1 << bits
    first = np.empty(4, np.int64)  # of the symbols of each segment
    x = np.empty(4, np.int64)
    held = np.zeros(4, np.int64)
    length = np.zeros(4, np.int64)
    at = np.empty(4, np.int64)
    rounds = 0 if segments == 1 else symbols.size // segments >> 2
    for i in range(segments):
        first[i] = symbols.size * i // segments
        x[i] = size
        at[i] = (i + 1) * room
        left = symbols.size * (i + 1) // segments - first[i]
        while left > rounds * 4:  # the last symbols, one at a time, until all segments have the same number left
            left -= 1
            symbol = symbols[first[i] + left]
            n = (x[i] + shift[symbol]) >> 16
            held[i] = held[i] << n | x[i] & ((1 << n) - 1)
            length[i] += n
            x[i] = following[(x[i] >> n) + offset[symbol]]
            while length[i] >= 8:
                length[i] -= 8
                at[i] -= 1
                out[at[i]] = held[i] >> length[i]
                held[i] &= (1 << length[i]) - 1
    if rounds > 0:
        _encode_rounds(symbols, first, rounds, x, held, length, at, following, shift, offset, out)
    for i in range(segments):  # the last state, a 1, and zeros to fill the first byte
        last = (held[i] << bits | x[i] - size) << 1 | 1
        n = length[i] + bits + 1
        last <<= -n & 7
        n += -n & 7
        for byte in range(n >> 3):
            out[at[i] - (n >> 3) + byte] = last >> 8 * byte & 255
        at[i] -= n >> 3
    return at[:segments]


@kernel
def _encode_rounds(
    symbols: Any, first: Any, rounds: int, x: Any, held: Any, length: Any, at: Any, following: Any, shift: Any,
    offset: Any, out: Any,
) -> None:  # fmt: skip
    """Code the first 4 * rounds symbols of four segments, last symbol first, four symbols between two writes."""
    f0, f1, f2, f3 = first[0], first[1], first[2], first[3]
    x0, x1, x2, x3 = x[0], x[1], x[2], x[3]
    h0, h1, h2, h3 = held[0], held[1], held[2], held[3]
    n0, n1, n2, n3 = length[0], length[1], length[2], length[3]
    a0, a1, a2, a3 = at[0], at[1], at[2], at[3]
    i = rounds * 4
    while i > 0:
        for _ in range(4):
            i -= 1
            s0, s1 = np.uint64(symbols[np.uint64(f0 + i)]), np.uint64(symbols[np.uint64(f1 + i)])
            s2, s3 = np.uint64(symbols[np.uint64(f2 + i)]), np.uint64(symbols[np.uint64(f3 + i)])
            b0, b1 = (x0 + shift[s0]) >> 16, (x1 + shift[s1]) >> 16
            b2, b3 = (x2 + shift[s2]) >> 16, (x3 + shift[s3]) >> 16
            h0, h1 = h0 << b0 | x0 & ((1 << b0) - 1), h1 << b1 | x1 & ((1 << b1) - 1)
            h2, h3 = h2 << b2 | x2 & ((1 << b2) - 1), h3 << b3 | x3 & ((1 << b3) - 1)
            n0, n1, n2, n3 = n0 + b0, n1 + b1, n2 + b2, n3 + b3
            x0 = np.int64(following[np.uint64((x0 >> b0) + offset[s0])])
            x1 = np.int64(following[np.uint64((x1 >> b1) + offset[s1])])
            x2 = np.int64(following[np.uint64((x2 >> b2) + offset[s2])])
            x3 = np.int64(following[np.uint64((x3 >> b3) + offset[s3])])
        # At most 7 + 4 * 14 = 63 bits are held: write whole bytes as one word that ends at `a`, keep the rest.
        store64(out, a0 - 8, ((h0 >> (n0 & 7)) << 1) << (63 - (n0 & ~7)))
        store64(out, a1 - 8, ((h1 >> (n1 & 7)) << 1) << (63 - (n1 & ~7)))
        store64(out, a2 - 8, ((h2 >> (n2 & 7)) << 1) << (63 - (n2 & ~7)))
        store64(out, a3 - 8, ((h3 >> (n3 & 7)) << 1) << (63 - (n3 & ~7)))
        a0, a1, a2, a3 = a0 - (n0 >> 3), a1 - (n1 >> 3), a2 - (n2 >> 3), a3 - (n3 >> 3)
        n0, n1, n2, n3 = n0 & 7, n1 & 7, n2 & 7, n3 & 7
        h0, h1, h2, h3 = h0 & ((1 << n0) - 1), h1 & ((1 << n1) - 1), h2 & ((1 << n2) - 1), h3 & ((1 << n3) - 1)
    x[0], x[1], x[2], x[3] = x0, x1, x2, x3
    held[0], held[1], held[2], held[3] = h0, h1, h2, h3
    length[0], length[1], length[2], length[3] = n0, n1, n2, n3
    at[0], at[1], at[2], at[3] = a0, a1, a2, a3


@kernel
def _decode(source: Any, ends: Any, table: Any, bits: int, symbols: Any) -> bool:
    """Fill `symbols` from the segments that end at byte ends[i] of `source`; False if one ends early, late or wrongly.

    Bounds: `table` is of _decoding_table, so that a state never leaves it; `source` has 8 bytes after ends[-1].
    """
    segments = ends.size
    state = np.empty(4, np.int64)
    at = np.empty(4, np.int64)  # the next bit of each segment
    to = np.empty(4, np.int64)  # the next symbol of each segment
    rounds = symbols.size
    for i in range(segments):
        to[i] = symbols.size * i // segments
        rounds = min(rounds, symbols.size * (i + 1) // segments - to[i] >> 2)
        start = ends[i - 1] if i > 0 else 0
        zeros = 0
        while zeros < 8 and source[start] >> zeros & 1 == 0:
            zeros += 1
        at[i] = start * 8 + zeros + 1 + bits
        if zeros == 8 or at[i] > ends[i] * 8:
            return False
        state[i] = load64(source, start) >> (zeros + 1) & ((1 << bits) - 1)
    if segments == 4:
        _decode_rounds(source, ends[3], table, rounds, symbols, state, at, to)
    for i in range(segments):
        while to[i] < symbols.size * (i + 1) // segments:
            entry = np.int64(table[state[i]])
            symbols[to[i]] = entry & 255
            fresh = entry >> 8 & 31
            if at[i] + fresh > ends[i] * 8:
                return False
            state[i] = (entry >> 16) + (load64(source, at[i] >> 3) >> (at[i] & 7) & ((1 << fresh) - 1))
            at[i] += fresh
            to[i] += 1
        if at[i] != ends[i] * 8 or state[i] != 0:
            return False
    return True


@kernel
def _decode_rounds(source: Any, end: int, table: Any, rounds: int, symbols: Any, state: Any, at: Any, to: Any) -> None:
    """Decode 4 symbols of each of four segments, up to `rounds` times, or until a segment comes near byte `end`."""
    s0, s1, s2, s3 = state[0], state[1], state[2], state[3]
    a0, a1, a2, a3 = at[0], at[1], at[2], at[3]
    t0, t1, t2, t3 = to[0], to[1], to[2], to[3]
    done = 0
    while done < rounds:
        safe = (end * 8 - max(max(a0, a1), max(a2, a3))) // 56  # rounds for which no segment can pass the end
        if safe <= 0:
            break
        for _ in range(min(safe, rounds - done)):
            b0, b1 = load64(source, a0 >> 3) >> (a0 & 7), load64(source, a1 >> 3) >> (a1 & 7)
            b2, b3 = load64(source, a2 >> 3) >> (a2 & 7), load64(source, a3 >> 3) >> (a3 & 7)
            for _ in range(4):
                e0, e1 = np.int64(table[np.uint64(s0)]), np.int64(table[np.uint64(s1)])
                e2, e3 = np.int64(table[np.uint64(s2)]), np.int64(table[np.uint64(s3)])
                symbols[np.uint64(t0)], symbols[np.uint64(t1)] = np.uint8(e0), np.uint8(e1)
                symbols[np.uint64(t2)], symbols[np.uint64(t3)] = np.uint8(e2), np.uint8(e3)
                t0, t1, t2, t3 = t0 + 1, t1 + 1, t2 + 1, t3 + 1
                n0, n1, n2, n3 = e0 >> 8 & 31, e1 >> 8 & 31, e2 >> 8 & 31, e3 >> 8 & 31
                s0, s1 = (e0 >> 16) + (b0 & ((1 << n0) - 1)), (e1 >> 16) + (b1 & ((1 << n1) - 1))
                s2, s3 = (e2 >> 16) + (b2 & ((1 << n2) - 1)), (e3 >> 16) + (b3 & ((1 << n3) - 1))
                b0, b1, b2, b3 = b0 >> n0, b1 >> n1, b2 >> n2, b3 >> n3
                a0, a1, a2, a3 = a0 + n0, a1 + n1, a2 + n2, a3 + n3
            done += 1
    state[0], state[1], state[2], state[3] = s0, s1, s2, s3
    at[0], at[1], at[2], at[3] = a0, a1, a2, a3
    to[0], to[1], to[2], to[3] = t0, t1, t2, t3
