"""What a source yields, made into samples of one network: names, types and axes are checked here for every source."""

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from lowbit.data.preprocess import Preprocessing
from lowbit.data.samples import Batching, SampleBatch, as_array, as_labels
from lowbit.errors import DataError, ShapeError, did_you_mean

if TYPE_CHECKING:
    from lowbit.model import Port

LABELS = ("labels", "label")


@dataclass(frozen=True)
class Fitting:
    """Turns what a source yields into batches of one network.

    renames  network input (or `labels`) → name in the data; empty: names must agree, one unnamed array serves one input
    """

    inputs: "tuple[Port, ...]"
    preprocess: Preprocessing | None
    renames: Mapping[str, str]

    @cached_property
    def batching(self) -> Batching:
        """Which axis of each input counts samples."""
        return Batching.of(self.inputs)

    def samples(self, item: object, where: str) -> SampleBatch:
        """One item (a mapping, a tuple of inputs and perhaps labels, or a lone array) checked and brought in shape."""
        named, labels = self.named(item, where)
        arrays, counts, lone = {}, {}, False
        for port in self.inputs:
            axis = self.batching.axes[port.name]
            given = as_array(named[port.name], f"{where}: '{port.name}'")
            array = arrays[port.name] = self._fitted(given, port, axis, where)
            lone |= given.ndim < array.ndim
            if axis is not None:
                counts[port.name] = array.shape[axis]
        if len(set(counts.values())) > 1:
            listed = ", ".join(f"'{name}' {count}" for name, count in counts.items())
            raise ShapeError(f"{where}: inputs have unequal numbers of samples: {listed}.")
        count = next(iter(counts.values()), 1)
        return SampleBatch(
            arrays, None if labels is None else as_labels(labels, count, where, lone and count == 1), count
        )

    def named(self, item: object, where: str) -> tuple[dict[str, Any], Any]:
        """The network's inputs by name, and the labels or None."""
        names = [port.name for port in self.inputs]
        if isinstance(item, Mapping):
            return self._by_name({str(key): value for key, value in item.items()}, where)
        if isinstance(item, (tuple, list)) and not _is_sample(item):
            parts = list(item)
            if len(parts) == 2 and isinstance(parts[0], (Mapping, tuple, list)) and not _is_sample(parts[0]):
                inputs, inner = self.named(parts[0], where)
                return inputs, parts[1] if inner is None else inner
            if len(parts) in (len(names), len(names) + 1):
                return dict(zip(names, parts, strict=False)), (parts[-1] if len(parts) > len(names) else None)
            raise DataError(
                f"{where}: {len(parts)} arrays for {len(names)} inputs ({_listed(names)}). Give the inputs in "
                f"this order, then labels if there are any; or a dict."
            )
        if len(names) != 1:
            raise DataError(f"{where}: one array for {len(names)} inputs ({_listed(names)}). Give a dict of them.")
        return {names[0]: item}, None

    def _by_name(self, found: dict[str, Any], where: str) -> tuple[dict[str, Any], Any]:
        names = [port.name for port in self.inputs]
        if self.renames:
            for wanted, given in self.renames.items():
                if wanted not in (*names, *LABELS):
                    raise DataError(f"names: the network has no input '{wanted}'. {did_you_mean(wanted, names)}")
                if given not in found:
                    raise DataError(f"{where}: there is no array '{given}'. {did_you_mean(given, found)}")
            kept = {name: name for name in (*names, *LABELS) if name in found} | dict(self.renames)
            found = {name: found[given] for name, given in kept.items()}
        labels = next((found[name] for name in LABELS if name in found and name not in names), None)
        rest = {name: value for name, value in found.items() if name in names or name not in LABELS}
        if len(names) == 1 and len(rest) == 1:
            return {names[0]: next(iter(rest.values()))}, labels
        missing = [name for name in names if name not in rest]
        extra = [name for name in rest if name not in names]
        if missing:
            hint = f" The data has {_listed(list(found))}." + _rename_hint(missing[0], extra)
            raise DataError(f"{where}: no array for the network's input '{missing[0]}'.{hint}")
        if extra:
            stated = ",".join(f"{name}={name}" for name in names)
            raise DataError(
                f"{where}: the network takes no '{extra[0]}' (it takes {_listed(names)}); state names={stated}."
            )
        return rest, labels

    def _fitted(self, array: np.ndarray, port: "Port", axis: int | None, where: str) -> np.ndarray:
        what = f"{where}: '{port.name}'"
        given = array
        if self.preprocess is not None:
            if len(self.inputs) > 1:
                raise DataError("preprocess is for networks of one input; prepare several inputs in module:function.")
            array = _prepared(array, self.preprocess)
        array = _cast(array, port, what, stated=self.preprocess is not None)
        if not array.flags.writeable:  # torch.from_numpy warns of arrays over borrowed memory
            array = array.copy()
        rank = len(port.shape)
        if not port.ranked:
            return array
        if axis is not None and array.ndim == rank - 1:
            array = np.expand_dims(array, axis)
        if array.ndim != rank or any(
            isinstance(side, int) and side != have and position != axis
            for position, (side, have) in enumerate(zip(port.shape, array.shape, strict=False))
        ):
            raise ShapeError(
                f"{what} has shape {given.shape}, the network takes {_shape_text(port)}{_shape_hint(given, port)}"
            )
        return array


