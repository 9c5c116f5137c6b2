"""Speed of the numerics as ratios that travel, and what theory says of each kind of format.

python benchmarks/numerics.py speed      quantizing to each format, histogram, k-means, against their peers
python benchmarks/numerics.py theory     SQNR on uniform, Gauss and Laplace sources at 2-8 bits
"""

import argparse
import time
from collections.abc import Callable
from functools import partial

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from lowbit.numerics import Format, Int, KMeans, encode_rows, fake_quantize_rows, parse_format, quantize
from lowbit.numerics.grids import E4M3, Float
from lowbit.numerics.kernels.cpu import fresh
from lowbit.ranges import Histogram, error
from lowbit.storage.tables import entropy_bits

ELEMENTS = 1 << 24


def seconds(*functions: Callable[[], object], rounds: int = 5) -> list[float]:
    """The least CPU time of each function; they take turns, so that a busy machine slows all alike."""
    for function in functions:
        function()
    best = [float("inf")] * len(functions)
    for _ in range(rounds):
        for i, function in enumerate(functions):
            start = time.thread_time()
            function()
            best[i] = min(best[i], time.thread_time() - start)
    return best


def mx_in_torch(x: Tensor, mantissa_bits: int, largest_exponent: int, largest: float, smallest: int = 0) -> Tensor:
    """MX by plain torch operations on the whole tensor, as reference implementations do it."""
    blocks = x.reshape(-1, 32)
    shared = torch.floor(torch.log2(blocks.abs().amax(1, keepdim=True))) - largest_exponent
    scaled = blocks / torch.exp2(shared)
    exponent = torch.floor(torch.log2(scaled.abs() + (scaled == 0) * 2.0**-126)).clamp(min=smallest)
    step = torch.exp2(exponent - mantissa_bits)
    rounded = (torch.round(scaled / step) * step).clamp(-largest, largest)
    return (rounded * torch.exp2(shared)).reshape(x.shape)


def micro_exponents_in_torch(x: Tensor, bits: int) -> Tensor:
    """Shared micro-exponents (MX9, MX6, MX4) likewise: 16 share a power of two, each pair may halve it."""
    pairs = x.reshape(-1, 8, 2)
    exponent = torch.floor(torch.log2(pairs.abs().amax(2, keepdim=True)))
    shared = exponent.amax(1, keepdim=True)
    step = torch.exp2(shared - (exponent < shared).to(x.dtype) - (bits - 2))
    largest = 2.0 ** (bits - 1) - 1
    return (torch.round(pairs / step).clamp(-largest, largest) * step).reshape(x.shape)


def count(x: Tensor) -> None:
    Histogram().add(x)


