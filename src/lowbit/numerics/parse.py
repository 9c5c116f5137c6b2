"""Formats by words: "int4 group:64", "mxfp4", "uint8 channel:0 rounding:stochastic:7"."""

import difflib
import re
from collections.abc import Callable
from dataclasses import replace

from lowbit.errors import InputError
from lowbit.numerics.fitted import Bases, KMeans, Piecewise
from lowbit.numerics.formats import FORMATS, Format
from lowbit.numerics.grids import AdditivePow2, Fitted, Float, Grid, Int, SignedPow2, is_fitted
from lowbit.numerics.rows import ELEMENT, TENSOR, channel, group, tile

_PATTERNS: dict[str, tuple[re.Pattern[str], Callable[..., Grid | Fitted]]] = {
    "eXmY": (re.compile(r"e(\d+)m(\d+)"), lambda e, m: Float(int(e), int(m))),
    "logN": (re.compile(r"log(\d+)"), lambda bits: SignedPow2(int(bits))),
    "apotN": (re.compile(r"apot(\d+)"), lambda bits: AdditivePow2(int(bits))),
    "codebookN[:START]": (
        re.compile(r"codebook:?(\d+)(?::([a-z]+))?"),
        lambda b, start: KMeans(int(b), start or "optimal"),
    ),
    "basesN": (re.compile(r"bases:?(\d+)"), lambda count: Bases(int(count))),
    "pwlqN": (re.compile(r"pwlq:?(\d+)"), lambda bits: Piecewise(int(bits))),
}
_OPTIONS = (
    "tensor, element, channel:AXIS, group:LENGTH[:AXIS], axis:AXIS, tile:LENGTHxLENGTH, affine, symmetric, narrow, "
    "scale:FORMAT, scale_channel:AXIS, reach:NUMBER, rounding:NAME"
)


def parse_format(text: "str | Format") -> Format:
    """A format from its words: a name, then options in any order. A Format is returned as it is."""
    if isinstance(text, Format):
        return text
    name, *options = text.lower().replace(",", " ").split() or [""]
    named = _named(name, text)
    for option in options:
        named = _apply(named, option, text)
    return named


def _named(name: str, text: str) -> Format:
    if name in FORMATS:
        return FORMATS[name]
    for pattern, make in _PATTERNS.values():
        if match := pattern.fullmatch(name):
            return Format(make(*match.groups()))
    close = difflib.get_close_matches(name, FORMATS, n=3)
    hint = f"Did you mean {', '.join(close)}? " if close else ""
    raise InputError(f"format '{text}' is unknown. {hint}Formats are: {', '.join([*FORMATS, *_PATTERNS])}.")


def _apply(format: Format, option: str, text: str) -> Format:
    word, _, value = option.partition(":")
    try:
        match word:
            case "tensor":
                return format.with_block(TENSOR)
            case "element":
                return format.with_block(ELEMENT)
            case "channel":
                return format.with_block(channel(*(int(axis) for axis in (value or "0").split(":"))))
            case "group":
                length, _, axis = value.partition(":")
                return format.with_block(group(int(length), int(axis or -1)))
            case "axis":
                return format.along(int(value))
            case "scale_channel" if format.scale is not None:
                scale = format.scale.with_block(channel(*(int(axis) for axis in value.split(":"))))
                return replace(format, scale=scale)
            case "tile":
                lengths = [int(length) for length in value.split("x")]
                return format.with_block(tile({i - len(lengths): n for i, n in enumerate(lengths)}))
            case "affine":
                return replace(format, zero_point=True)
            case "symmetric":
                return replace(format, zero_point=False)
            case "narrow" if isinstance(format.grid, Int):
                return replace(format, grid=replace(format.grid, narrow=True))
            case "scale":
                return replace(format, scale=None if value == "float32" else _scale_format(value, text))
            case "reach":
                return replace(format, reach=float(value))
            case "rounding":
                return replace(format, rounding=value)
    except ValueError as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"'{option}' in format '{text}' is not understood. Options are: {_OPTIONS}.") from error
    raise InputError(f"'{option}' in format '{text}' is not an option of it. Options are: {_OPTIONS}.")


def _scale_format(name: str, text: str) -> Format:
    """The scale of scale:NAME, without a second scale: e8m0 rounds up so that nothing clips."""
    if name == "e8m0":
        return FORMATS["fixed8"].scale or FORMATS["fixed8"]
    if is_fitted(_named(name, text).grid):
        raise InputError(f"'scale:{name}' in format '{text}': a scale cannot be stored in a grid fitted to data.")
    return replace(_named(name, text), block=None, scale=None, zero_point=False, reach=None)
