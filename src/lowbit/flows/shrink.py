"""The smallest file within a budget of accuracy: the ratio is searched, everything else follows from it.

For each ratio all layers share one price of a bit (`fit_size`), which decides how fine the values of each are and how
many become zero; so one number is searched for, by halving, and each trial is measured on samples kept apart.
"""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lowbit.errors import DataError, InputError, TooSmallError
from lowbit.flows.compress import Compression, Progress, compress
from lowbit.flows.given import model_and_data
from lowbit.model import Model
from lowbit.train.loop import Samples

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
        drop = 100 * (self.before - self.after)
        return {
            "budget": f"{text}: {self.metric} {100 * self.before:.2f} → {100 * self.after:.2f} %, a drop of {drop:.2f} "
            f"where {self.max_drop:g} is allowed",
            "trials": len(self.trials),
        }


def shrink(
    model: Any,
    data: Any,
    max_drop: float,
    settings: Compression | None = None,
    *,
    checkpoint: str | Path | None = None,
    progress: Progress | None = None,
) -> Found:
    """The smallest compression whose metric is at most `max_drop` points (of a hundred) below the float network's.

    settings   what else is asked for: pruning, epochs of training in each trial; its ratio is what is searched

    The metric is the share of right classes, or without labels of classes that the float network chooses too, on the
    last fifth of the data, which is not trained on.
    """
    base = settings or Compression()
    if base.codebook is not None or base.layers:
        raise InputError("a budget decides how many values each weight has: leave out codebook and layers.")
    model, given = model_and_data(model, data)
    every = Samples.of(given.batches(256))
    if len(every) < 20:
        raise DataError(f"{len(every)} samples are too few to train on some and judge on others; give 20 or more.")
    rows = torch.arange(len(every))
    kept = max(10, len(every) // 5)
    training, judged = every.take(rows[:-kept]), every.take(rows[-kept:])
    wanted, metric = _answers(model, judged)
    before = _share_right(model, judged, wanted)
    low, high = np.log2(SMALLEST_RATIO), np.log2(LARGEST_RATIO)
    best: tuple[Model, float, bool] | None = None
    trials: list[Trial] = []
    for number in range(TRIALS):
        ratio = float(2 ** (low if number == 0 else (low + high) / 2))  # the first: whether there is any
        state = None if checkpoint is None else Path(f"{checkpoint}.{number}")
        told = None if progress is None else _numbered(progress, number)
        try:
            small = compress(
                model, _arrays(model, training), replace(base, ratio=ratio), checkpoint=state, progress=told
            )
        except TooSmallError:
            if number == 0:
                raise
            trials.append(Trial(ratio, None, False))
            high = np.log2(ratio)
            continue
        after = _share_right(small, judged, wanted)
        within = 100 * (before - after) <= max_drop + 1e-9
        trials.append(Trial(ratio, after, within))
        if best is None or within:  # ratios within the budget only grow
            best = small, after, within
        if number == 0 and not within:
            break
        low, high = (np.log2(ratio), high) if within else (low, np.log2(ratio))
    assert best is not None
    return Found(best[0], metric, before, best[1], max_drop, best[2], tuple(trials))


def _numbered(progress: Progress, number: int) -> Progress:
    return lambda phase, done, total: progress(f"trial {number + 1}, {phase}", done, total)


def _arrays(model: Model, samples: Samples) -> dict[str, np.ndarray]:
    found = {port.name: x.numpy() for port, x in zip(model.inputs, samples.inputs, strict=True)}
    return found if samples.labels is None else found | {"labels": samples.labels.numpy()}


def _classes(model: Model, samples: Samples) -> np.ndarray:
    parts = []
    for start in range(0, len(samples), 256):
        part = samples.take(torch.arange(start, min(start + 256, len(samples))))
        outputs = model.run({port.name: x.numpy() for port, x in zip(model.inputs, part.inputs, strict=True)})
        scores = next(iter(outputs.values()))
        if scores.ndim < 2:
            raise DataError(
                "a budget of accuracy needs a network whose first output is a row of scores for each sample."
            )
        parts.append(scores.reshape(len(scores), -1, scores.shape[-1]).argmax(axis=-1))
    return np.concatenate(parts)


def _answers(model: Model, samples: Samples) -> tuple[np.ndarray, str]:
    """What is right for each sample, and the name of the metric that counts it."""
    classes = _classes(model, samples)
    if samples.labels is not None and samples.labels.dim() == 1 and classes.shape[1] == 1:
        return samples.labels.numpy().reshape(-1, 1), "top1"
    return classes, "agreement with float"


def _share_right(model: Model, samples: Samples, wanted: np.ndarray) -> float:
    return float((_classes(model, samples) == wanted).mean())
