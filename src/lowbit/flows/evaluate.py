"""One network over data: its metric, its outputs."""

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from lowbit.data import Data, Preprocessing
from lowbit.data.samples import Batching
from lowbit.engines.compile import ENGINES, Engine
from lowbit.errors import DataError, InputError
from lowbit.flows.given import model_and_data
from lowbit.flows.metrics import Metric, metric_of
from lowbit.model import Model, load


def evaluate(
    model: Any,
    data: Any,
    metric: "str | Metric | Callable[..., float]",
    *,
    preprocess: str | Mapping[str, Any] | Preprocessing | None = None,
    names: Mapping[str, str] | None = None,
    batch: int | None = None,
) -> float:
    """The metric of a network over data with labels: a name of METRICS, `module:function`, or a function."""
    loaded, samples = model_and_data(model, data, preprocess=preprocess, names=names, allow_nonfinite=True)
    chosen = metric_of(metric)
    tally = chosen.tally()
    for inputs, labels in samples.batches(batch):
        tally.add(loaded.run(inputs), needed_labels(labels, chosen))
    return tally.value()


def predict(
    model: Model | str | os.PathLike[str],
    data: Data,
    metric: "str | Metric | Callable[..., float] | None" = None,
    *,
    engine: str = "onnxruntime",
    threads: int | None = None,
    batch: int | None = None,
) -> tuple[dict[str, np.ndarray], float | None]:
    """All outputs by name, samples joined, and the metric where one is asked for; a path is run as the file is."""
    network = load(model, allow_nonfinite=True) if isinstance(model, (str, os.PathLike)) else model
    packed = not isinstance(model, Model) and Path(model).suffix == ".lowbit"
    program = network.program if isinstance(model, Model) or packed else Path(model)
    run = engine_of(engine).compile(program, threads=threads)
    chosen = None if metric is None else metric_of(metric)
    tally = None if chosen is None else chosen.tally()
    parts: list[dict[str, np.ndarray]] = []
    for inputs, labels in data.batches(batch):
        parts.append(run(inputs))
        if tally is not None and chosen is not None:
            tally.add(parts[-1], needed_labels(labels, chosen))
    axes = Batching.of(network.inputs).axes_of(network.outputs)
    outputs = {name: _joined(name, [part[name] for part in parts], axes.get(name) or 0) for name in parts[0]}
    return outputs, None if tally is None else tally.value()


def engine_of(name: str) -> Engine:
    """The engine of this name, or an error that lists them."""
    if name not in ENGINES:
        raise InputError(f"there is no engine '{name}'. There are {', '.join(ENGINES)}.")
    return ENGINES[name]


def needed_labels(labels: np.ndarray | None, metric: Metric) -> np.ndarray:
    """The labels, or an error that says for what they are missed."""
    if labels is None:
        raise DataError(f"the metric '{metric.name}' needs labels, and the data has none. Add an array named 'labels'.")
    return labels


def _joined(name: str, parts: list[np.ndarray], axis: int) -> np.ndarray:
    if len(parts) == 1:
        return parts[0]
    shapes = {part.shape[:axis] + part.shape[axis + 1 :] for part in parts if part.ndim}
    if len(shapes) != 1:
        listed = ", ".join(map(str, sorted(shapes)[:4]))
        raise DataError(f"output '{name}' has samples of other shapes ({listed} …); run them one --limit at a time.")
    return np.concatenate(parts, axis)
