"""The smallest network within a budget of accuracy: sparsity and bits of every layer chosen by what they cost.

What pruning or sharing one layer alone does to the outputs is measured once, without training. One price for a bit
then decides every layer, and the price is searched: each trial trains, and is measured on samples kept apart.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lowbit.data import Data
from lowbit.errors import DataError
from lowbit.flows.compress import PREPARE, Compression, Layer, Progress, compress, compressible
from lowbit.flows.distill import Task
from lowbit.flows.train import Samples
from lowbit.graph import PASSES
from lowbit.model import Model
from lowbit.simulate.build import build
from lowbit.simulate.compressed import CompressedNetwork
from lowbit.solve.prune import Pruning
from lowbit.solve.share import share

SPARSITIES = (0.0, 0.3, 0.5, 0.7, 0.8, 0.9, 0.95, 0.98)
BITS = (2, 3, 4, 5, 6)
PROBES = 128
"""Samples on which single layers are tried."""
TRIALS = 5
PRICES = np.geomspace(1e-8, 1e-3, 33)
"""Prices of a byte, in units of the loss; a trial picks one, so five trials find one of 32."""


@dataclass(frozen=True)
class Cost:
    """One way to store one layer: its estimated bytes, and the loss that it alone causes, without training."""

    layer: Layer
    size_bytes: float
    loss: float


@dataclass(frozen=True)
class Trial:
    """A price that was tried: what it led to, in estimated bytes and measured metric."""

    price: float
    size_bytes: float
    metric: float
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
    model: Model,
    data: Any,
    max_drop: float,
    settings: Compression | None = None,
    *,
    checkpoint: str | Path | None = None,
    progress: Progress | None = None,
) -> Found:
    """The smallest compression whose metric is at most `max_drop` points (of a hundred) below the float network's.

    The metric is the share of right classes, or without labels of classes that the float network chooses too, on the
    last fifth of the data, which is not trained on.
    """
    base = settings or Compression()
    every = Samples.of(Data.of(data, model.inputs).batches(256))
    if len(every) < 20:
        raise DataError(f"{len(every)} samples are too few to train on some and judge on others; give 20 or more.")
    rows = torch.arange(len(every))
    kept = max(10, len(every) // 5)
    training, judged = every.take(rows[:-kept]), every.take(rows[-kept:])
    wanted, metric = _answers(model, judged)
    before = _share_right(model, judged, wanted)
    costs = layer_costs(model, training)
    low, high = 0, len(PRICES) - 1
    best: tuple[Model, Trial] | None = None
    trials: list[Trial] = []
    for number in range(TRIALS):
        if low > high:
            break
        middle = (low + high) // 2
        chosen = [min(options, key=lambda cost: cost.loss + PRICES[middle] * cost.size_bytes) for options in costs]
        layers = tuple(cost.layer for cost in chosen)
        state = None if checkpoint is None else Path(f"{checkpoint}.{number}")
        small = compress(
            model, _arrays(model, training), replace(base, layers=layers), checkpoint=state,
            progress=None if progress is None else _numbered(progress, number),
        )  # fmt: skip
        after = _share_right(small, judged, wanted)
        within = 100 * (before - after) <= max_drop + 1e-9
        trial = Trial(float(PRICES[middle]), sum(cost.size_bytes for cost in chosen), after, within)
        trials.append(trial)
        if best is None or _better(trial, best[1]):
            best = small, trial
        low, high = (middle + 1, high) if within else (low, middle - 1)
    assert best is not None
    return Found(best[0], metric, before, best[1].metric, max_drop, best[1].within, tuple(trials))


def _better(trial: Trial, best: Trial) -> bool:
    if trial.within != best.within:
        return trial.within
    return trial.size_bytes < best.size_bytes if trial.within else trial.metric > best.metric


def _numbered(progress: Progress, number: int) -> Progress:
    return lambda phase, done, total: progress(f"trial {number + 1}, {phase}", done, total)


def layer_costs(model: Model, samples: Samples) -> list[list[Cost]]:
    """For each compressible layer the ways to store it and what they cost; losses of pruning and sharing add up."""
    prepared = model.copy()
    for name in PREPARE:
        PASSES[name](prepared.program)
    module = build(prepared.program).eval()
    keys: Mapping[str, str] = module.meta["keys"]
    network = CompressedNetwork(module)
    probes = samples.take(torch.arange(min(PROBES, len(samples))))
    task = Task.of(network, probes, 1.0, 1.0)
    rows = torch.arange(len(probes))

    def loss(key: str, weight: Tensor) -> float:
        with torch.no_grad():
            outputs = network(*probes.inputs, weights=network.parameters | {key: weight})
            return float(task.loss(outputs, probes, rows))

    found = []
    for name, axis in compressible(prepared.program).items():
        key = keys[name]
        weight = network.parameters[key]
        masks = {
            s: Pruning(s, "layer").masks({name: weight.movedim(axis, 0)})[name].movedim(0, axis) for s in SPARSITIES
        }
        pruned = {s: loss(key, weight * masks[s]) for s in SPARSITIES}
        shared = {b: loss(key, share(weight, None, b).dense()) for b in BITS}
        options = []
        for sparsity in SPARSITIES:
            for bits in BITS:
                codes = share(weight, masks[sparsity], bits).codes
                size = weight.numel() * _entropy(codes) / 8 + 4 * 2**bits
                options.append(Cost(Layer(name, sparsity, bits), size, pruned[sparsity] + shared[bits]))
        found.append(options)
    return found


def _entropy(codes: Tensor) -> float:
    shares = np.bincount(codes.numpy().reshape(-1)) / codes.numel()
    return float(-(shares[shares > 0] * np.log2(shares[shares > 0])).sum())


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
