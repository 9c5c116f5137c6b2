"""The smallest file within a budget of accuracy: the ratio is searched, everything else follows from it.

For each ratio all layers share one Lagrange multiplier (`fit_size`), which decides how fine the values of each are and
how many become zero. So one number is searched for, by bisection; each trial is measured on samples kept apart.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lowbit.data import Data
from lowbit.engines.compile import ENGINES
from lowbit.errors import DataError, TooSmallError
from lowbit.flows.compress import compress
from lowbit.flows.compression import Progress, compression
from lowbit.flows.given import by_name, model_and_data
from lowbit.flows.judge import Judge
from lowbit.flows.metrics import points_lost
from lowbit.model import Model
from lowbit.numerics import Format
from lowbit.recipe import Recipe
from lowbit.solve.prune import Pruning
from lowbit.training.samples import Samples
from lowbit.training.schedule import Schedule

Arrays = dict[str, np.ndarray]
SMALLEST_RATIO, LARGEST_RATIO = 4.0, 128.0
TRIALS = 7
"""They find the ratio to 2^(5/2^7): to 3 %."""


@dataclass(frozen=True)
class Trial:
    """A ratio that was tried, and the metric it led to; None where no file is that small."""

    ratio: float
    metric: float | None
    within: bool


@dataclass(frozen=True)
class Found:
    """The smallest model within the budget; if none was, the best one, and `reached` is False."""

    model: Model
    metric: str
    before: float
    after: float
    max_drop: float
    reached: bool
    trials: tuple[Trial, ...]

    def verdict(self) -> dict[str, object]:
        """For people and JSON."""
        text = "reached" if self.reached else "not reached"
        drop = points_lost(self.before, self.after, "higher")
        return {
            "budget": f"{text}: {self.metric} {100 * self.before:.2f} → {100 * self.after:.2f} %, a drop of {drop:.2f} "
            f"where {self.max_drop:g} is allowed",
            "trials": len(self.trials),
        }


def shrink(
    model: Any,
    data: Any,
    max_drop: float,
    recipe: "str | Path | Format | Recipe | None" = None,
    schedule: "str | Path | Mapping[str, Any] | Schedule | None" = None,
    *,
    prune: "Pruning | float | None" = None,
    checkpoint: str | Path | None = None,
    progress: Progress | None = None,
) -> Found:
    """The smallest compression whose metric is at most `max_drop` points (of a hundred) below the float network's.

    recipe, schedule, prune   as in `compress`, for each trial; the recipe's ratio is what is searched

    The metric is the share of right classes, or without labels of classes that the float network chooses too, on the
    last fifth of the data, which is not trained on.
    """
    compression(recipe, SMALLEST_RATIO, prune)  # InputError for a recipe whose formats a ratio would contradict
    model, given = model_and_data(model, data)
    training, test = _split(model, Samples.of(given.batches(256)))
    judge = Judge.of(model, test, None, "onnxruntime")
    trials: list[Trial] = []
    best: tuple[Model, float, bool] | None = None
    low, high = np.log2(SMALLEST_RATIO), np.log2(LARGEST_RATIO)
    for number in range(TRIALS):
        ratio = float(2 ** (low if number == 0 else (low + high) / 2))  # the first: whether there is any
        state = None if checkpoint is None else Path(f"{checkpoint}.{number}")
        told = None if progress is None else _numbered(progress, number)
        try:
            how: dict[str, Any] = {"ratio": ratio, "prune": prune, "checkpoint": state, "progress": told}
            small = compress(model, training, recipe, schedule, **how)
        except TooSmallError:
            if number == 0:
                raise
            after, within = None, False
        else:
            after = judge.value_of(ENGINES["onnxruntime"].compile(small.program))
            within = judge.drop(after) <= max_drop + 1e-9
            if best is None or within:  # ratios within the budget only grow
                best = small, after, within
        trials.append(Trial(ratio, after, within))
        if number == 0 and not within:
            break
        low, high = (np.log2(ratio), high) if within else (low, np.log2(ratio))
    assert best is not None
    return Found(best[0], judge.metric.name, judge.before, best[1], max_drop, best[2], tuple(trials))


def _numbered(progress: Progress, number: int) -> Progress:
    return lambda phase, done, total: progress(f"trial {number + 1}, {phase}", done, total)


def _split(model: Model, every: Samples) -> tuple[Arrays, Data]:
    """What is trained on, and the last fifth to judge on."""
    if len(every) < 20:
        raise DataError(f"{len(every)} samples are too few to train on some and judge on others; give 20 or more.")
    rows, kept = torch.arange(len(every)), max(10, len(every) // 5)
    training, judging = (_arrays(model, every.take(part)) for part in (rows[:-kept], rows[-kept:]))
    return training, Data.of(judging, model.inputs)


def _arrays(model: Model, samples: Samples) -> Arrays:
    found = by_name(model, samples.inputs)
    return found if samples.labels is None else found | {"labels": samples.labels.numpy()}
