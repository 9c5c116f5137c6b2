"""Where samples come from: files, arrays in memory, iterables of batches, `module:function`. One small class for each.

A source yields items (mappings, tuples or lone arrays); `Fitting` makes a network's inputs of them.
"""

import importlib
import importlib.util
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from lowbit.data.archive import StoredArray, stored_arrays
from lowbit.data.fitting import Fitting
from lowbit.data.images import ImageFiles
from lowbit.data.preprocess import Preprocessing
from lowbit.data.samples import as_array, as_labels
from lowbit.errors import DataError, InputError, LowbitError

if TYPE_CHECKING:
    from lowbit.model import Port

SLICE_BYTES = 2**24  # of raw numbers that are read at once


class Source(Protocol):
    """Something that yields items; again and again if it is repeatable.

    count is the number of samples where it is known beforehand
    batch is a sensible number of samples at once; None: items are batches as they are
    skips: items(skip) leaves the first `skip` samples out by itself; otherwise it ignores skip
    """

    @property
    def name(self) -> str: ...
    @property
    def count(self) -> int | None: ...
    @property
    def batch(self) -> int | None: ...
    @property
    def repeatable(self) -> bool: ...
    @property
    def skips(self) -> bool: ...
    def items(self, skip: int = 0) -> Iterator[object]: ...


