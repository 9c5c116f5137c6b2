"""Off the distribution: inputs that are noisy, blurred, brighter, of less contrast, shorter or longer than usual.

A shift changes the samples, not the networks; the float and the quantized network then run on the same shifted samples.
Kinds of Hendrycks & Dietterich 2019 (arXiv 1903.12261), in units of the inputs themselves, since a network's inputs
may have any scale. Shifted values stay within the extremes of the clean ones, as pixels do.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from lowbit.data import Data
from lowbit.data.samples import BATCH_NAMES, SampleBatch
from lowbit.errors import InputError, check_name
from lowbit.flows.inputs import InputFacts
from lowbit.model import Port

Array = np.ndarray


def _noise(x: Array, strength: float, facts: InputFacts) -> Array:
    random = np.random.default_rng(0).standard_normal(x.shape, np.float32)
    return np.asarray(x + np.float32(strength * facts.std) * random)


def _brightness(x: Array, strength: float, facts: InputFacts) -> Array:
    return np.asarray(x + np.float32(strength * facts.std))


def _contrast(x: Array, strength: float, facts: InputFacts) -> Array:
    mean = x.mean(axis=tuple(range(1, x.ndim)), keepdims=True)
    return np.asarray(mean + np.float32(strength) * (x - mean))


def _blur(x: Array, strength: float, facts: InputFacts) -> Array:
    """A Gaussian over rows and columns, to 3 standard deviations; edges are repeated."""
    reach = max(1, round(3 * strength))
    weights = np.exp(-0.5 * (np.arange(-reach, reach + 1) / max(strength, 1e-6)) ** 2).astype(np.float32)
    for axis in facts.pixel_axes:
        padded = np.pad(x, [(reach, reach) if a == axis else (0, 0) for a in range(x.ndim)], mode="edge")
        parts = (w * np.take(padded, np.arange(i, i + x.shape[axis]), axis) for i, w in enumerate(weights))
        x = np.asarray(sum(parts) / weights.sum())
    return x


# Name → (what it does, its strength in words, needs pixels)
VALUES: Mapping[str, tuple[Callable[[Array, float, InputFacts], Array], str]] = {
    "noise": (_noise, "Gaussian noise, in standard deviations of the inputs"),
    "blur": (_blur, "Gaussian blur, in pixels"),
    "brightness": (_brightness, "a constant added, in standard deviations of the inputs"),
    "contrast": (_contrast, "distances from a sample's mean, times this"),
}
LENGTH = "length"
KINDS = (*VALUES, LENGTH)
OF_IMAGES = ("noise:0.5", "blur:1", "brightness:0.5", "brightness:-0.5", "contrast:0.5")
OF_NUMBERS = ("noise:0.25", "noise:0.5")
OF_SEQUENCES = ("length:0.5", "length:2")


@dataclass(frozen=True)
class Shift:
    """A kind and its strength; `length:0.5` keeps the first half of every sequence, `length:2` repeats it once."""

    kind: str
    strength: float

    @classmethod
    def parse(cls, words: str) -> "Shift":
        """noise:0.5; InputError lists the kinds."""
        kind, colon, strength = words.partition(":")
        check_name("shift", kind, KINDS)
        try:
            value = float(strength)
        except ValueError:
            value = np.nan
        positive = kind == "brightness" or value > 0
        if not colon or not np.isfinite(value) or not positive:
            raise InputError(f"shift '{words}': say how strong it is, as '{kind}:0.5'.")
        return cls(kind, value)

    def __str__(self) -> str:
        return f"{self.kind}:{self.strength:g}"

    def of(self, samples: SampleBatch, ports: Sequence[Port], facts: Mapping[str, InputFacts]) -> SampleBatch:
        """These samples, shifted. Labels of each token lose their meaning with another length: they are left out."""
        inputs, labels = dict(samples.inputs), samples.labels
        if self.kind == LENGTH:
            for port in ports:
                for axis in sequence_axes(port):
                    size = inputs[port.name].shape[axis]
                    kept = np.arange(max(1, round(size * self.strength))) % size
                    inputs[port.name] = np.take(inputs[port.name], kept, axis)
            labels = None if labels is not None and labels.ndim > 1 else labels
            return SampleBatch(inputs, labels, samples.count)
        change, _ = VALUES[self.kind]
        for name, known in facts.items():
            if self.kind != "blur" or known.pixel_axes:
                shifted = change(inputs[name], self.strength, known)
                inputs[name] = shifted.clip(known.minimum, known.maximum).astype(inputs[name].dtype)
        return SampleBatch(inputs, labels, samples.count)


def sequence_axes(port: Port) -> list[int]:
    """Axes of any length but that of the samples, of inputs that are no images."""
    if len(port.shape) > 3:
        return []
    return [a for a, side in enumerate(port.shape) if a and not isinstance(side, int) and side not in BATCH_NAMES]


def usual_shifts(ports: Sequence[Port], facts: Mapping[str, InputFacts]) -> list[Shift]:
    """What to try where nothing is asked for."""
    words = OF_IMAGES if any(known.pixel_axes for known in facts.values()) else OF_NUMBERS if facts else ()
    lengths = OF_SEQUENCES if any(map(sequence_axes, ports)) else ()
    return [Shift.parse(w) for w in (*words, *lengths)]


def shifted(data: Data, shift: Shift, ports: Sequence[Port], facts: Mapping[str, InputFacts]) -> Data:
    """These samples, shifted."""

    def samples() -> Iterator[object]:
        for batch in data.samples():
            changed = shift.of(batch, ports, facts)
            yield changed.inputs if changed.labels is None else (changed.inputs, changed.labels)

    return Data.of(samples, ports)
