"""Float against quantized on the same data: does it still do its job, how much smaller is it, how much faster.

Everything is measured on what will be deployed: a path is run by the engine as the file is, byte for byte.
"""

import os
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from functools import partial
from math import isfinite
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import onnx_ir as ir

from lowbit.data import Data, Preprocessing
from lowbit.data.samples import Samples
from lowbit.engines.compile import Run
from lowbit.engines.profile import OperatorTime, slowest_operator
from lowbit.errors import ModelError
from lowbit.flows.evaluate import engine_of, needed_labels
from lowbit.flows.fidelity import Closeness, Fidelity, LayerFidelity, layer_fidelity
from lowbit.flows.given import model_and_data
from lowbit.flows.latency import Timing, side_by_side
from lowbit.flows.metrics import METRICS, Metric, Tally, default_metric, metric_of
from lowbit.graph.notes import sizes
from lowbit.model import Model
from lowbit.report.ledger import Ledger
from lowbit.report.words import db_text, times_text

if TYPE_CHECKING:
    from rich.console import RenderableType

LAYER_SAMPLES = 8  # a signal-to-noise ratio over a whole feature map is steady after a few samples

# What "keeps the job" means. 99 % of the float quality is the bar that MLPerf Inference sets for quantized networks;
# without labels the same share of unchanged answers, without classes an error of 0.1 % of the signal's power.
KEEPS = {"metric": 0.99, "agreement": 0.99, "sqnr_db": 30.0}
NOT_SLOWER = 0.95  # two timings of one file differ by less
NEARLY = {"metric": 0.95, "agreement": 0.95, "sqnr_db": 20.0}


@dataclass(frozen=True)
class Side:
    """One of the two networks: where it comes from, its metric and its latency where measured.

    note_bytes   of the bytes on disk, an exporter's notes on source code, which are not counted as saved
    """

    name: str
    bytes_on_disk: int
    note_bytes: int
    metric: float | None
    latency: Timing | None

    @property
    def network_bytes(self) -> int:
        """Bytes on disk without the notes."""
        return self.bytes_on_disk - self.note_bytes