@dataclass(frozen=True)
class Columns:
    """The network's inputs, and labels, as arrays with a row for each sample, in memory or stored; read in slices."""

    name: str
    arrays: Mapping[str, Any]
    decode: Mapping[str, "Decoding"]
    repeatable: bool = True
    skips: bool = True

    @property
    def count(self) -> int | None:
        return int(next(iter(self.arrays.values())).shape[0])

    @property
    def batch(self) -> int | None:
        bytes_each: int = sum(prod(array.shape[1:]) * array.dtype.itemsize for array in self.arrays.values())
        return min(64, max(1, SLICE_BYTES // max(1, bytes_each)))

    def items(self, skip: int = 0) -> Iterator[object]:
        columns = [_rows(array, self.batch or 1, skip) for array in self.arrays.values()]
        for parts in zip(*columns, strict=True):
            yield {name: self._decoded(name, part) for name, part in zip(self.arrays, parts, strict=True)}

    def _decoded(self, name: str, part: np.ndarray) -> np.ndarray:
        return self.decode[name](part) if name in self.decode else part


@dataclass(frozen=True)
class Decoding:
    """Integers that the file itself gives a meaning: (code - zero_point) * scale, in float32."""

    scale: float
    zero_point: int

    def __call__(self, codes: np.ndarray) -> np.ndarray:
        return (codes.astype(np.float32) - np.float32(self.zero_point)) * np.float32(self.scale)


@dataclass(frozen=True)
class Whole:
    """One item that is given as it is: one sample, or arrays whose samples do not lie along the first axis."""

    name: str
    item: object
    batch: int | None = None
    count: int | None = None
    repeatable: bool = True
    skips: bool = False

    def items(self, skip: int = 0) -> Iterator[object]:
        yield self.item


@dataclass(frozen=True)
class Items:
    """Any iterable of batches or single samples: a list, a DataLoader, a generator, or a function that returns one."""

    name: str
    given: Any
    repeatable: bool
    batch: int | None = None
    count: int | None = None
    skips: bool = False

    def items(self, skip: int = 0) -> Iterator[object]:
        try:
            yield from self._iterable()
        except LowbitError:
            raise
        except Exception as problem:  # the caller's own code failed; the traceback leads there
            raise DataError(f"{self.name} raised {type(problem).__name__}: {problem}.") from problem

    def _iterable(self) -> Iterable[object]:
        given = self.given
        if callable(given) and not isinstance(given, Iterable):
            given = given()
        if not isinstance(given, Iterable) and hasattr(given, "__getitem__") and hasattr(given, "__len__"):
            given = map(given.__getitem__, range(len(given)))
        if not isinstance(given, Iterable):
            raise DataError(f"{self.name} returned {type(given).__name__}; an iterable of batches is needed.")
        if isinstance(given, (Mapping, tuple)) or hasattr(given, "dtype"):
            return [given]
        return iter(given)


@dataclass(frozen=True)
class Pictures:
    """Image files, prepared as stated one by one."""

    name: str
    files: ImageFiles
    preprocess: Preprocessing
    repeatable: bool = True
    skips: bool = True

    @property
    def count(self) -> int | None:
        return len(self.files.names)

    @property
    def batch(self) -> int | None:
        height, width = self.preprocess.size or (224, 224)
        return min(16, max(1, SLICE_BYTES // (height * width * 3 * 4)))

    def items(self, skip: int = 0) -> Iterator[object]:
        for pixels, label in self.files.pixels(skip):
            image = self.preprocess.images(pixels[None])
            yield image if label is None else (image, np.asarray([label]))


def open_path(path: Path, fitting: Fitting) -> Source:
    """A source for a file or a folder."""
    if path.suffix in (".npz", ".npy"):
        return _stored(path, fitting)
    if path.suffix in (".pt", ".pth", ".pkl", ".pickle", ".joblib"):
        raise DataError(f"'{path}' may hold a pickle, which is never read. Save a .npz: numpy.savez(path, name=array).")
    if not path.is_dir() and path.suffix != ".zip":
        raise DataError(f"'{path}' is not a .npz, a .npy, a folder or zip of images, nor module:function.")
    files = ImageFiles.at(path)
    if fitting.preprocess is None:
        raise DataError(
            f"'{path}' holds images; state what the network expects: preprocess 'scale=255 mean=… std=…', or 'scale=1' "
            f"for raw pixels, with size=… where they must be resized."
        )
    return Pictures(f"'{path}'", files, fitting.preprocess)


def from_memory(given: Any, fitting: Fitting) -> Source:
    """A source for arrays, a dict or a tuple of them, an iterable, a dataset or a function."""
    if _is_array(given) or isinstance(given, Mapping) or _is_data_set(given, len(fitting.inputs)):
        inputs, labels = fitting.named(given, "data")
        arrays = {name: as_array(value, f"data '{name}'") for name, value in inputs.items()}
        return _columns("data", arrays, labels, {}, fitting)
    if callable(given) or isinstance(given, Iterable) or (hasattr(given, "__getitem__") and hasattr(given, "__len__")):
        items = list(given) if isinstance(given, tuple) else given
        return Items("data", items, repeatable=not isinstance(given, Iterator))
    raise DataError(f"data is {type(given).__name__}; give arrays, a dict, an iterable of batches, or a path.")


def imported(text: str) -> Callable[[], Any]:
    """The function of `module:function` or `file.py:function`; modules are looked for in the current folder too."""
    module_name, _, function_name = text.rpartition(":")
    module = imported_module(module_name)
    function = getattr(module, function_name, None)
    if not callable(function):
        names = [name for name, value in vars(module).items() if callable(value) and not name.startswith("_")]
        raise InputError(f"'{module_name}' has no function '{function_name}'; it has {', '.join(names[:8]) or 'none'}.")
    return function  # type: ignore[no-any-return]


def imported_module(name: str) -> ModuleType:
    """A module by its name, looked for in the current folder too, or by its file `folder/name.py`."""
    try:
        if not name.endswith(".py"):
            sys.path.insert(0, str(Path.cwd()))
            return importlib.import_module(name)
        file = Path(name)
        if not file.is_file():
            raise InputError(f"there is no file '{file}'.")
        spec = importlib.util.spec_from_file_location(file.stem, file)
        if spec is None or spec.loader is None:
            raise InputError(f"'{file}' is not a Python file.")
        module = importlib.util.module_from_spec(spec)
        sys.modules.setdefault(file.stem, module)
        sys.path.insert(0, str(file.parent.resolve()))
        spec.loader.exec_module(module)
        return module
    except InputError:
        raise
    except Exception as problem:
        raise InputError(f"'{name}' cannot be imported: {type(problem).__name__}: {problem}.") from problem


def _stored(path: Path, fitting: Fitting) -> Source:
    arrays = stored_arrays(path)
    if not arrays:
        raise DataError(f"'{path}' holds no arrays.")
    decode = _decodings(arrays)
    used = {part for name in decode for pair in _scale_names(name, arrays) for part in pair}
    found = arrays[""] if path.suffix == ".npy" else {name: array for name, array in arrays.items() if name not in used}
    inputs, labels = fitting.named(found, f"'{path}'")
    renamed = {name: decode[key] for name, array in inputs.items() if (key := _key(arrays, array)) in decode}
    return _columns(f"'{path}'", inputs, labels, renamed, fitting)


def _columns(
    name: str, inputs: dict[str, Any], labels: Any, decode: Mapping[str, Decoding], fitting: Fitting
) -> Source:
    """Read in rows where every input's first axis counts samples; else all at once, as one item."""
    if all(_has_rows(inputs[port.name], port, axis, fitting.preprocess) for port, axis in fitting.axes()):
        lengths = {key: int(array.shape[0]) for key, array in inputs.items()}
        if labels is not None:
            count = next(iter(lengths.values()))
            labels = labels if isinstance(labels, StoredArray) else as_labels(labels, count, name)
            lengths["labels"] = int(labels.shape[0]) if labels.shape else 1
            inputs = {**inputs, "labels": labels}
        if len(set(lengths.values())) > 1:
            listed = ", ".join(f"'{key}' {length}" for key, length in lengths.items())
            raise DataError(f"{name}: arrays have unequal numbers of samples: {listed}.")
        return Columns(name, inputs, decode)
    read = {key: array.whole() if isinstance(array, StoredArray) else array for key, array in inputs.items()}
    read = {key: decode[key](array) if key in decode else array for key, array in read.items()}
    labels = labels.whole() if isinstance(labels, StoredArray) else labels
    return Whole(name, read if labels is None else (read, labels))


def _decodings(arrays: Mapping[str, StoredArray]) -> dict[str, Decoding]:
    decode = {}
    for name, array in arrays.items():
        for pair in _scale_names(name, arrays):
            if array.dtype.kind in "iu" and all(key in arrays and prod(arrays[key].shape) == 1 for key in pair):
                scale, zero_point = (arrays[key].whole().item() for key in pair)
                decode[name] = Decoding(float(scale), int(zero_point))
    return decode


def _scale_names(name: str, arrays: Mapping[str, StoredArray]) -> list[tuple[str, str]]:
    """`x_scale`, `x_zero_point` belong to `x`; bare `scale`, `zero_point` to the only array of 8 bits with two axes."""
    own = [(f"{name}_scale", f"{name}_zero_point")]
    small = [key for key, array in arrays.items() if array.dtype.itemsize == 1 and len(array.shape) > 1]
    return [*own, ("scale", "zero_point")] if small == [name] else own


def _key(arrays: Mapping[str, StoredArray], wanted: StoredArray) -> str:
    return next(name for name, array in arrays.items() if array is wanted)


def _rows(array: Any, count: int, skip: int) -> Iterator[np.ndarray]:
    if not isinstance(array, StoredArray):
        yield from (array[first : first + count] for first in range(skip, len(array), count))
        return
    passed = 0
    for part in array.rows(count):
        passed += len(part)
        if passed > skip:
            yield part[max(0, len(part) - (passed - skip)) :]


def _has_rows(array: Any, port: "Port", axis: int | None, preprocess: Preprocessing | None) -> bool:
    """Whether the first axis counts samples: the array has the input's rank, or is a stack of images to prepare."""
    if axis != 0 or not hasattr(array, "shape"):
        return False
    if preprocess is not None and preprocess.of_images:
        return len(array.shape) == 4 or (len(array.shape) == 3 and array.shape[-1] not in (1, 3, 4))
    return not port.ranked or len(array.shape) == len(port.shape)


def _is_array(value: Any) -> bool:
    return hasattr(value, "dtype") and hasattr(value, "shape")


def _is_data_set(value: Any, inputs: int) -> bool:
    """Whether a tuple is one data set (inputs, perhaps labels) and no sequence of batches."""
    if not isinstance(value, tuple) or not value:
        return False
    if len(value) == 2 and isinstance(value[0], (Mapping, tuple)):
        return not isinstance(value[1], (Mapping, tuple))
    return len(value) in (inputs, inputs + 1) and all(_is_array(part) for part in value[:inputs])
