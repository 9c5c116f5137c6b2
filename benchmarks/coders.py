"""Entropy coders side by side: bits a symbol and speed on one core, against zstandard's levels and constriction.

    python -m benchmarks.coders [--symbols 16777216] [--rounds 3] [--json out.json]

Every coder gets the same codes, one byte a symbol; speeds are of symbols (bytes) in memory, medians of alternating
rounds, tables and histograms included. zstandard 19 gets the first million only: it is 200 times slower than the rest.
"""

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import constriction
import numpy as np
import zstandard
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from lowbit.storage.ans import Ans, histogram
from lowbit.storage.choose import choose
from lowbit.storage.codecs import describe

Symbols = NDArray[np.uint8]
Coder = tuple[Callable[[Symbols], Any], Callable[[Any], Symbols], Callable[[Any], int]]
"""encode, decode, bytes of what was encoded."""


@dataclass(frozen=True)
class Row:
    source: str
    coder: str
    bits: float
    over_entropy: float
    encode_mb_s: float
    decode_mb_s: float


def sources(count: int) -> dict[str, Symbols]:
    """The codes of weights: a 16-value codebook of Laplace weights, the same at 90 % zeros, int8 of Gauss weights."""
    rng = np.random.default_rng(0)
    codebook = np.clip(np.round(rng.laplace(0, 1.8, count)) + 8, 0, 15).astype(np.uint8)
    zeros = np.where(rng.random(count) < 0.9, 0, np.clip(rng.geometric(0.6, count), 1, 15)).astype(np.uint8)
    int8 = np.clip(np.round(rng.normal(0, 30, count)) + 128, 0, 255).astype(np.uint8)
    return {"16-value codebook, Laplace": codebook, "90 % zeros": zeros, "int8, Gauss": int8}


def ours(symbols: Symbols) -> Coder:
    def encode(symbols: Symbols) -> Any:
        fit = Ans.fit(histogram(symbols))
        return fit, fit.encode(symbols), len(describe(fit))

    return encode, lambda coded: coded[0].decode(coded[1], symbols.size), lambda coded: len(coded[1]) + coded[2]


def chosen(symbols: Symbols) -> Coder:
    def encode(symbols: Symbols) -> Any:
        codec = choose(symbols)
        return codec, codec.encode(symbols), len(describe(codec))

    return encode, lambda coded: coded[0].decode(coded[1], symbols.size), lambda coded: len(coded[1]) + coded[2]


def zstd(level: int) -> Callable[[Symbols], Coder]:
    def make(symbols: Symbols) -> Coder:
        compressor, decompressor = zstandard.ZstdCompressor(level=level), zstandard.ZstdDecompressor()

        def encode(symbols: Symbols) -> Any:
            return compressor.compress(symbols.data)

        return encode, lambda coded: np.frombuffer(decompressor.decompress(coded), np.uint8), len

    return make


def constriction_ans(symbols: Symbols) -> Coder:
    shares = np.bincount(symbols).astype(np.float32)
    model = constriction.stream.model.Categorical(shares / shares.sum(), perfect=False)

    def encode(symbols: Symbols) -> Any:
        coder = constriction.stream.stack.AnsCoder()
        coder.encode_reverse(symbols.astype(np.int32), model)
        return coder.get_compressed()

    def decode(coded: Any) -> Symbols:
        return np.asarray(constriction.stream.stack.AnsCoder(coded).decode(model, symbols.size)).astype(np.uint8)

    return encode, decode, lambda coded: int(coded.nbytes)


CODERS: dict[str, Callable[[Symbols], Coder]] = {
    "lowbit ANS": ours,
    "lowbit, smallest chosen": chosen,
    "zstandard 1": zstd(1),
    "zstandard 3": zstd(3),
    "zstandard 9": zstd(9),
    "zstandard 19": zstd(19),
    "constriction ANS": constriction_ans,
}


def measure(name: str, symbols: Symbols, rounds: int) -> list[Row]:
    """All coders on the same symbols, one round after the other."""
    share = np.bincount(symbols) / symbols.size
    entropy = float(-(share[share > 0] * np.log2(share[share > 0])).sum())
    coders = {coder: make(symbols) for coder, make in CODERS.items()}
    parts = {coder: symbols[: 1 << 20] if coder == "zstandard 19" else symbols for coder in coders}
    times: dict[str, tuple[list[float], list[float]]] = {coder: ([], []) for coder in coders}
    bits: dict[str, float] = {}
    for turn in range(rounds + 1):
        for coder, (encode, decode, size) in coders.items():
            part = parts[coder]
            start = time.perf_counter()
            coded = encode(part)
            middle = time.perf_counter()
            decoded = decode(coded)
            end = time.perf_counter()
            assert np.array_equal(decoded, part), coder
            bits[coder] = 8 * size(coded) / part.size
            if turn:  # the first round warms up
                times[coder][0].append(middle - start)
                times[coder][1].append(end - middle)
    return [
        Row(
            name,
            coder,
            bits[coder],
            bits[coder] / entropy - 1,
            parts[coder].size / 1e6 / statistics.median(encoding),
            parts[coder].size / 1e6 / statistics.median(decoding),
        )
        for coder, (encoding, decoding) in times.items()
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--symbols", type=int, default=1 << 24)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    rows: list[Row] = []
    for name, symbols in sources(arguments.symbols).items():
        measured = measure(name, symbols, arguments.rounds)
        rows += measured
        peer = {row.coder: row for row in measured}
        entropy = measured[0].bits / (1 + measured[0].over_entropy)
        table = Table(title=f"{name}: {arguments.symbols:,} symbols, entropy {entropy:.3f} bits")
        for column in ("coder", "bits", "over entropy", "encode MB/s", "decode MB/s", "× zstd 3", "× constriction"):
            table.add_column(column, justify="left" if column == "coder" else "right")
        for row in measured:
            table.add_row(
                row.coder,
                f"{row.bits:.3f}",
                f"{row.over_entropy:+.2%}",
                f"{row.encode_mb_s:.0f}",
                f"{row.decode_mb_s:.0f}",
                f"{row.decode_mb_s / peer['zstandard 3'].decode_mb_s:.2f}",
                f"{row.decode_mb_s / peer['constriction ANS'].decode_mb_s:.1f}",
            )
        Console(width=110).print(table)
    if arguments.json:
        arguments.json.write_text(json.dumps([asdict(row) for row in rows], indent=1))


if __name__ == "__main__":
    main()
