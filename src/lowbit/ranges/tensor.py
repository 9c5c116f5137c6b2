"""One tensor under a format and a range: its codes, and what they cost."""

import numpy as np
import torch

from lowbit.errors import InputError
from lowbit.numerics import Error, Format, QuantTensor, Rounding, measure, parse_format, quantize
from lowbit.numerics.qtensor import Array
from lowbit.numerics.quantize import floating
from lowbit.ranges.extremes import Range
from lowbit.ranges.parse import parse_range
from lowbit.ranges.statistics import RawRows

_PIECE = 1 << 20  # numbers whose range is searched at a time


def quantize_tensor(
    x: Array,
    format: "Format | str",
    range: "Range | str | tuple[Array | float, Array | float] | None" = None,
    rounding: "Rounding | str | None" = None,
) -> QuantTensor:
    """x as codes of a format; `lb.quantize` is for whole models.

    x         numpy array or torch tensor of any floating dtype; the codes come back as the same kind
    format    a Format, or its words: "int4 group:64"
    range     of each tile: words or a value that find it, "mse" or Percentile(99.9); or (lo, hi), each (n_blocks, 1) or
              one number. Default: its minimum and maximum
    rounding  instead of the format's own: its words, or stochastic(seed)

    group(n) runs along the last axis and does not cross it: MXFP4 on a convolution's (O, I, 3, 3) makes blocks of 3.
    Recipes turn groups to the axis that is summed over; here "mxfp4 axis:1" does.
    Values outside the range are clipped. NaN raises DataError, and so do infinities unless (lo, hi) are given.
    """
    if not isinstance(range, str | Range):
        return quantize(x, format, range, rounding)
    kind = parse_format(format)
    if kind.block is None:
        raise InputError(f"range {range!r} has nothing to choose: {kind!r} has no scale. Leave out the range.")
    x = floating(x)
    return quantize(x, kind, _bounds(x, kind, parse_range(range)), rounding)


def _bounds(x: Array, format: Format, range: Range) -> tuple[Array, Array]:
    """Bounds of each tile, of so many rows at a time that a table of gigabytes takes no gigabytes of memory.

    Where scales share a second scale, a range may look at all of them: the tensor then stays whole.
    """
    assert format.block is not None
    shape, piece = tuple(x.shape), len(x) if x.ndim else 1
    if x.ndim > 1 and format.block.tile(shape)[0] == 1 and not format.shares_scale:
        piece = max(1, _PIECE // max(1, x[0].size if isinstance(x, np.ndarray) else x[0].numel()))
    if not x.ndim or len(x) <= piece:
        return range.bounds(RawRows.of(x, format.block), format)
    starts = np.arange(0, len(x), piece)
    found = [range.bounds(RawRows.of(x[start : start + piece], format.block), format) for start in starts]
    lows, highs = zip(*found, strict=True)
    return torch.cat(lows), torch.cat(highs)


def error(
    x: Array,
    format: "Format | str",
    range: "Range | str | tuple[Array | float, Array | float] | None" = None,
    rounding: "Rounding | str | None" = None,
) -> Error:
    """What quantizing x does to it, measured in float64; arguments as of `quantize_tensor`."""
    return measure(x, quantize_tensor(x, format, range, rounding))
