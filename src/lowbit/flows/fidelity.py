"""How close two networks' values are: signal-to-noise, cosine, largest difference, same answers."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import inf, isfinite, nan

import numpy as np
import onnx_ir as ir

from lowbit.engines.compile import ENGINES
from lowbit.flows.metrics import class_axis
from lowbit.numerics.noise import decibels

GROUP_BYTES = 2**28  # of intermediate values that are held at once


@dataclass(frozen=True)
class Fidelity:
    """How close one output is to the reference's.

    sqnr_db             10 log10(sum reference² / sum difference²); infinite where they are equal
    cosine              mean over samples of the cosine between the two
    largest_difference  in the units of the output
    agreement           share of samples (or tokens, pixels) with the same top class; None where there are no classes
    """

    name: str
    sqnr_db: float
    cosine: float
    largest_difference: float
    agreement: float | None


@dataclass(frozen=True)
class LayerFidelity:
    """Signal-to-noise of one value inside the networks, errors of all layers before it included."""

    value: str
    op: str
    sqnr_db: float


@dataclass
class Closeness:
    """Sums over batches from which a Fidelity is read."""

    signal: float = 0.0
    noise: float = 0.0
    largest: float = 0.0
    cosines: list[np.ndarray] = field(default_factory=list)
    same: int = 0
    answers: int = 0

    def add(self, reference: np.ndarray, candidate: np.ndarray, labels: np.ndarray | None) -> None:
        """Arrays of equal shape, samples along the first axis."""
        a, b = (array.astype(np.float64) for array in (reference, candidate))
        self.add_noise(a, b)
        self.largest = max(self.largest, float(np.abs(a - b).max(initial=0)))
        flat_a, flat_b = (array.reshape(len(array) if array.ndim else 1, -1) for array in (a, b))
        norms = np.linalg.norm(flat_a, axis=1) * np.linalg.norm(flat_b, axis=1)
        # A vector of zeros has no direction: equal to another one, at right angles to all else.
        without: np.ndarray = np.asarray(~flat_a.any(1) & ~flat_b.any(1), np.float64)
        cosines = np.divide((flat_a * flat_b).sum(1), norms, out=without, where=norms > 0)
        self.cosines.append(cosines)
        axis = class_axis(reference, labels)
        if axis is not None:
            same = reference.argmax(axis) == candidate.argmax(axis)
            self.same += int(same.sum())
            self.answers += same.size

    def add_noise(self, reference: np.ndarray, candidate: np.ndarray) -> None:
        """The part that signal-to-noise needs. Infinite numbers are left out where both are the same one."""
        apart = (reference != candidate) | np.isfinite(reference)
        a, b = (array[apart].astype(np.float64) for array in (reference, candidate))
        self.signal += float(np.square(a).sum())
        self.noise += float(np.square(a - b).sum())

    @property
    def sqnr_db(self) -> float:
        return decibels(self.noise, self.signal) if isfinite(self.noise) else -inf

    def fidelity(self, name: str) -> Fidelity:
        """What the sums say."""
        cosine = float(np.concatenate(self.cosines).mean()) if self.cosines else nan
        agreement = self.same / self.answers if self.answers else None
        return Fidelity(name, self.sqnr_db, cosine, self.largest, agreement)


def layer_fidelity(
    reference: ir.Model, candidate: ir.Model, batches: Sequence[Mapping[str, np.ndarray]]
) -> tuple[LayerFidelity, ...]:
    """Signal-to-noise of every float value that both networks have, in the reference's order.

    A value X of the reference is met by `X_dequantized` of the candidate where there is one, else by X.
    Values are computed a group at a time, so that memory stays bounded for large images.
    """
    engine = ENGINES["onnxruntime"]
    found: list[LayerFidelity] = []
    samples = max((len(next(iter(batch.values()))) for batch in batches), default=1)
    for group in _groups(_comparable(reference, candidate), samples):
        names = [str(value.name) for value, _ in group]
        run_reference = engine.compile(reference, outputs=names)
        run_candidate = engine.compile(candidate, outputs=[name for _, name in group])
        sums = [Closeness() for _ in group]
        for batch in batches:
            a, b = run_reference(dict(batch)), run_candidate(dict(batch))
            for closeness, name, (_, counterpart) in zip(sums, names, group, strict=True):
                if a[name].shape == b[counterpart].shape:
                    closeness.add_noise(a[name], b[counterpart])
        for name, closeness, (value, _) in zip(names, sums, group, strict=True):
            node = value.producer()
            found.append(LayerFidelity(name, "" if node is None else node.op_type, closeness.sqnr_db))
    return tuple(found)


def _comparable(reference: ir.Model, candidate: ir.Model) -> list[tuple[ir.Value, str]]:
    """Float values of the reference's main graph, each with the name of its counterpart in the candidate."""
    present = {value.name for node in candidate.graph for value in node.outputs if value.name}
    pairs = []
    for value in (value for node in reference.graph for value in node.outputs):
        names = (name for name in (f"{value.name}_dequantized", value.name) if name in present)
        if value.dtype in (ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.DOUBLE) and (name := next(names, None)):
            pairs.append((value, name))
    return pairs


def _groups(pairs: Sequence[tuple[ir.Value, str]], samples: int) -> list[list[tuple[ir.Value, str]]]:
    """Consecutive pairs whose values take about GROUP_BYTES together; a value of unknown size counts as a tenth."""
    groups: list[list[tuple[ir.Value, str]]] = []
    room = 0.0
    for pair in pairs:
        shape = pair[0].shape
        sides = None if shape is None else [side if isinstance(side, int) else samples for side in shape]
        size = GROUP_BYTES / 10 if sides is None else 2 * 4 * float(np.prod(sides, dtype=np.float64))
        if not groups or size > room:
            groups.append([])
            room = GROUP_BYTES
        groups[-1].append(pair)
        room -= size
    return groups
