"""Float against quantized on the same data: does it still do its job, how much smaller is it, how much faster.

Everything is measured on what will be deployed: a path is run by the engine as the file is, byte for byte.
"""

import tempfile
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from lowbit.data import Data, Preprocessing
from lowbit.data.samples import SampleBatch
from lowbit.engines.profile import OperatorTime, operator_times
from lowbit.errors import ModelError
from lowbit.flows.evaluate import Subject
from lowbit.flows.fidelity import Closeness, Fidelity, LayerFidelity, layer_fidelity
from lowbit.flows.given import model_and_data
from lowbit.flows.latency import Timing, side_by_side
from lowbit.flows.metrics import METRICS, Metric, Tally, default_metric, metric_of, points_lost
from lowbit.graph.notes import sizes
from lowbit.model import Model
from lowbit.report.ledger import Ledger
from lowbit.report.words import db_text, plain, times_text

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
        """Points that the candidate's metric is worse by (`points_lost`); 0 without a metric."""
        if self.reference.metric is None or self.candidate.metric is None:
            return 0.0
        return points_lost(self.reference.metric, self.candidate.metric, self.better)

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
        facts.append(times_text(self.times_smaller))
        if self.times_faster is not None:
            facts.append(f"{self.faster_text} on {self.threads_text}")
        told = f" {self.left_in_float}." if self.left_in_float else ""
        name = Path(self.candidate.name).name
        return f"{name} {self.kept} the job: {', '.join(facts)} ({self.samples:,} samples).{told}"

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON; an infinite signal-to-noise ratio (equal values) is None."""
        names = ("metric_change", "agreement", "times_smaller", "times_faster", "kept", "verdict")
        found: dict[str, Any] = plain(asdict(self) | {name: getattr(self, name) for name in names})
        return found

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

    @property
    def faster_text(self) -> str:
        """How many times faster; empty where latency was not measured."""
        return times_text(self.times_faster, "faster", "slower", "same speed") if self.times_faster else ""

    @property
    def threads_text(self) -> str:
        """The threads that latency was measured on."""
        return f"{self.threads} thread{'s' * (self.threads != 1)}"

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
    first, second = Subject.of(reference, opened), Subject.of(candidate, other)
    if first.name == second.name:
        first, second = replace(first, name="reference"), replace(second, name="candidate")
    _same_interface(first.model, second.model)
    seen = _run_both(samples, first, second, None if metric is None else metric_of(metric), batch)
    sample = samples.cut(seen.kept[0], 1).inputs
    timings: dict[str, Timing] = {}
    if latency:
        runs = {"reference": first.compiled(engine, threads), "candidate": second.compiled(engine, threads)}
        timings = side_by_side({side: partial(run, sample) for side, run in runs.items()})
    inner: tuple[LayerFidelity, ...] = ()
    if layers:
        inner = layer_fidelity(first.model.program, second.model.program, [part.inputs for part in seen.kept])
    values: list[float | None] = [tally.value() for tally in seen.tallies]
    values = values or [None, None]
    found = Comparison(
        reference=Side(first.name, *_sizes(first), values[0], timings.get("reference")),
        candidate=Side(second.name, *_sizes(second), values[1], timings.get("candidate")),
        metric=None if seen.metric is None else seen.metric.name,
        better="higher" if seen.metric is None else seen.metric.better,
        samples=seen.samples,
        outputs=tuple(closeness.fidelity(name) for name, closeness in seen.outputs.items()),
        layers=inner,
        engine=engine,
        threads=threads,
        latency_batch=samples.fixed_batch or 1,
        left_in_float=Ledger.of(second.model).float_text(),
    )
    if engine == "onnxruntime" and found.times_faster is not None and found.times_faster < NOT_SLOWER:
        return replace(found, slowest=operator_times(second.program, sample, threads)[0])
    return found


@dataclass
class _Seen:
    """What one pass of both networks over the data gathers; the first samples are kept for a closer look."""

    metric: Metric | None
    tallies: list[Tally] = field(default_factory=list)
    outputs: dict[str, Closeness] = field(default_factory=dict)
    kept: list[SampleBatch] = field(default_factory=list)
    samples: int = 0


def _run_both(data: Data, reference: Subject, candidate: Subject, metric: Metric | None, batch: int | None) -> _Seen:
    run_reference, run_candidate = reference.compiled(), candidate.compiled()
    seen = _Seen(metric)
    for samples in data.samples(batch):
        a, b = run_reference(samples.inputs), run_candidate(samples.inputs)
        if seen.samples == 0:
            seen.metric = metric or default_metric(a, samples.labels)
            seen.tallies = [] if seen.metric is None else [Tally(seen.metric), Tally(seen.metric)]
            seen.outputs = {name: Closeness() for name, value in a.items() if value.dtype.kind in "fiu"}
        for name, closeness in seen.outputs.items():
            if a[name].shape != b[name].shape:
                raise ModelError(f"output '{name}' is {a[name].shape} in one model, {b[name].shape} in the other.")
            closeness.add(a[name], b[name], samples.labels)
        for tally, outputs in zip(seen.tallies, (a, b), strict=False):
            tally.add(outputs, samples.labels)
        if seen.samples < LAYER_SAMPLES:
            seen.kept.append(data.cut(samples, LAYER_SAMPLES - seen.samples))
        seen.samples += samples.count
    return seen


def _sizes(subject: Subject) -> tuple[int, int]:
    """Bytes on disk, and how many of them are notes; of a model in memory, those of the file that it would be."""
    if subject.file is not None:
        return sizes(subject.file)
    with tempfile.TemporaryDirectory(prefix="lowbit-") as folder:
        path = Path(folder) / "model.onnx"
        subject.model.save(path)
        return sizes(path)


def _same_interface(reference: Model, candidate: Model) -> None:
    """ModelError where names of inputs or outputs differ, or an input's type or shape."""
    for kind, *both in (
        ("inputs", reference.inputs, candidate.inputs),
        ("outputs", reference.outputs, candidate.outputs),
    ):
        a, b = ([port.name for port in ports] for ports in both)
        if set(a) != set(b):
            raise ModelError(f"the two models differ in their {kind}: {', '.join(a)}; {', '.join(b)}.")
    others = {port.name: port for port in candidate.inputs}
    for port in reference.inputs:
        other = others[port.name]
        sides = zip(port.shape, other.shape, strict=False)
        unequal = any(isinstance(a, int) and isinstance(b, int) and a != b for a, b in sides)
        unequal |= port.ranked and other.ranked and len(port.shape) != len(other.shape)
        if unequal or port.dtype != other.dtype:
            raise ModelError(f"the two models differ in their input {port}: the second takes {other}.")
