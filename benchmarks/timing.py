"""Milliseconds of processor time, several calls in turn: what else runs on the machine then counts little.

With one thread, processor time is the latency that an idle machine would show; a call that is preempted is not longer.
"""

import time
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np


def alternating(
    calls: Mapping[str, Callable[[], object]],
    *,
    seconds: float = 4.0,
    least_rounds: int = 10,
    of: Callable[[list[float]], Any] = np.median,
) -> dict[str, float]:
    """Processor time of each call in ms, the median or what `of` makes of the rounds; every second goes backwards.

    A call that is not timed goes before each: after another network the caches are cold, after a large one colder.
    Two files of the same bytes differed by 6 % by their places in the round (MobileNet v2 in OpenVINO).
    """
    times: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        call()
        call()
    end, rounds = time.perf_counter() + seconds, 0
    while rounds < least_rounds or time.perf_counter() < end:
        for name in list(calls)[:: 1 if rounds % 2 else -1]:
            calls[name]()
            start = time.process_time()
            calls[name]()
            times[name].append(time.process_time() - start)
        rounds += 1
    return {name: 1e3 * float(of(found)) for name, found in times.items()}
