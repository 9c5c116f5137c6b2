"""How good outputs are against labels: each metric folds batches into rows and rows into one number."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from lowbit.classes import class_axes
from lowbit.data.samples import stacked
from lowbit.data.sources import imported
from lowbit.errors import DataError, InputError, check_name

Outputs = Mapping[str, np.ndarray]


@dataclass(frozen=True)
class Metric:
    """A named number over samples.

    rows      (outputs, labels) of a batch → what the metric keeps of it
    total     what was kept of all batches → the number
    percent   a share of 1 that is shown times 100
    """

    name: str
    rows: Callable[[Outputs, np.ndarray], Any]
    total: Callable[[list[Any]], float]
    better: Literal["higher", "lower"] = "higher"
    percent: bool = False

    def text(self, value: float) -> str:
        """The value as one reads it."""
        return f"{100 * value:.2f} %" if self.percent else f"{value:.4g}"

    def change_text(self, change: float) -> str:
        """A difference of two values, with its sign."""
        return f"{100 * change:+.2f}" if self.percent else f"{change:+.3g}"


def points_lost(before: float, after: float, better: Literal["higher", "lower"]) -> float:
    """How much worse a metric became, in points; negative where it became better.

    A point is a hundredth of 1 where a higher metric is better and at most 1 (a share, a correlation), else a percent
    of the value before.
    """
    worse = before - after if better == "higher" else after - before
    share = better == "higher" and abs(before) <= 1
    return 100 * worse / (1.0 if share else max(abs(before), 1e-30))


@dataclass
class Tally:
    """What a metric has seen so far."""

    metric: Metric
    seen: list[Any] = field(default_factory=list)

    def add(self, outputs: Outputs, labels: np.ndarray | None) -> None:
        """A batch; DataError without labels."""
        if labels is None:
            name = self.metric.name
            raise DataError(f"the metric '{name}' needs labels, and the data has none. Add an array named 'labels'.")
        self.seen.append(self.metric.rows(outputs, labels))

    def value(self) -> float:
        return self.metric.total(self.seen)


def class_axis(output: np.ndarray, labels: np.ndarray | None) -> int | None:
    """The axis of an output that holds one number a class; None where the output is not about classes.

    Without labels (n, classes) is taken for one. Integer labels (n, …) tell it of (n, …, classes) and (n, classes, …);
    other labels (scores, boxes) tell that it is none: the largest number of an embedding is no answer.
    """
    if labels is None:
        return 1 if output.ndim == 2 and output.shape[1] > 1 else None
    return next(iter(class_axes(output.shape, labels.shape)), None) if labels.dtype.kind in "iu" else None


def default_metric(outputs: Outputs, labels: np.ndarray | None) -> Metric | None:
    """top1 where there are class labels for the first output, else none."""
    output = next(iter(outputs.values()))
    return METRICS["top1"] if labels is not None and class_axis(output, labels) is not None else None


def metric_of(given: "str | Metric | Callable[..., float]") -> Metric:
    """A metric by name, from `module:function`, or from a function(outputs, labels) -> float.

    A function whose attribute `better` is "lower" counts errors.
    """
    if isinstance(given, Metric):
        return given
    if isinstance(given, str) and ":" in given:
        given = imported(given)
    if isinstance(given, str):
        check_name("metric", given, (*METRICS, "module:function"))
        return METRICS[given]
    return _of_function(given)


def _of_function(function: Callable[..., float]) -> Metric:
    """All outputs and labels, kept for function({output name: array}, labels) -> float."""
    name = getattr(function, "__name__", type(function).__name__).replace("<lambda>", "metric")

    def total(seen: list[tuple[Outputs, np.ndarray]]) -> float:
        outputs = {key: stacked([batch[key] for batch, _ in seen]) for key in seen[0][0]}
        try:
            return float(function(outputs, stacked([labels for _, labels in seen])))
        except Exception as problem:  # the caller's own code failed; the traceback leads there
            raise InputError(f"{name} raised {type(problem).__name__}: {problem}.") from problem

    return Metric(name, lambda outputs, labels: (outputs, labels), total, getattr(function, "better", "higher"))


def _top(count: int) -> Callable[[np.ndarray, np.ndarray], np.ndarray]:
    def rows(output: np.ndarray, labels: np.ndarray) -> np.ndarray:
        axis = class_axis(output, labels)
        if axis is None or labels.dtype.kind not in "iu":
            raise DataError(f"top{count} needs integer labels and an output of classes, not {_shapes(output, labels)}.")
        scores = np.moveaxis(output, axis, -1)
        if scores.shape[:-1] != labels.shape:
            raise DataError(f"top{count}: {_shapes(output, labels)} do not belong together.")
        _known(labels, scores.shape[-1], f"top{count}")
        if count == 1:
            right: np.ndarray = scores.argmax(-1) == labels
        else:
            own = np.take_along_axis(scores, labels.astype(np.int64)[..., None], -1)
            right = (scores > own).sum(-1) < count
        return right.reshape(-1).astype(np.float64)

    return rows


def _bits(output: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """-log2 of the probability of each right token; the classes are on the last axis, labels of -100 do not count."""
    if labels.dtype.kind not in "iu" or labels.shape != output.shape[:-1]:
        raise DataError(f"bits-per-token needs an integer label for each token, not {_shapes(output, labels)}.")
    counted = labels.reshape(-1) != -100
    logits = output.reshape(-1, output.shape[-1])[counted].astype(np.float64)
    tokens = labels.reshape(-1)[counted].astype(np.int64)
    _known(tokens, output.shape[-1], "bits-per-token")
    top = logits.max(1, keepdims=True)
    normalizer = np.log(np.exp(logits - top).sum(1)) + top[:, 0]
    bits: np.ndarray = (normalizer - logits[np.arange(len(tokens)), tokens]) / np.log(2)
    return bits


def _pairs(output: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """(n, 2): one score and one label for each sample; of two classes the score is their difference."""
    flat = output.reshape(len(output), -1)
    if flat.shape[1] > 2 or labels.size != len(output):
        raise DataError(f"one score for each label is needed, not {_shapes(output, labels)}.")
    score = flat[:, 0] if flat.shape[1] == 1 else flat[:, 1] - flat[:, 0]
    return np.stack([score.astype(np.float64), labels.reshape(-1).astype(np.float64)], 1)


def _auc(pairs: np.ndarray) -> float:
    """Area under the ROC curve: the share of (positive, negative) pairs in the right order, ties half."""
    positive = pairs[:, 1] > 0
    if positive.all() or not positive.any():
        raise DataError("auc needs samples of both classes (labels 0 and 1).")
    ranks = _ranks(pairs[:, 0])
    count = int(positive.sum())
    return float((ranks[positive].sum() - count * (count + 1) / 2) / (count * (len(ranks) - count)))


def _spearman(pairs: np.ndarray) -> float:
    return float(np.corrcoef(_ranks(pairs[:, 0]), _ranks(pairs[:, 1]))[0, 1])


def _ranks(values: np.ndarray) -> np.ndarray:
    """1 … n; equal values share their mean rank."""
    _, place, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = counts.cumsum()
    ranks: np.ndarray = (last - (counts - 1) / 2)[place]
    return ranks


def _difference(power: int) -> Callable[[np.ndarray, np.ndarray], np.ndarray]:
    def rows(output: np.ndarray, labels: np.ndarray) -> np.ndarray:
        if output.size != labels.size or labels.dtype == object:
            raise DataError(f"mse and mae need a label for each output number, not {_shapes(output, labels)}.")
        difference = output.astype(np.float64).reshape(len(output), -1) - labels.reshape(len(output), -1)
        result: np.ndarray = (np.abs(difference) ** power).mean(1)
        return result

    return rows


def _known(labels: np.ndarray, classes: int, name: str) -> None:
    if labels.size and (labels.min() < 0 or labels.max() >= classes):
        raise DataError(f"{name}: labels from {labels.min()} to {labels.max()}, but the output has {classes} classes.")


def _shapes(output: np.ndarray, labels: np.ndarray) -> str:
    return f"an output of shape {output.shape} and labels of shape {labels.shape} ({labels.dtype})"


def _of_rows(
    name: str,
    rows: Callable[[np.ndarray, np.ndarray], np.ndarray],
    total: Callable[[np.ndarray], float] = np.mean,
    better: Literal["higher", "lower"] = "higher",
    percent: bool = False,
) -> Metric:
    """A metric of the network's first output: rows of each batch, and a total over all rows."""

    def of_first(outputs: Outputs, labels: np.ndarray) -> np.ndarray:
        return rows(next(iter(outputs.values())), labels)

    return Metric(name, of_first, lambda seen: float(total(np.concatenate(seen))), better, percent)


METRICS: dict[str, Metric] = {
    metric.name: metric
    for metric in (
        _of_rows("top1", _top(1), percent=True),
        _of_rows("top5", _top(5), percent=True),
        _of_rows("auc", _pairs, _auc),
        _of_rows("spearman", _pairs, _spearman),
        _of_rows("mse", _difference(2), better="lower"),
        _of_rows("mae", _difference(1), better="lower"),
        _of_rows("bits-per-token", _bits, better="lower"),
        _of_rows("perplexity", _bits, lambda bits: float(2 ** bits.mean()), "lower"),
    )
}
