"""What the inputs of a network look like, in the calibration data and in the test data: prepared alike or not."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from lowbit.engines.compile import Batch
from lowbit.flows.causes import Finding, Remedy
from lowbit.model import Port

MOVED, WIDENED = 0.5, 1.5  # of the calibration's standard deviation: means apart; ratio of the two deviations


@dataclass(frozen=True)
class InputFacts:
    """A float input over some samples; pixel_axes are those of rows and columns, of an image."""

    mean: float
    std: float
    minimum: float
    maximum: float
    pixel_axes: tuple[int, ...]

    def __str__(self) -> str:
        return f"{self.mean:.3g} ± {self.std:.3g} ({self.minimum:.3g} … {self.maximum:.3g})"


def input_facts(batches: Iterable[Batch], ports: Sequence[Port]) -> dict[str, InputFacts]:
    """By name; inputs of integers are left out."""
    seen: dict[str, list[np.ndarray]] = {}
    for batch in batches:
        for port in ports:
            array = batch[port.name]
            if array.dtype.kind == "f" and array.size:
                sums = (array.size, array.sum(dtype=np.float64), np.square(array, dtype=np.float64).sum())
                seen.setdefault(port.name, []).append(np.array([*sums, array.min(), array.max()], np.float64))
    found = {}
    for port in ports:
        if port.name in seen:
            count, total, squares, *_ = np.sum(seen[port.name], axis=0)
            low, high = np.min(seen[port.name], axis=0)[3], np.max(seen[port.name], axis=0)[4]
            std = np.sqrt(max(0.0, squares / count - (total / count) ** 2))
            found[port.name] = InputFacts(total / count, float(std), low, high, _pixel_axes(port))
    return found


def _pixel_axes(port: Port) -> tuple[int, ...]:
    """Rows and columns: of (N, channels, rows, columns), or of (N, rows, columns, channels)."""
    if len(port.shape) != 4:
        return ()
    return (1, 2) if port.shape[3] in (1, 3, 4) and port.shape[1] not in (1, 3, 4) else (2, 3)


def prepared_unlike(calibration: Mapping[str, InputFacts], test: Mapping[str, InputFacts]) -> list[Finding]:
    """Inputs whose mean or spread in the test data is not that of the calibration data."""
    found = []
    for name, known in calibration.items():
        given = test.get(name)
        if given is None:
            continue
        apart, wider = abs(given.mean - known.mean) / max(known.std, 1e-30), given.std / max(known.std, 1e-30)
        if apart > MOVED or not 1 / WIDENED < wider < WIDENED:
            told = f"input '{name}' is {given} in the test data, {known} in the calibration data"
            found.append(
                Finding(
                    "preprocessing", (name,), told, (Remedy("Prepare both alike: the same --preprocess for both."),)
                )
            )
    return found
