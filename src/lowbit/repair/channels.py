"""Steps that move a scale from channel to weight: what they need to know of an activation, read from a few samples."""

from collections.abc import Callable, Iterable, Mapping
from types import MappingProxyType
from typing import Any

import numpy as np
import onnx_ir as ir

from lowbit.engines.compile import ENGINES
from lowbit.graph import Changed
from lowbit.graph.equalize import equalizable, equalize_channels
from lowbit.graph.smooth import smooth, smoothable
from lowbit.network.calibrate import Batch

Maxima = Mapping[str, np.ndarray[Any, Any]]
# Name in a recipe → which activations (→ axis of their channels), and the pass that takes their maxima.
BY_CHANNEL: Mapping[str, tuple[Callable[[ir.Model], Mapping[str, int]], Callable[[ir.Model, Maxima], Changed]]]
BY_CHANNEL = MappingProxyType({"smooth": (smoothable, smooth), "equalize_channels": (equalizable, equalize_channels)})


def scale_channels(program: ir.Model, step: str, batches: Iterable[Batch]) -> list[str]:
    """Run a step of BY_CHANNEL on the program; what was done, in words."""
    wanted, edit = BY_CHANNEL[step]
    axes = wanted(program)
    return list(edit(program, channel_maxima(program, axes, batches)).done) if axes else []


def channel_maxima(program: ir.Model, axes: Mapping[str, int], batches: Iterable[Batch]) -> Maxima:
    """Largest absolute value of each channel, (channels,), of the float activations `axes` names → channel axis."""
    maxima: dict[str, np.ndarray[Any, Any]] = {}
    run = ENGINES["onnxruntime"].compile(program, outputs=list(axes))
    for batch in batches:
        found = run(dict(batch))
        for name, axis in axes.items():
            if found[name].ndim and found[name].dtype.kind == "f":
                channels = np.moveaxis(np.abs(found[name]), axis, 0)
                seen = channels.reshape(len(channels), -1).max(axis=1, initial=0)
                maxima[name] = np.maximum(maxima.get(name, seen), seen)
    return maxima
