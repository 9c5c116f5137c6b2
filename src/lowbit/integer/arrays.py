"""The integer program as arrays by name, for whoever writes a kernel of their own."""

from dataclasses import fields
from typing import Any

import numpy as np

from lowbit.integer.program import Program
from lowbit.integer.tensors import Rescale, Tensor


def arrays_of(program: Program) -> dict[str, np.ndarray]:
    """'layer/field' → array: codes, biases, multipliers, shifts, tables; of tensors scale, zero, shape and order.

    A layer's inputs and output are strings, the names of tensors. 'layers' lists them in the order in which they run,
    each as 'name kind'; 'rounding' is the rule.
    """
    layers = [f"{layer.name} {type(layer).__name__}" for layer in program.layers]
    arrays: dict[str, Any] = {"layers": layers, "rounding": program.rounding}
    arrays |= {"inputs": [t.name for t in program.inputs], "outputs": [t.name for t in program.outputs]}
    for tensor in program.tensors():
        for key in ("scale", "zero", "shape", "order", "bits"):
            arrays[f"tensors/{tensor.name}/{key}"] = getattr(tensor, key)
    for layer in program.layers:
        for field in fields(layer):
            arrays |= _named(f"{layer.name}/{field.name}", getattr(layer, field.name))
    return {name: np.asarray(array) for name, array in arrays.items()}


def _named(name: str, value: Any) -> dict[str, Any]:
    if isinstance(value, Tensor):
        return {name: value.name}
    if isinstance(value, Rescale):
        return {f"{name}/multiplier": value.multiplier, f"{name}/shift": value.shift, f"{name}/left": value.left}
    if isinstance(value, tuple) and value and not isinstance(value[0], int):
        return {part: inner for i, item in enumerate(value) for part, inner in _parts(f"{name}/{i}", item).items()}
    return {} if value is None else {name: value}


def _parts(name: str, item: Any) -> dict[str, Any]:
    if isinstance(item, Tensor):
        return {name: item.name}
    return {f"{name}/{field.name}": getattr(item, field.name) for field in fields(item)}
