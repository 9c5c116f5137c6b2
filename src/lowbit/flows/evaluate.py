"""One network over data: its metric, its outputs."""

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from lowbit.data import Data, Preprocessing
from lowbit.data.samples import Batching
from lowbit.engines.compile import ENGINES, Run
from lowbit.errors import DataError, check_name
from lowbit.flows.given import model_and_data
from lowbit.flows.metrics import Metric, Tally, metric_of
from lowbit.integer.engine import IntegerReference
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
    tally = Tally(metric_of(metric))
    for inputs, labels in samples.batches(batch):
        tally.add(loaded.run(inputs), labels)
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
    network = Subject.of(model, model if isinstance(model, Model) else load(model, allow_nonfinite=True))
    run = network.compiled(engine, threads)
    tally = None if metric is None else Tally(metric_of(metric))
    parts: list[dict[str, np.ndarray]] = []
    for inputs, labels in data.batches(batch):
        parts.append(run(inputs))
        if tally is not None:
            tally.add(parts[-1], labels)
    axes = Batching.of(network.model.inputs).axes_of(network.model.outputs)
    outputs = {name: _joined(name, [part[name] for part in parts], axes.get(name) or 0) for name in parts[0]}
    return outputs, None if tally is None else tally.value()


@dataclass(frozen=True)
class Subject:
    """A network to run as it will be deployed: its program, and the very file it lies in where it was given as one."""

    name: str
    model: Model
    file: Path | None

    @classmethod
    def of(cls, given: Any, model: Model) -> "Subject":
        """given: what `model` was loaded from."""
        return cls(model.source, model, Path(given) if isinstance(given, (str, os.PathLike)) else None)

    @property
    def program(self) -> ir.Model | Path:
        """What an engine reads: the file as it is; the program where it is a container or was converted."""
        if self.file is None or self.file.suffix == ".lowbit" or self.model.converted:
            return self.model.program
        return self.file

    def compiled(self, engine: str = "onnxruntime", threads: int | None = None) -> Run:
        """The network in an engine; InputError lists the engines where it is none of them."""
        engines = {**ENGINES, "integer": IntegerReference()}
        check_name("engine", engine, engines)
        return engines[engine].compile(self.program, threads=threads)


def _joined(name: str, parts: list[np.ndarray], axis: int) -> np.ndarray:
    if len(parts) == 1:
        return parts[0]
    try:
        return np.concatenate(parts, axis)
    except ValueError:
        shapes = ", ".join(map(str, sorted({part.shape for part in parts})[:4]))
        raise DataError(
            f"output '{name}' has samples of other shapes ({shapes} …); run them one --limit at a time."
        ) from None
