"""Ranges that learn while the network trains; `network.learners` is what they do then."""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from lowbit.errors import InputError, check_name
from lowbit.numerics.formats import Format
from lowbit.ranges.extremes import Bounds, Range
from lowbit.ranges.search import MSE
from lowbit.ranges.statistics import Statistics

METHODS: Mapping[str, str] = MappingProxyType(
    {
        "ste": "weights and activations: the range of the start stays",
        "lsq": "weights and activations: the step learns",
        "lsq+": "weights and activations: the step learns, and of activations the offset",
        "ema": "weights and activations: extremes, of activations their moving average",
        "dorefa": "weights and activations: weights through tanh, activations in a fixed range",
        "pact": "activations: the upper end learns, with a penalty",
        "apot": "weights: normalized, their clip learns",
        "lqnets": "weights in a 'bases' format: the basis is solved by least squares at each step",
        "xnor": "weights in two values: the mean magnitude is their scale",
        "twn": "weights in three values: beyond 0.7 of the mean magnitude they count",
    }
)


_MSE = MSE()


@dataclass(frozen=True)
class Learned:
    """A range that learns by one of METHODS when the network trains.

    It begins as `start`, and is that where nothing trains.

    In words the start stands behind a colon: "lsq", "pact:percentile:99.9".
    """

    method: str
    start: Range = _MSE

    def __post_init__(self) -> None:
        check_name("method of a learned range", self.method, METHODS)
        if not isinstance(self.start, Range) or isinstance(self.start, Learned):
            raise InputError(f"a learned range starts as a range that does not learn, not as {self.start!r}.")

    def bounds(self, statistics: Statistics, format: Format) -> Bounds:
        return self.start.bounds(statistics, format)
