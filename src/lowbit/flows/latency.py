"""Latency of several networks side by side: calls alternate, so that the load of the machine affects all alike."""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

MOST_RUNS = 2000


@dataclass(frozen=True)
class Timing:
    """Milliseconds of a call over `runs` calls: the median, and the tenth and ninetieth percentile."""

    median_ms: float
    p10_ms: float
    p90_ms: float
    runs: int


def side_by_side(
    calls: Mapping[str, Callable[[], object]], *, seconds: float = 2.0, least_runs: int = 10
) -> dict[str, Timing]:
    """Time each call in turn, round after round, for about `seconds` in all.

    Every second round goes backwards: what follows a slow call in one round precedes it in the next.
    """
    for call in calls.values():  # the first calls pay for lazy allocation
        for _ in range(3):
            call()
    times: dict[str, list[float]] = {name: [] for name in calls}
    end = time.perf_counter() + seconds
    rounds = 0
    while rounds < least_runs or (time.perf_counter() < end and rounds < MOST_RUNS):
        order = list(calls.items()) if rounds % 2 == 0 else list(calls.items())[::-1]
        for name, call in order:
            start = time.perf_counter()
            call()
            times[name].append(time.perf_counter() - start)
        rounds += 1
    return {name: _timing(np.asarray(found) * 1e3) for name, found in times.items()}


def _timing(milliseconds: np.ndarray) -> Timing:
    p10, median, p90 = (float(value) for value in np.percentile(milliseconds, (10, 50, 90)))
    return Timing(median, p10, p90, len(milliseconds))