def _prepared(array: np.ndarray, preprocess: Preprocessing) -> np.ndarray:
    """Values or images of an array prepared as stated; a single image gets a batch axis."""
    if not preprocess.of_images:
        return preprocess.values(array)
    if array.ndim == 2 or (array.ndim == 3 and array.shape[-1] in (1, 3, 4) and array.shape[-2] > 4):
        array = array[None]
    if array.ndim == 3:
        array = array[..., None]
    if array.ndim == 4 and array.shape[-1] not in (1, 3, 4) and array.shape[1] in (1, 3, 4):
        array = array.transpose(0, 2, 3, 1)
    if array.ndim != 4:
        raise ShapeError(f"preprocess '{preprocess}' speaks of images, but the data has shape {array.shape}.")
    return preprocess.images(array[..., :3] if array.shape[-1] == 4 else array)


def _shape_text(port: "Port") -> str:
    """The shape of an input as one writes it: (batch, 3, 32, 32)."""
    sides = ["?" if side is None else str(side) for side in port.shape]
    return f"({', '.join(sides)}{',' if len(sides) == 1 else ''})"


def _cast(array: np.ndarray, port: "Port", what: str, *, stated: bool) -> np.ndarray:
    """To the input's type, where no number changes but by the rounding of floats; else an error with advice."""
    have, want = array.dtype, port.dtype
    if have == want or want.kind == "O":  # a network not loaded yet takes what comes
        return array
    if _is_float(want) and (_is_float(have) or stated):
        return array.astype(want)
    if want.kind in "iu" and have.kind in "iub":
        cast = array.astype(want)
        if not np.array_equal(cast, array):
            raise DataError(f"{what}: values from {array.min()} to {array.max()} do not fit in the network's {want}.")
        return cast
    if want.kind == "b" and have.kind in "iu" and np.isin(array, (0, 1)).all():
        return array.astype(want)
    if _is_float(want):
        advice = (
            "If these are pixels, state how they are scaled: preprocess 'scale=255 mean=… std=… layout=NCHW'; "
            "if the numbers are meant as they are: preprocess 'scale=1'."
        )
        raise DataError(f"{what} is {have}, the network takes {want}. {advice}")
    raise DataError(f"{what} is {have}, the network takes {want}. Convert it: array.astype('{want}').")


def _is_float(dtype: np.dtype) -> bool:
    return dtype.kind == "f" or dtype.name == "bfloat16"


def _shape_hint(array: np.ndarray, port: "Port") -> str:
    rank, channels = len(port.shape), (1, 3, 4)
    if rank == 4 and array.ndim in (3, 4) and array.shape[-1] in channels and port.shape[1] in channels:
        return ". The data looks like NHWC: state preprocess 'layout=NCHW …'."
    if rank == 4 and array.ndim == 3 and port.shape[1] == 1:
        return ". Gray images without a channel axis: state preprocess 'layout=NCHW …'."
    if rank == 4 and all(isinstance(side, int) for side in port.shape[2:]) and array.ndim == 4:
        return f". To resize images: preprocess 'size={port.shape[2]}x{port.shape[3]} …'."
    if rank == 2 and array.ndim > 2:
        return ". To flatten images: preprocess 'layout=flat …'."
    return "."


def _rename_hint(missing: str, extra: Sequence[str]) -> str:
    near = difflib.get_close_matches(missing, extra, 1, 0.5) or list(extra[:1])
    return f" State names={missing}={near[0]} if that is it." if near else ""


def _listed(names: Sequence[str]) -> str:
    return ", ".join(f"'{name}'" for name in names[:8]) + (" …" if len(names) > 8 else "")


def _is_sample(value: Any) -> bool:
    """Whether a list or tuple is nested plain numbers, that is, one array written out."""
    return bool(value) and all(isinstance(entry, (int, float)) and not isinstance(entry, bool) for entry in value)