def speed() -> Table:
    """Nanoseconds an element on one core, and ratios."""
    torch.set_num_threads(1)
    x = torch.randn(ELEMENTS // 4096, 4096, generator=torch.Generator().manual_seed(0))
    rows, out = x.reshape(1, -1), torch.empty_like(x)
    one, none = torch.full((1, 1), 0.03), torch.zeros(1, 1)
    table = Table(title=f"{ELEMENTS:,} elements, one core", title_justify="left")
    for name in ("what", "ns/element", "of a copy", "peer", "peer ns", "times faster"):
        table.add_column(name, justify="left" if name in ("what", "peer") else "right")

    def row(what: str, ours: Callable[[], object], peer: str = "", theirs: Callable[[], object] | None = None) -> None:
        times = seconds(ours, lambda: fresh(x.shape).copy_(x), *([theirs] if theirs else []))
        ns = [t / ELEMENTS * 1e9 for t in times]
        last = (peer, f"{ns[2]:.2f}", f"{ns[2] / ns[0]:.1f}") if theirs else ("", "", "")
        table.add_row(what, f"{ns[0]:.2f}", f"{ns[0] / ns[1]:.2f}", *last)

    def fake() -> Tensor:
        return torch.fake_quantize_per_tensor_affine(x, 0.03, 0, -128, 127)

    row("copy into memory at hand", lambda: out.copy_(x))
    row("copy as torch makes it", x.clone)
    row("int8, scale known: round", lambda: fake_quantize_rows(rows, one, none, Int(8)), "torch fake_quantize", fake)
    row("int8, scale known: codes", lambda: encode_rows(rows, one, none, Int(8)), "torch fake_quantize", fake)

    def cast() -> Tensor:
        return (x / 0.03).to(torch.float8_e4m3fn).to(torch.float32) * 0.03

    to_e4m3 = partial(fake_quantize_rows, rows, one, none, E4M3)
    row("e4m3, scale known: round", to_e4m3, "torch to(float8) and back", cast)
    row("e2m1, scale known: round", lambda: fake_quantize_rows(rows, one, none, Float(2, 1)))
    peers: dict[str, tuple[str, Callable[[], object]]] = {
        "mxfp4": ("MX in torch", lambda: mx_in_torch(x, 1, 2, 6.0)),
        "mxfp6_e2m3": ("MX in torch", lambda: mx_in_torch(x, 3, 2, 7.5)),
        "mxfp8_e4m3": ("MX in torch", lambda: mx_in_torch(x, 3, 8, 448.0, -6)),
        "mxint8": ("MX in torch", lambda: mx_in_torch(x, 6, 0, 127 / 64)),
        "mx9": ("MX in torch", lambda: micro_exponents_in_torch(x, 8)),
        "mx6": ("MX in torch", lambda: micro_exponents_in_torch(x, 5)),
        "mx4": ("MX in torch", lambda: micro_exponents_in_torch(x, 3)),
        "int8": ("torch fake_quantize, range given", fake),
        "bf16": ("torch to(bfloat16)", lambda: x.to(torch.bfloat16)),
        "fp16": ("torch to(float16)", lambda: x.to(torch.float16)),
    }
    for words in (
        *("int8", "int8 channel:0", "uint8", "int4 group:64", "int16", "fixed8", "e4m3", "e5m2", "fp16", "bf16"),
        *("nf4", "log4", "apot5", "mxfp8_e4m3", "mxfp6_e2m3", "mxfp4", "mxint8", "mx9", "mx6", "mx4", "nvfp4", "vsq4"),
    ):
        kind = parse_format(words)
        row(f"{words}: range, scales, codes", partial(quantize, x, kind), *peers.get(words, ()))
    for name, data in (("normal", x), ("after a ReLU", x.relu())):
        row(f"histogram, {name}", partial(count, data), "torch.histc", partial(torch.histc, data, 2048))
    return table


def kmeans() -> str:
    """16 clusters of a million weights, to the same inertia."""
    from sklearn.cluster import KMeans as SklearnKMeans

    x = torch.randn(1_000_000, generator=torch.Generator().manual_seed(0))
    column = x.numpy()[:, None]
    start = np.linspace(column.min(), column.max(), 16)[:, None]
    peer = SklearnKMeans(16, n_init=1, init=start)
    ours, theirs = seconds(lambda: quantize(x, Format(KMeans(4))), lambda: peer.fit(column), rounds=2)
    inertia = error(x, Format(KMeans(4))).mse * len(x)
    return (
        f"k-means, 16 clusters, 1,000,000 weights: {ours * 1e3:.0f} ms, scikit-learn {theirs * 1e3:.0f} ms: "
        f"{theirs / ours:.0f} times faster; inertia {inertia:.1f} against {peer.inertia_:.1f}"
    )


def sources(count: int) -> dict[str, Tensor]:
    """Quantiles of each distribution in shuffled order: samples without chance, σ = 1."""
    share = (torch.arange(count, dtype=torch.float64) + 0.5) / count
    centred = share - 0.5
    order = torch.randperm(count, generator=torch.Generator().manual_seed(0))
    return {
        "uniform": (centred * 12**0.5).float()[order],
        "Gauss": (torch.erfinv(2 * centred) * 2**0.5).float()[order],
        "Laplace": (-centred.sign() * torch.log1p(-2 * centred.abs()) / 2**0.5).float()[order],
    }


THEORY = {
    "uniform, extremes": ("int{b}", False),
    "uniform, best bound": ("int{b}", True),
    "uniform, groups of 32": ("int{b} group:32", True),
    "logarithmic": ("log{b}", True),
    "APoT": ("apot{b}", True),
    "binary bases": ("bases{b}", True),
    "two slopes": ("pwlq{b}", True),
    "Lloyd-Max": ("codebook{b}", True),
}


def theory() -> Table:
    """SQNR in dB by bits of a code; per-group scales cost one more bit at 32 elements a group."""
    table = Table(title="SQNR in dB", title_justify="left")
    for name in ("source", "format", *(f"{bits} bits" for bits in range(2, 9))):
        table.add_column(name, justify="left" if name in ("source", "format") else "right")
    for source, x in sources(1 << 17).items():
        for name, (words, search) in THEORY.items():
            cells = []
            for bits in range(2, 9):
                try:
                    kind = parse_format(words.format(b=bits))
                except ValueError:
                    cells.append("")
                    continue
                cells.append(f"{error(x, kind, range='mse' if search else None).sqnr_db:.2f}")
            table.add_row(source, name, *cells)
        table.add_row(source, "uniform, entropy-coded", *(f"{entropy_coded(x, bits):.2f}" for bits in range(2, 9)))
        table.add_row(source, "rate-distortion bound", *(f"{shannon(source, bits):.2f}" for bits in range(2, 9)))
    return table


def entropy_coded(x: Tensor, bits: int) -> float:
    """SQNR of rounding to multiples of a step, as fine as an average of `bits` bits after entropy coding allows."""
    fine, coarse = 2.0**-12, 4.0
    for _ in range(40):
        step = (fine * coarse) ** 0.5
        codes = torch.round(x / step).numpy().astype(int)
        bits_now = entropy_bits(np.bincount(codes - codes.min()))
        fine, coarse = (step, coarse) if bits_now > bits * len(x) else (fine, step)
    return float(10 * torch.log10(x.square().mean() / (torch.round(x / coarse) * coarse - x).square().mean()))


def shannon(source: str, bits: int) -> float:
    """Shannon's lower bound: 6.02 b dB less 10 log10 of entropy power over variance; no code does better."""
    entropy = {
        "uniform": np.log(12**0.5),
        "Gauss": 0.5 * np.log(2 * np.pi * np.e),
        "Laplace": 1 + np.log(2 / 2**0.5),
    }[source]
    power = np.exp(2 * entropy) / (2 * np.pi * np.e)
    return float(20 * np.log10(2) * bits - 10 * np.log10(power))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="?", choices=["speed", "theory", "all"], default="all")
    what = parser.parse_args().what
    console = Console(width=150)
    if what in ("speed", "all"):
        console.print(speed())
        console.print(kmeans())
    if what in ("theory", "all"):
        console.print(theory())


if __name__ == "__main__":
    main()
