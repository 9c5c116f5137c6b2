"""Inputs made up by shape and type, to run a network where there are no samples: for a proof, not for calibration."""

from typing import TYPE_CHECKING

import numpy as np

from lowbit.errors import DataError, LowbitError

if TYPE_CHECKING:
    from lowbit.model import Model, Port

SIDES = (16, 64, 224, 1)
"""Lengths tried for axes that may have any: long enough for pooling, short enough for a text model's positions."""


def made_up_batch(model: "Model") -> dict[str, np.ndarray]:
    """One sample or two that the network runs on: normal numbers, token ids 0 and 1, True.

    DataError with the network's own words where it runs on none of them.
    """
    problem = ""
    for side in SIDES:
        rng = np.random.default_rng(0)
        batch = {port.name: _array(port, side, rng) for port in model.inputs}
        try:
            model.run(batch)
        except LowbitError as error:
            problem = problem or str(error)
            continue
        return batch
    raise DataError(f"'{model.source}' does not run on made-up inputs ({problem}); give a few samples as data.")


def _array(port: "Port", side: int, rng: np.random.Generator) -> np.ndarray:
    lengths = [
        length if isinstance(length, int) else 2 if axis == 0 else side for axis, length in enumerate(port.shape)
    ]
    if port.dtype.kind == "f":
        return rng.normal(size=lengths).astype(port.dtype)
    if port.dtype.kind in "iu":
        return rng.integers(0, 2, lengths).astype(port.dtype)
    if port.dtype.kind == "b":
        return np.ones(lengths, bool)
    raise DataError(f"input {port} cannot be made up; give a few samples as data.")
