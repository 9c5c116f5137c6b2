"""Where samples come from: files, arrays in memory, iterables of batches, `module:function`.

A source yields items (mappings, tuples or lone arrays); `Fitting` makes a network's inputs of them.
"""

import importlib
import importlib.util
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

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


@dataclass(frozen=True)
class Source:
    """Something that yields items; again and again if it is repeatable.

    items   number of samples to leave out at the start → items; a source without `skips` ignores the number
    count   number of samples where it is known beforehand
    batch   a sensible number of samples at once; None: items are batches as they are
    """

    name: str
    items: Callable[[int], Iterable[object]]
    count: int | None = None
    batch: int | None = None
    repeatable: bool = True
    skips: bool = False


def open_source(given: Any, fitting: Fitting) -> tuple[Source, Fitting]:
    """A source for whatever data is given as, and what is left to do to its items."""
    if isinstance(given, (str, Path)):
        return _from_text(given, fitting)
    if _is_array(given) or isinstance(given, Mapping) or _is_data_set(given, len(fitting.inputs)):
        inputs, labels = fitting.named(given, "data")
        arrays = {name: as_array(value, f"data '{name}'") for name, value in inputs.items()}
        return _columns("data", arrays, labels, fitting)
    if callable(given) or isinstance(given, Iterable) or (hasattr(given, "__getitem__") and hasattr(given, "__len__")):
        items = list(given) if isinstance(given, tuple) else given
        return _iterated("data", items, repeatable=not isinstance(given, Iterator)), fitting
    raise DataError(f"data is {type(given).__name__}; give arrays, a dict, an iterable of batches, or a path.")


def _from_text(given: str | Path, fitting: Fitting) -> tuple[Source, Fitting]:
    """A file, a folder, or `module:function`."""
    path, text = Path(given), str(given)
    if not path.exists():
        if ":" in text and not text.endswith(":"):
            return _iterated(f"'{text}'", imported(text)), fitting
        kinds = "a .npz, a .npy, a folder or zip of images, or module:function"
        raise DataError(f"there is no file '{text}'. Data is {kinds}.")
    if path.suffix in (".npz", ".npy"):
        if not (arrays := stored_arrays(path)):
            raise DataError(f"'{path}' holds no arrays.")
        arrays = _with_scales(arrays)
        return _columns(f"'{path}'", *fitting.named(arrays.get("", arrays), f"'{path}'"), fitting)
    if path.suffix in (".pt", ".pth", ".pkl", ".pickle", ".joblib"):
        raise DataError(f"'{path}' may hold a pickle, which is never read. Save a .npz: numpy.savez(path, name=array).")
    if not path.is_dir() and path.suffix != ".zip":
        raise DataError(f"'{path}' is not a .npz, a .npy, a folder or zip of images, nor module:function.")
    return _pictures(ImageFiles.at(path), fitting)


