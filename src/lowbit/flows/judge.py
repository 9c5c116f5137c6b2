"""How a file fares on test data beside the float network: metric, how far it dropped, bytes, latency."""

import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property, partial
from hashlib import blake2b
from itertools import repeat
from math import isfinite
from pathlib import Path

import numpy as np

from lowbit.data import Data
from lowbit.engines.compile import ENGINES, Run
from lowbit.errors import DataError
from lowbit.flows.evaluate import Subject
from lowbit.flows.latency import side_by_side
from lowbit.flows.metrics import Metric, Tally, class_axis, default_metric, metric_of, points_lost
from lowbit.graph.notes import sizes
from lowbit.model import Model, load

SECONDS = 1.0  # that latency is measured for

Answers = list[np.ndarray]


@dataclass(frozen=True)
class Measured:
    """What a file does on the test data.

    drop         points that the metric is worse by than the float network's (`points_lost`)
    latency_ms   of one sample on one thread; times_faster: than the float network, which ran in turn with it
    """

    metric: float
    drop: float
    bytes: int
    latency_ms: float
    times_faster: float


@dataclass(frozen=True)
class Judge:
    """The test data, what it is judged by, and the float network's own result.

    answers   classes of the float network, batch after batch, where the data has no labels of its own
    seen      a digest of each sample
    """

    model: Model
    test: Data
    metric: Metric
    engine: str
    before: float
    answers: Answers | None
    seen: tuple[bytes, ...]

    @staticmethod
    def of(model: Model, test: Data, metric: "str | Metric | Callable[..., float] | None", engine: str) -> "Judge":
        """Run the float network. Without a metric: top1 for class labels; without labels, its own answers are right."""
        known = None if metric is None else metric_of(metric)
        run = ENGINES[engine].compile(model.program)
        digests: list[bytes] = []
        answers: Answers = []
        tally = None
        for inputs, labels in test.batches():
            digests += sample_digests(test, inputs)
            outputs = run(inputs)
            if known is None:
                known = default_metric(outputs, labels) or _agreement(outputs, labels)
            tally = tally or Tally(known)
            if labels is None and metric is None:
                answers.append(_classes(outputs))
                labels = answers[-1]
            tally.add(outputs, labels)
        assert known is not None
        assert tally is not None  # Data without samples is an error
        before = tally.value()
        if not isfinite(before):
            raise DataError(
                f"the metric '{known.name}' of the float network is {before} on the test data, so no drop can be told. "
                "Give labels that it is defined for: auc and spearman need labels that differ."
            )
        return Judge(model, test, known, engine, before, answers or None, tuple(digests))

    def measure(self, file: Path) -> Measured:
        """Run a written file."""
        network = Subject.of(file, load(file))
        metric = self.value_of(network.compiled(self.engine))
        float_ms, own_ms = self._latencies(network.compiled(self.engine, 1))
        return Measured(metric, self.drop(metric), _network_bytes(file), own_ms, float_ms / own_ms)

    def of_float(self) -> Measured:
        """The float network as a file."""
        with tempfile.TemporaryDirectory(prefix="lowbit-") as folder:
            self.model.save(path := Path(folder) / "float.onnx")
            float_ms, _ = self._latencies(self._float_run)
            return Measured(self.before, 0.0, _network_bytes(path), float_ms, 1.0)

    def drop(self, metric: float) -> float:
        """How much worse than the float network, in points: see `points_lost`."""
        return points_lost(self.before, metric, self.metric.better)

    def value_of(self, run: Run) -> float:
        """The metric of another network on the test data."""
        tally = Tally(self.metric)
        answers: Iterator[np.ndarray | None] = repeat(None) if self.answers is None else iter(self.answers)
        for (inputs, labels), own in zip(self.test.batches(), answers, strict=False):
            tally.add(run(inputs), labels if own is None else own)
        return tally.value()

    @cached_property
    def _float_run(self) -> Run:
        return ENGINES[self.engine].compile(self.model.program, threads=1)

    def _latencies(self, run: Run) -> tuple[float, float]:
        """Milliseconds of the float network and of another, in turn."""
        sample = next(self.test.take(self.test.fixed_batch or 1).batches(1))[0]
        times = side_by_side(
            {"float": partial(self._float_run, sample), "file": partial(run, sample)}, seconds=SECONDS, least_runs=4
        )
        return times["float"].median_ms, times["file"].median_ms


def sample_digests(data: Data, inputs: dict[str, np.ndarray]) -> list[bytes]:
    """A digest of each sample of a batch, of those inputs that differ from sample to sample."""
    axes = data.fitting.batching.axes
    own = [np.moveaxis(array, axis, 0) for name, array in inputs.items() if (axis := axes[name]) is not None]
    parts = zip(*own, strict=True) if own else iter([tuple(inputs.values())])
    return [digest(*(np.ascontiguousarray(part) for part in sample)) for sample in parts]


def digest(*parts: "np.ndarray | bytes") -> bytes:
    """Sixteen bytes that tell contents apart."""
    found = blake2b(digest_size=16)
    for part in parts:
        found.update(part if isinstance(part, bytes) else repr((part.dtype, part.shape)).encode())
        if not isinstance(part, bytes):
            found.update(part.tobytes())
    return found.digest()


def _agreement(outputs: dict[str, np.ndarray], labels: np.ndarray | None) -> Metric:
    """top1 against the float network's own classes; DataError where there is no way to judge."""
    if labels is not None or class_axis(next(iter(outputs.values())), None) is None:
        what = "labels that are no classes" if labels is not None else "no labels, and its outputs are no classes"
        raise DataError(f"the test data has {what}: say what to judge by, as metric='spearman' or module:function.")
    return Metric("agreement with float", **{k: getattr(metric_of("top1"), k) for k in ("rows", "total", "percent")})


def _classes(outputs: dict[str, np.ndarray]) -> np.ndarray:
    found: np.ndarray = next(iter(outputs.values())).argmax(axis=1)
    return found


def _network_bytes(file: Path) -> int:
    whole, notes = sizes(file)
    return whole - notes
