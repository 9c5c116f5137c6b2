"""The catalogue: every named format with its cost, its reach and where its definition stands."""

from dataclasses import dataclass

import numpy as np

from lowbit.numerics.fitted import Bases, KMeans, Piecewise
from lowbit.numerics.formats import FORMATS, Format
from lowbit.numerics.grids import LLOYD_VALUES, AdditivePow2, Float, Int, SignedPow2, is_fitted
from lowbit.numerics.words import spell_block

_OCP_MX = "OCP Microscaling Formats (MX) 1.0"
_OCP_FP8 = "OCP 8-bit Floating Point 1.0"
_MICRO = "Darvish Rouhani et al. 2023, arXiv 2302.08007"
_VSQ = "Dai et al. 2021, arXiv 2102.04503"
SOURCES = {
    "fixed8": "a power-of-two scale: a shift",
    "fixed4": "a power-of-two scale: a shift",
    "ternary": "Li et al. 2016, arXiv 1605.04711",
    "binary": "Rastegari et al. 2016, arXiv 1603.05279",
    "nf4": "Dettmers et al. 2023, arXiv 2305.14314",
    **dict.fromkeys((f"lloyd{bits}" for bits in LLOYD_VALUES), "Max 1960, table I, as whole numbers up to 127"),
    **dict.fromkeys(("e4m3", "e5m2"), _OCP_FP8),
    "e3m4": "IEEE 754 rules with 3 exponent bits",
    **dict.fromkeys(("e3m2", "e2m3", "e2m1"), _OCP_MX),
    **dict.fromkeys(("fp16", "bf16"), "IEEE 754; bfloat16"),
    **dict.fromkeys(("mxfp8_e4m3", "mxfp8_e5m2", "mxfp6_e3m2", "mxfp6_e2m3", "mxfp4", "mxint8"), _OCP_MX),
    **dict.fromkeys(("mx9", "mx6", "mx4"), _MICRO),
    "nvfp4": "NVIDIA Blackwell: E2M1, E4M3 per 16, float32 per tensor",
    **dict.fromkeys(("vsq4", "vsq8"), _VSQ),
}
_OF_GRID: dict[type, str] = {
    Int: "Jacob et al. 2018, arXiv 1712.05877",
    SignedPow2: "Miyashita et al. 2016, arXiv 1603.01025",
    AdditivePow2: "Li et al. 2020, arXiv 1909.13144",
    KMeans: "Han et al. 2016, arXiv 1510.00149; Lloyd 1982",
    Bases: "Zhang et al. 2018, arXiv 1807.10029",
    Piecewise: "Fang et al. 2020, arXiv 2002.00104",
    Float: "sign, exponent and mantissa by the rules of OCP",
}


@dataclass(frozen=True)
class Entry:
    """One row. largest and step are values of the grid, in units of the scale; None where the grid is fitted to data.

    bits     per element in a large tensor, scales included
    shares   what shares a scale, in the words of a recipe
    codes    how many values a code can mean
    largest  largest value
    step     smallest distance between neighbours
    """

    name: str
    bits: float
    codes: int
    largest: float | None
    step: float | None
    shares: str
    source: str


def entry(name: str, format: Format) -> Entry:
    """The row of a format."""
    source = SOURCES.get(name.split()[0]) or _OF_GRID.get(type(format.grid), "")
    shares = "no scale" if format.block is None else spell_block(format.block)
    if format.scale is not None:
        shares += f", scale {_scale_words(format.scale)}"
    elif format.zero_point:
        shares += ", zero point"
    if is_fitted(format.grid):
        codes = 1 << format.grid.bits
        return Entry(name, format.bits_per_element(), codes, None, None, f"{shares}, {codes} numbers a table", source)
    values = format.grid.values()
    step = float(np.diff(values).min()) if len(values) > 1 else None
    return Entry(name, format.bits_per_element(), len(values), float(values[-1]), step, shares, source)


def _scale_words(scale: Format) -> str:
    words = f"{scale.grid.bits} bit{'s' * (scale.grid.bits != 1)}"
    if scale.block is None:
        return words
    return f"{words} per {spell_block(scale.block)}" + (
        "" if scale.scale is None else f", scale {_scale_words(scale.scale)}"
    )


def catalogue() -> list[Entry]:
    """All named formats, in the order of `FORMATS`."""
    return [entry(name, format_) for name, format_ in FORMATS.items()]
