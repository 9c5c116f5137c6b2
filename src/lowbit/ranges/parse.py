"""Ranges by words: "minmax", "percentile:99.99", "aciq:laplace", "lsq", "lsq:percentile:99.9"."""

from collections.abc import Callable
from typing import Any

from lowbit.errors import InputError
from lowbit.ranges.analytic import ACIQ
from lowbit.ranges.auto import Auto
from lowbit.ranges.extremes import MeanStd, MinMax, MovingAverage, Percentile, Range
from lowbit.ranges.learned import METHODS, Learned
from lowbit.ranges.search import MSE, OCTAV, Entropy

RANGES: dict[str, Callable[..., Range]] = {
    "minmax": MinMax,
    "moving_average": MovingAverage,
    "percentile": Percentile,
    "entropy": Entropy,
    "mse": MSE,
    "octav": OCTAV,
    "aciq": ACIQ,
    "mean_std": MeanStd,
    "auto": Auto,
}


def parse_range(text: "str | Range") -> Range:
    """A range from its words: a name of RANGES, and after a colon its argument. A Range is returned as it is."""
    if not isinstance(text, str):
        return text
    name, _, argument = text.lower().partition(":")
    if name in METHODS:
        return Learned(name, parse_range(argument)) if argument else Learned(name)
    if name not in RANGES:
        raise InputError(f"range '{text}' is unknown. Ranges are: {', '.join((*RANGES, *METHODS))}.")
    if not argument:
        return RANGES[name]()
    try:
        return RANGES[name](_argument(argument))
    except TypeError as error:
        raise InputError(f"range '{name}' takes no argument, but '{text}' gives one.") from error
    except ValueError as error:
        raise error if isinstance(error, InputError) else InputError(f"range '{text}': {error}.") from error


def _argument(text: str) -> Any:
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def range_words(range: Range) -> str:
    """The words that `parse_range` turns back into this range."""
    if isinstance(range, Learned):
        return range.method if range == Learned(range.method) else f"{range.method}:{range_words(range.start)}"
    name = next((word for word, kind in RANGES.items() if isinstance(range, kind)), None)  # type: ignore[arg-type]
    if name is None:
        raise InputError(f"range {range!r} has no name. Ranges are: {', '.join(RANGES)}; enter a new class there.")
    values = list(vars(range).values())
    return f"{name}:{values[0]}" if values and range != RANGES[name]() else name