@dataclass(frozen=True)
class Comparison:
    """A reference network and a candidate on the same samples.

    metric is None where no labels were given; layers is empty and latencies are None where they were not asked for
    latency is of `latency_batch` samples on `threads` threads of `engine`, the two networks alternating
    slowest is the operator on which the candidate spends most time, where onnxruntime runs it slower than the reference
    """

    reference: Side
    candidate: Side
    metric: str | None
    better: Literal["higher", "lower"]
    samples: int
    outputs: tuple[Fidelity, ...]
    layers: tuple[LayerFidelity, ...]
    engine: str
    threads: int
    latency_batch: int
    left_in_float: str = ""  # where most weight bytes of the candidate stayed float: how many, and why
    slowest: OperatorTime | None = None

    @property
    def metric_change(self) -> float | None:
        """candidate - reference, in the metric's units."""
        if self.reference.metric is None or self.candidate.metric is None:
            return None
        return self.candidate.metric - self.reference.metric

    @property
    def drop(self) -> float:
        """How much worse the candidate's metric is; negative where it is better, 0 without a metric."""
        change = self.metric_change or 0.0
        return -change if self.better == "higher" else change

    @property
    def agreement(self) -> float | None:
        """Share of samples with the same top class in the first output that has classes."""
        return next((output.agreement for output in self.outputs if output.agreement is not None), None)

    @property
    def times_smaller(self) -> float:
        """Bytes of the reference for each byte of the candidate, without exporters' notes in either."""
        return self.reference.network_bytes / self.candidate.network_bytes

    @property
    def times_faster(self) -> float | None:
        """Median latency of the reference over that of the candidate."""
        if self.reference.latency is None or self.candidate.latency is None:
            return None
        return self.reference.latency.median_ms / self.candidate.latency.median_ms

    @property
    def kept(self) -> Literal["keeps", "nearly keeps", "does not keep"]:
        """Whether the candidate still does the reference's job, by the best evidence there is."""
        kind, value = self._evidence()
        return "keeps" if value >= KEEPS[kind] else "nearly keeps" if value >= NEARLY[kind] else "does not keep"

    @property
    def verdict(self) -> str:
        """One plain line."""
        facts = []
        if self.metric_change is not None:
            facts.append(f"{self.metric} {self.change_text}")
        if self.agreement is not None:
            facts.append(f"same answer on {100 * self.agreement:.1f} %")
        if not facts:
            facts.append(f"SQNR {db_text(min(output.sqnr_db for output in self.outputs))}")
        facts.append(times_text(self.times_smaller, "smaller", "larger", "same size"))
        if self.times_faster is not None:
            threads = f"{self.threads} thread{'s' * (self.threads != 1)}"
            facts.append(f"{times_text(self.times_faster, 'faster', 'slower', 'same speed')} on {threads}")
        told = f" {self.left_in_float}." if self.left_in_float else ""
        name = Path(self.candidate.name).name
        return f"{name} {self.kept} the job: {', '.join(facts)} ({self.samples:,} samples).{told}"

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON; an infinite signal-to-noise ratio (equal values) is None."""
        derived = {
            "metric_change": self.metric_change,
            "agreement": self.agreement,
            "times_smaller": self.times_smaller,
            "times_faster": self.times_faster,
            "kept": self.kept,
            "verdict": self.verdict,
        }
        finite: dict[str, Any] = _finite(asdict(self) | derived)
        return finite

    def __rich__(self) -> "RenderableType":
        from lowbit.report.comparison import comparison_view

        return comparison_view(self)

    def __str__(self) -> str:
        from lowbit.report.comparison import as_text

        return as_text(self)

    def _evidence(self) -> tuple[str, float]:
        """The kind of evidence and a value to hold against KEEPS and NEARLY."""
        reference, candidate = self.reference.metric, self.candidate.metric
        if reference is not None and candidate is not None:
            if candidate == reference or (candidate > reference) == (self.better == "higher"):
                return "metric", 1.0
            # A change by 1 % of the reference counts alike for a quality that falls and for an error that grows.
            return "metric", 1 - abs(candidate - reference) / abs(reference) if reference else 0.0
        if self.agreement is not None:
            return "agreement", self.agreement
        return "sqnr_db", min(output.sqnr_db for output in self.outputs)

    @property
    def change_text(self) -> str:
        """The change of the metric as one reads it."""
        known, change = METRICS.get(self.metric or ""), self.metric_change or 0.0
        return known.change_text(change) if known else f"{change:+.3g}"

    def metric_text(self, value: float | None) -> str:
        """A value of the metric as one reads it."""
        known = METRICS.get(self.metric or "")
        return "" if value is None else known.text(value) if known else f"{value:.4g}"


def compare(
    reference: Any,
    candidate: Any,
    data: Any,
    metric: str | Metric | Callable[..., float] | None = None,
    *,
    preprocess: str | Mapping[str, Any] | Preprocessing | None = None,
    names: Mapping[str, str] | None = None,
    latency: bool = True,
    layers: bool = True,
    threads: int = 1,
    engine: str = "onnxruntime",
    batch: int | None = None,
) -> Comparison:
    """Run both networks on the same data and say how they differ: quality, closeness, bytes and speed.

    reference, candidate   a Model, a path (its file is run as it is), whatever else `load` takes, or a torch module
    data        anything that `Data.of` takes, with labels where there are any
    metric      a name of METRICS, `module:function`, or function(outputs, labels) -> float; None: top1 where there are
                class labels, else closeness alone
    latency     measure it, on one sample at a time (or the network's fixed batch), on `threads` threads of `engine`
    layers      measure signal-to-noise inside the networks, on the first samples
    """
    opened, samples = model_and_data(reference, data, preprocess=preprocess, names=names, allow_nonfinite=True)
    other, _ = model_and_data(candidate, samples, allow_nonfinite=True)
    first, second = _Subject.of(reference, opened), _Subject.of(candidate, other)
    if first.name == second.name:
        first, second = replace(first, name="reference"), replace(second, name="candidate")
    _same_interface(first.model, second.model)
    pass_ = _Pass.over(samples, first, second, None if metric is None else metric_of(metric), batch)
    timings: dict[str, Timing] = {}
    sample = samples.cut(pass_.kept[0], 1).inputs
    if latency:
        runs = {side: subject.compiled(engine, threads) for side, subject in (("a", first), ("b", second))}
        timings = side_by_side({side: partial(run, sample) for side, run in runs.items()})
    inner = (
        layer_fidelity(first.model.program, second.model.program, [part.inputs for part in pass_.kept])
        if layers
        else ()
    )
    values = pass_.values()
    found = Comparison(
        Side(first.name, *first.sizes(), values[0], timings.get("a")),
        Side(second.name, *second.sizes(), values[1], timings.get("b")),
        None if pass_.metric is None else pass_.metric.name,
        "higher" if pass_.metric is None else pass_.metric.better,
        pass_.samples,
        tuple(closeness.fidelity(name) for name, closeness in pass_.outputs.items()),
        inner,
        engine,
        threads,
        samples.fixed_batch or 1,
        Ledger.of(second.model).float_text(),
    )
    if engine == "onnxruntime" and found.times_faster is not None and found.times_faster < NOT_SLOWER:
        return replace(found, slowest=slowest_operator(second.program, sample, threads))
    return found


@dataclass
class _Pass:
    """One pass of both networks over the data, and what it gathers; the first samples are kept for a closer look."""

    metric: Metric | None
    tallies: tuple[Tally, Tally] | None
    outputs: dict[str, Closeness]
    kept: list[Samples]
    samples: int = 0

    @classmethod
    def over(
        cls,
        data: Data,
        reference: "_Subject",
        candidate: "_Subject",
        metric: Metric | None,
        batch: int | None,
    ) -> "_Pass":
        run_reference, run_candidate = reference.compiled("onnxruntime"), candidate.compiled("onnxruntime")
        found = cls(metric, None, {}, [])
        for samples in data.samples(batch):
            a, b = run_reference(samples.inputs), run_candidate(samples.inputs)
            if found.samples == 0:
                found.metric = metric or default_metric(a, samples.labels)
                found.tallies = None if found.metric is None else (found.metric.tally(), found.metric.tally())
                found.outputs = {name: Closeness() for name, value in a.items() if value.dtype.kind in "fiu"}
            for name, closeness in found.outputs.items():
                if a[name].shape != b[name].shape:
                    raise ModelError(f"output '{name}' is {a[name].shape} in one model, {b[name].shape} in the other.")
                closeness.add(a[name], b[name], samples.labels)
            if found.tallies is not None and found.metric is not None:
                labels = needed_labels(samples.labels, found.metric)
                found.tallies[0].add(a, labels)
                found.tallies[1].add(b, labels)
            if found.samples < LAYER_SAMPLES:
                found.kept.append(data.cut(samples, LAYER_SAMPLES - found.samples))
            found.samples += samples.count
        return found

    def values(self) -> tuple[float | None, float | None]:
        """The metric of both networks."""
        return (None, None) if self.tallies is None else (self.tallies[0].value(), self.tallies[1].value())


@dataclass(frozen=True)
class _Subject:
    """A network to compare: its program, and the very file it lies in where it was given as one."""

    name: str
    model: Model
    file: Path | None

    @classmethod
    def of(cls, given: Any, model: Model) -> "_Subject":
        return cls(model.source, model, Path(given) if isinstance(given, (str, os.PathLike)) else None)

    @property
    def program(self) -> ir.Model | Path:
        """What an engine reads: the file as it is, where it is one."""
        as_it_is = self.file if not self.packed and not self.model.converted else None
        return as_it_is or self.model.program

    def compiled(self, engine: str, threads: int | None = None) -> Run:
        return engine_of(engine).compile(self.program, threads=threads)

    @property
    def packed(self) -> bool:
        """Whether the file is a container, which engines know nothing of."""
        return self.file is not None and self.file.suffix == ".lowbit"

    def sizes(self) -> tuple[int, int]:
        """Bytes on disk, and how many of them are notes."""
        if self.file is not None:
            return sizes(self.file)
        with tempfile.TemporaryDirectory(prefix="lowbit-") as folder:
            path = Path(folder) / "model.onnx"
            self.model.save(path)
            return sizes(path)


def _same_interface(reference: Model, candidate: Model) -> None:
    for kind, a, b in (
        ("inputs", reference.inputs, candidate.inputs),
        ("outputs", reference.outputs, candidate.outputs),
    ):
        names = [[port.name for port in ports] for ports in (a, b)]
        if set(names[0]) != set(names[1]):
            raise ModelError(f"the two models differ in their {kind}: {', '.join(names[0])}; {', '.join(names[1])}.")
    others = {port.name: port for port in candidate.inputs}
    for port in reference.inputs:
        other = others[port.name]
        sides = zip(port.shape, other.shape, strict=False)
        unequal = any(isinstance(a, int) and isinstance(b, int) and a != b for a, b in sides)
        if (
            unequal
            or port.dtype != other.dtype
            or (port.ranked and other.ranked and len(port.shape) != len(other.shape))
        ):
            raise ModelError(f"the two models differ in their input {port}: the second takes {other}.")


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(inner) for inner in value]
    return None if isinstance(value, float) and not isfinite(value) else value
