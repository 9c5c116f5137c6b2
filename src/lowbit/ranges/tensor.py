"""One tensor under a format and a range: its codes, and what they cost."""

from lowbit.errors import InputError
from lowbit.numerics.formats import Format
from lowbit.numerics.qtensor import Array, QuantTensor
from lowbit.numerics.quantize import Error, floating, measure, quantize
from lowbit.numerics.roundings import Rounding
from lowbit.numerics.words import parse_format
from lowbit.ranges.extremes import Range
from lowbit.ranges.parse import parse_range
from lowbit.ranges.statistics import RawRows


def quantize_tensor(
    x: Array,
    format: "Format | str",
    bounds: "tuple[Array, Array] | None" = None,
    rounding: "Rounding | str | None" = None,
    range: "Range | str | None" = None,
) -> QuantTensor:
    """x as codes of a format; `lb.quantize` is for whole models.

    x         numpy array or torch tensor of any floating dtype; the codes come back as the same kind
    format    a Format, or its words: "int4 group:64"
    bounds    (lo, hi), each (n_blocks, 1) or one number: the range of each tile. Default: its minimum and maximum
    rounding  instead of the format's own: its words, or stochastic(seed)
    range     how the bounds are found, instead of `bounds`: its words, or a value: "mse", Percentile(99.9)

    group(n) runs along the last axis and does not cross it: MXFP4 on a convolution's (O, I, 3, 3) makes blocks of 3.
    Recipes turn groups to the axis that is summed over; here "mxfp4 axis:1" does.
    Values outside the range are clipped. NaN raises DataError, and so do infinities unless bounds are given.
    """
    if range is None:
        return quantize(x, format, bounds, rounding)
    kind = parse_format(format)
    if bounds is not None or kind.block is None:
        reason = "bounds are given too" if bounds is not None else f"{kind!r} has no scale"
        raise InputError(f"range {range!r} has nothing to choose: {reason}. Leave out the one or the other.")
    x = floating(x)
    return quantize(x, kind, parse_range(range).bounds(RawRows.of(x, kind.block), kind), rounding)


def error(
    x: Array,
    format: "Format | str",
    bounds: "tuple[Array, Array] | None" = None,
    rounding: "Rounding | str | None" = None,
    range: "Range | str | None" = None,
) -> Error:
    """What quantizing x does to it, measured in float64; arguments as of `quantize_tensor`."""
    return measure(x, quantize_tensor(x, format, bounds, rounding, range))