def _pictures(files: ImageFiles, fitting: Fitting) -> tuple[Source, Fitting]:
    """Image files, prepared one by one, before they can be stacked."""
    if (prepare := fitting.preprocess) is None:
        raise DataError(
            f"'{files.place}' holds images; state what the network expects: preprocess 'scale=255 mean=… std=…', or "
            f"'scale=1' for raw pixels, with size=… where they must be resized."
        )

    def items(skip: int) -> Iterator[object]:
        for pixels, label in files.pixels(skip):
            image = prepare.images(pixels[None])
            yield image if label is None else (image, np.asarray([label]))

    batch = min(16, max(1, SLICE_BYTES // (prod(prepare.size or (224, 224)) * 3 * 4)))
    source = Source(f"'{files.place}'", items, len(files.names), batch, skips=True)
    return source, replace(fitting, preprocess=Preprocessing())


def _columns(name: str, inputs: dict[str, Any], labels: Any, fitting: Fitting) -> tuple[Source, Fitting]:
    """Read in rows where every input's first axis counts samples; else all at once, as one item."""
    rest = replace(fitting, renames={})
    if not all(_has_rows(inputs[port.name], port, fitting) for port in fitting.inputs):
        whole = {key: array.whole() if isinstance(array, StoredArray) else array for key, array in inputs.items()}
        labels = labels.whole() if isinstance(labels, StoredArray) else labels
        return Source(name, lambda skip: [whole if labels is None else (whole, labels)]), rest
    columns = dict(inputs)
    if labels is not None:
        count = int(next(iter(inputs.values())).shape[0])
        columns["labels"] = labels if isinstance(labels, StoredArray) else as_labels(labels, count, name)
    lengths = {key: int(array.shape[0]) if array.shape else 1 for key, array in columns.items()}
    if len(set(lengths.values())) > 1:
        listed = ", ".join(f"'{key}' {length}" for key, length in lengths.items())
        raise DataError(f"{name}: arrays have unequal numbers of samples: {listed}.")
    bytes_each = sum(prod(array.shape[1:]) * array.dtype.itemsize for array in columns.values())
    batch = min(64, max(1, SLICE_BYTES // max(1, bytes_each)))

    def items(skip: int) -> Iterator[object]:
        for parts in zip(*(_rows(array, batch, skip) for array in columns.values()), strict=True):
            yield dict(zip(columns, parts, strict=True))

    return Source(name, items, next(iter(lengths.values())), batch, skips=True), rest


def _iterated(name: str, given: Any, repeatable: bool = True) -> Source:
    """Any iterable of batches or single samples: a list, a DataLoader, a generator, or a function that returns one."""

    def items(skip: int) -> Iterator[object]:
        try:
            yield from iterable(name, given)
        except LowbitError:
            raise
        except Exception as problem:  # the caller's own code failed; the traceback leads there
            raise DataError(f"{name} raised {type(problem).__name__}: {problem}.") from problem

    return Source(name, items, repeatable=repeatable)


def iterable(name: str, given: Any) -> Iterable[object]:
    """The items of a list, a DataLoader, a generator, a Dataset, or a function that returns one."""
    if callable(given) and not isinstance(given, Iterable):
        given = given()
    if not isinstance(given, Iterable) and hasattr(given, "__getitem__") and hasattr(given, "__len__"):
        return map(given.__getitem__, range(len(given)))
    if not isinstance(given, Iterable):
        raise DataError(f"{name} returned {type(given).__name__}; an iterable of batches is needed.")
    return [given] if isinstance(given, (Mapping, tuple)) or hasattr(given, "dtype") else given


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


def _with_scales(arrays: dict[str, StoredArray]) -> dict[str, StoredArray]:
    """Arrays of integers with the scale that the file itself gives them, and without the arrays that hold it.

    `x_scale`, `x_zero_point` belong to `x`; bare `scale`, `zero_point` to the only array of 8 bits with two axes.
    """
    small = [key for key, array in arrays.items() if array.dtype.itemsize == 1 and len(array.shape) > 1]
    found = dict(arrays)
    for name, array in arrays.items():
        pairs = [(f"{name}_scale", f"{name}_zero_point"), *([("scale", "zero_point")] if small == [name] else [])]
        for pair in pairs:
            if array.dtype.kind in "iu" and all(key in arrays and prod(arrays[key].shape) == 1 for key in pair):
                scale, zero_point = (arrays[key].whole().item() for key in pair)
                found[name] = replace(array, scale=float(scale), zero_point=int(zero_point))
                found = {key: kept for key, kept in found.items() if key not in pair}
    return found


def _rows(array: Any, count: int, skip: int) -> Iterator[np.ndarray]:
    if not isinstance(array, StoredArray):
        yield from (array[first : first + count] for first in range(skip, len(array), count))
        return
    passed = 0
    for part in array.rows(count):
        passed += len(part)
        if passed > skip:
            yield part[max(0, len(part) - (passed - skip)) :]


def _has_rows(array: Any, port: "Port", fitting: Fitting) -> bool:
    """Whether the first axis counts samples: the array has the input's rank, or is a stack of images to prepare."""
    if fitting.batching.axes[port.name] != 0 or not hasattr(array, "shape"):
        return False
    if fitting.preprocess is not None and fitting.preprocess.of_images:
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
