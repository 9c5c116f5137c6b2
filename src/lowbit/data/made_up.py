"""Inputs made up by shape and type, to run a network where there are no samples: no range is calibrated on them."""

from typing import TYPE_CHECKING

import numpy as np
import onnx_ir as ir

from lowbit.errors import DataError, LowbitError

if TYPE_CHECKING:
    from lowbit.model import Model, Port

SIDES = (64, 16, 224, 1)
"""Lengths tried for axes that may have any: long enough for pooling, short enough for a text model's positions."""


def made_up_batch(model: "Model") -> dict[str, np.ndarray]:
    """One sample or two that the network runs on: normal numbers, True, rows of the tables that it looks up, else 0, 1.

    DataError with the network's own words where it runs on none of them.
    """
    problem, values = "", {str(value.name): value for value in model.program.graph.inputs}
    names = dict.fromkeys(d for port in model.inputs for d in port.shape[1:] if isinstance(d, str))
    several = {str(port.shape[0]) for port in model.inputs if port.shape}  # names of batches, on any axis
    lengths: list[tuple[int, str]] = [(side, "") for side in SIDES]
    for side, twice in lengths + [(SIDES[0], name) for name in names]:  # a mask spans a cache and what is new
        rng = np.random.default_rng(0)
        batch = {port.name: _array(port, side, twice, several, rng, _rows(values[port.name])) for port in model.inputs}
        try:
            model.run(batch)
        except LowbitError as error:
            problem = problem or str(error)
            continue
        return batch
    raise DataError(f"'{model.source}' does not run on made-up inputs ({problem}); give a few samples as data.")


def _rows(ids: ir.Value) -> int:
    """Rows of the smallest constant table that these numbers choose from; 2 where they choose from none."""
    found = []
    for node, index in ids.uses():
        table = node.inputs[0].const_value if index == 1 and node.inputs[0] is not None else None
        if node.op_type == "Gather" and table is not None and node.attributes.get_int("axis", 0) == 0:
            found.append(len(table.numpy()))
        elif node.op_type in ("Cast", "Reshape", "Squeeze", "Unsqueeze", "Transpose", "Identity", "Flatten"):
            found += [rows for rows in [_rows(node.outputs[0])] if rows > 2]
    return max(1, min(found, default=2))


def _array(port: "Port", side: int, twice: str, several: set[str], rng: np.random.Generator, rows: int) -> np.ndarray:
    lengths = [
        length if isinstance(length, int) else 2 if axis == 0 or length in several else _length(length, side, twice)
        for axis, length in enumerate(port.shape)
    ]
    if port.dtype.kind == "f":
        return rng.normal(size=lengths).astype(port.dtype)
    if port.dtype.kind in "iu":
        return rng.integers(0, rows, lengths).astype(port.dtype)
    if port.dtype.kind == "b":
        return np.ones(lengths, bool)
    raise DataError(f"input {port} cannot be made up; give a few samples as data.")


def _length(name: str | None, side: int, twice: str) -> int:
    """The length of an axis: `side`, twice that of one name, and the sum of the parts of "past + new"."""
    parts = [part.strip() for part in (name or "").split("+")]
    return 2 * side if twice and name == twice else sum(int(p) if p.isdigit() else side for p in parts)
