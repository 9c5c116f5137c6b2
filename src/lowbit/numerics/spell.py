"""Formats back to words: the inverse of `parse_format`, for recipes, ledgers and tables."""

from dataclasses import replace

from lowbit.errors import UnsupportedError
from lowbit.numerics.fitted import Bases, KMeans, Piecewise
from lowbit.numerics.formats import FORMATS, Format
from lowbit.numerics.grids import AdditivePow2, Float, Int, SignedPow2, is_fitted
from lowbit.numerics.parse import parse_format
from lowbit.numerics.rows import ELEMENT, TENSOR, Block


def spell_format(format: Format) -> str:
    """The shortest words that `parse_format` reads back as this format; UnsupportedError where there are none."""
    spelled = [s for name in _names(format) if (s := _spell(format, name)) is not None]
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


def _names(format: Format) -> list[str]:
    grid = format.grid
    plain = replace(grid, narrow=False) if isinstance(grid, Int) else grid
    names = [name for name, known in FORMATS.items() if known.grid in (grid, plain)]
    match grid:
        case Float(e, m, "none"):
            names.append(f"e{e}m{m}")
        case SignedPow2(bits=bits):
            names.append(f"log{bits}")
        case AdditivePow2(bits=bits):
            names.append(f"apot{bits}")
        case KMeans(bits=bits, start=start, seed=0):
            names.append(f"codebook{bits}" if start == "optimal" else f"codebook{bits}:{start}")
        case Bases(count=count):
            names.append(f"bases{count}")
        case Piecewise(bits=bits):
            names.append(f"pwlq{bits}")
    return names


def _spell(format: Format, name: str) -> str | None:
    base = parse_format(name)
    words = [name]
    for block in (format.block, None if format.scale is None else format.scale.block):
        axis = None if block is None else block.group_axis
        turned = base if axis is None else base.along(axis)
        if axis is not None and turned != base and (turned.block == format.block or turned.scale == format.scale):
            base, words = turned, [name, f"axis:{axis}"]
            break
    if isinstance(format.grid, Int) and isinstance(base.grid, Int) and format.grid.narrow and not base.grid.narrow:
        words.append("narrow")
    if format.zero_point != base.zero_point:
        words.append("affine" if format.zero_point else "symmetric")
    if format.block != base.block:
        if format.block is None:
            return None
        words.append(spell_block(format.block))
    if format.scale != base.scale:
        if format.scale is None:
            words.append("scale:float32")
        elif base.scale is not None and format.scale.block is not None and not format.scale.block.lengths[1:]:
            words.append("scale_" + spell_block(format.scale.block))
        else:
            words += [f"scale:{scale}" for scale in ("e8m0", *FORMATS) if _is_scale(format, scale)][:1]
    if format.reach != base.reach and format.reach is not None:
        words.append(f"reach:{format.reach:g}")
    if format.rounding != base.rounding:
        words.append(f"rounding:{format.rounding}")
    text = " ".join(words)
    try:
        return text if parse_format(text) == format else None
    except ValueError:
        return None


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


def _is_scale(format: Format, name: str) -> bool:
    if name in FORMATS and is_fitted(FORMATS[name].grid):
        return False
    return parse_format(f"int8 scale:{name}").scale == format.scale
