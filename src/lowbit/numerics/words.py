"""Formats by words, read and written: "int4 group:64", "mxfp4", "uint8 channel:0 rounding:stochastic:7"."""

import difflib
import re
from collections.abc import Callable, Iterator
from dataclasses import fields, replace
from typing import Any

from lowbit.errors import InputError, UnsupportedError
from lowbit.numerics.fitted import Bases, KMeans, Piecewise
from lowbit.numerics.formats import FORMATS, POWER_OF_TWO_UP, Format
from lowbit.numerics.grids import AdditivePow2, Fitted, Float, Grid, Int, Pow2, SignedPow2, is_fitted
from lowbit.numerics.rows import ELEMENT, TENSOR, Block, channel, group, tile

# Names with numbers in them, by the grid that they make: as shown, as read, the grid, and its name.
_FAMILIES: dict[type, tuple[str, str, Callable[..., Grid | Fitted], Callable[[Any], str]]] = {
    Float: (
        *("eXmY", r"e(\d+)m(\d+)"),
        lambda e, m: Float(int(e), int(m)),
        lambda grid: f"e{grid.exponent_bits}m{grid.mantissa_bits}",
    ),
    SignedPow2: ("logN", r"log(\d+)", lambda bits: SignedPow2(int(bits)), lambda grid: f"log{grid.bits}"),
    AdditivePow2: ("apotN", r"apot(\d+)", lambda bits: AdditivePow2(int(bits)), lambda grid: f"apot{grid.bits}"),
    KMeans: (
        *("codebookN[:START[:MULTIPLIER]]", r"codebook:?(\d+)(?::([a-z]+))?(?::([0-9.e-]+))?"),
        lambda bits, start, multiplier: KMeans(int(bits), start or "optimal", float(multiplier or 0)),
        lambda grid: ":".join([f"codebook{grid.bits}", *_start(grid)]),
    ),
    Bases: ("basesN", r"bases:?(\d+)", lambda count: Bases(int(count)), lambda grid: f"bases{grid.count}"),
    Piecewise: ("pwlqN", r"pwlq:?(\d+)", lambda bits: Piecewise(int(bits)), lambda grid: f"pwlq{grid.bits}"),
}


def _start(grid: KMeans) -> list[str]:
    """The words of a codebook's start and multiplier, where they differ from the defaults."""
    if grid.multiplier:
        return [grid.start, f"{grid.multiplier:g}"]
    return [grid.start] if grid.start != "optimal" else []


_OPTIONS = (
    "tensor, element, channel:AXIS, group:LENGTH[:AXIS], axis:AXIS, tile:LENGTHxLENGTH, affine, symmetric, narrow, "
    "scale:FORMAT, scale:2^EXPONENT, scale_channel:AXIS, scale_tensor, reach:NUMBER, rounding:NAME"
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


def spell_format(format: Format) -> str:
    """The shortest words that `parse_format` reads back as this format; UnsupportedError where there are none."""
    grid = format.grid
    plain = replace(grid, narrow=False) if isinstance(grid, Int) else grid
    names = [name for name, known in FORMATS.items() if known.grid in (grid, plain)]
    if type(grid) in _FAMILIES:
        _, pattern, make, name = _FAMILIES[type(grid)]
        if (read := re.fullmatch(pattern, name(grid))) and make(*read.groups()) == grid:
            names.append(name(grid))
    spelled = [words for name in names if (words := _spell(format, name)) is not None]
    if not spelled:
        raise UnsupportedError(
            f"{format!r} has no name in words; name it in lowbit.FORMATS to use it in a recipe file."
        )
    return min(spelled, key=lambda words: (words.count(" "), len(words)))


def describe_format(format: Format) -> str:
    """Words where there are some, else the expression that makes the format: for tables and ledgers."""
    try:
        return spell_format(format)
    except UnsupportedError:
        return repr(format)


def spell_block(block: Block) -> str:
    """The option that makes this block: "tensor", "channel:0", "group:32"."""
    lengths = block.lengths
    if block in (TENSOR, ELEMENT):
        return "tensor" if block == TENSOR else "element"
    if block.rest != 1:
        return "channel:" + ":".join(str(axis) for axis, _ in lengths)
    if len(lengths) == 1:
        axis, length = lengths[0]
        return f"group:{length}" if axis == -1 else f"group:{length}:{axis}"
    return "tile:" + "x".join(str(length) for _, length in lengths)


def _named(name: str, text: str) -> Format:
    if name in FORMATS:
        return FORMATS[name]
    for _, pattern, make, _ in _FAMILIES.values():
        if match := re.fullmatch(pattern, name):
            return Format(make(*match.groups()))
    close = difflib.get_close_matches(name, FORMATS, n=3)
    hint = f"Did you mean {', '.join(close)}? " if close else ""
    shown = [family[0] for family in _FAMILIES.values()]
    raise InputError(f"format '{text}' is unknown. {hint}Formats are: {', '.join([*FORMATS, *shown])}.")


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
            case "scale_tensor" if format.scale is not None:
                return replace(format, scale=format.scale.with_block(TENSOR))
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
    """The scale of scale:NAME, without a second scale: e8m0 rounds up so that nothing clips; 2^-7 is that number."""
    if name == "e8m0":
        return POWER_OF_TWO_UP
    if name.startswith("2^"):
        if not re.fullmatch(r"-?\d{1,3}", name[2:]) or not -126 <= int(name[2:]) <= 127:
            raise InputError(
                f"'scale:{name}' in format '{text}': behind 2^ is a whole number from -126 to 127, as in scale:2^-7. "
                "Float32 has normal numbers there."
            )
        return Format(Pow2(0, int(name[2:])), None)
    named = _named(name, text)
    if is_fitted(named.grid):
        raise InputError(f"'scale:{name}' in format '{text}': a scale cannot be stored in a grid fitted to data.")
    return replace(named, block=None, scale=None, zero_point=False, reach=None)


def _spell(format: Format, name: str) -> str | None:
    """The name, and every option that brings its format nearer; None where that does not arrive."""
    words, reached = [name], parse_format(name)
    for option in _options(format):
        try:
            tried = parse_format(" ".join([*words, option]))
        except ValueError:
            continue
        if _differences(tried, format) < _differences(reached, format):
            words, reached = [*words, option], tried
    return " ".join(words) if reached == format else None


def _options(format: Format) -> Iterator[str]:
    """The options that say how a format is, in the order in which they are written."""
    for block in (format.block, format.scale.block if format.scale else None):
        if block is not None and block.group_axis is not None:
            yield f"axis:{block.group_axis}"
    yield from ("narrow", "affine" if format.zero_point else "symmetric")
    if format.block is not None:
        yield spell_block(format.block)
    if format.scale is None:
        yield "scale:float32"
    else:
        own = "" if format.scale.block is None else " scale_" + spell_block(format.scale.block)
        if format.has_fixed_scale and isinstance(format.scale.grid, Pow2):
            yield f"scale:2^{format.scale.grid.lowest}"
        yield from (option for name in ("e8m0", *FORMATS) for option in (f"scale:{name}", f"scale:{name}{own}"))
        yield own
    if format.reach is not None:
        yield f"reach:{format.reach:g}"
    yield f"rounding:{format.rounding}"


def _differences(one: Format, other: Format) -> int:
    return sum(getattr(one, field.name) != getattr(other, field.name) for field in fields(Format))
