"""What a flow is given, as it needs it: a loaded Model, and Data of its inputs.

A model is a Model, whatever `load` takes, or a torch module; its example inputs are then the first samples of the data.
"""

import inspect
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from lowbit.data import Data, Preprocessing
from lowbit.data.archive import stored_arrays
from lowbit.data.fitting import LABELS
from lowbit.data.made_up import made_up_batch
from lowbit.data.samples import Batching, as_array
from lowbit.data.sources import imported, iterable
from lowbit.engines.compile import Batch
from lowbit.errors import DataError, InputError, UnsupportedError
from lowbit.graph.quantized import how_quantized
from lowbit.model import Model, Port, load
from lowbit.recipe import Recipe

if TYPE_CHECKING:
    from torch import Tensor

EXAMPLE_SAMPLES = 2  # torch.export takes an axis of size 1 for a constant


def model_and_data(
    model: Any,
    data: Any,
    *,
    preprocess: str | Mapping[str, Any] | Preprocessing | None = None,
    names: Mapping[str, str] | None = None,
    allow_nonfinite: bool = False,
) -> tuple[Model, Data]:
    """Both, ready to use; the first samples of a generator are looked at, not lost."""
    if is_module(model):
        example, data = example_of(model, data, preprocess, names)
        model = load(model, example, allow_nonfinite=allow_nonfinite)
    elif not isinstance(model, Model):
        model = load(model, allow_nonfinite=allow_nonfinite)
    return model, Data.of(data, model.inputs, preprocess=preprocess, names=names)


def float_model_and_data(model: Any, data: Any, recipe: Recipe) -> tuple[Model, Data]:
    """As `model_and_data`, for a network to be quantized by a recipe: data may be None where only weights are.

    Its file is then proved on inputs made up by shape and type. InputError where the network is quantized already.
    """
    if data is None:
        if why := recipe.looks_at_data():
            raise DataError(f"{why}: give some hundred typical inputs. Recipes of weights alone need none.")
        if is_module(model):
            raise InputError("a torch module needs example inputs to be read: lowbit.load(module, example_inputs).")
        model = model if isinstance(model, Model) else load(model)
        refuse_quantized(model)
        return model, replace(Data.of([made_up_batch(model)], model.inputs), made_up=True)
    model, found = model_and_data(model, data)
    refuse_quantized(model)
    return model, found


def refuse_quantized(model: Model) -> None:
    """InputError with what to do, where a network has integers in it already."""
    if how := how_quantized(model.program):
        raise InputError(
            f"'{model.source}' is quantized already ({how}). Start from the float network that it was made of; "
            "as it is, `lowbit compare` judges it, `lowbit show` lists it, `lowbit pack` makes it smaller."
        )


def samples_lead(model: Model, takes: str, instead: str) -> None:
    """UnsupportedError where training could not shuffle samples along the first axis of every input."""
    for name, axis in Batching.of(model.inputs).axes.items():
        if axis != 0:
            where = "no axis of samples" if axis is None else f"its samples along axis {axis}"
            raise UnsupportedError(
                f"input '{name}' has {where}; {takes} networks whose inputs all have them along axis 0. {instead}"
            )


def by_name(model: Model, inputs: "Iterable[Tensor]") -> Batch:
    """Tensors in the order of a model's inputs, as arrays by their names."""
    return {port.name: x.numpy() for port, x in zip(model.inputs, inputs, strict=True)}


def is_module(model: object) -> bool:
    """Whether it is a torch module."""
    import torch

    return isinstance(model, torch.nn.Module)


def example_of(
    module: Any, data: Any, preprocess: Any = None, names: Mapping[str, str] | None = None
) -> tuple[dict[str, Any] | tuple[Any, ...], Any]:
    """Example inputs of a module out of the first samples of its data, and the data, whole."""
    peeked, data = _peeked(data)
    return _example(module, peeked, data, preprocess, names), data


def _peeked(data: Any) -> tuple[Any, Any]:
    """The first item of the data, or the data where it is no sequence of items; and the data, whole."""
    if isinstance(data, (str, Path)) and not Path(data).exists() and ":" in str(data):
        data = imported(str(data))
    if isinstance(data, (str, Path, Mapping, tuple, Data)) or hasattr(data, "dtype"):
        return data, data
    if not (callable(data) or isinstance(data, Iterable) or hasattr(data, "__getitem__")):
        return data, data
    items = iterable("data", data)
    if items is not data or not isinstance(items, Iterator):
        return next(iter(items), None), data
    first = list(itertools.islice(items, 1))
    return next(iter(first), None), itertools.chain(first, items)


def _example(
    module: Any, peeked: Any, data: Any, preprocess: Any, names: Mapping[str, str] | None
) -> dict[str, Any] | tuple[Any, ...]:
    """Arguments of `forward` out of the first samples: by name, or in order where it takes any number."""
    import torch

    if isinstance(data, Data):
        inputs = next(data.take(EXAMPLE_SAMPLES).samples(EXAMPLE_SAMPLES)).inputs
    else:
        wanted = _arguments(module.forward, set(_names(peeked)) | set(names or ()))
        ports = [Port(name, np.dtype(object), ("batch",), ranked=False) for name in wanted]
        one = peeked if peeked is data else [_batched(peeked)]
        if peeked is None:
            raise DataError("the data is empty: not one sample came out of it.")
        samples = Data.of(one, ports, preprocess=preprocess, names=names, limit=EXAMPLE_SAMPLES)
        inputs = next(samples.samples(EXAMPLE_SAMPLES)).inputs
    first = next((p for p in module.parameters() if p.is_floating_point()), torch.zeros(()))

    def tensor(array: np.ndarray) -> Any:
        found = torch.from_numpy(np.ascontiguousarray(array))
        return found.to(first.device, first.dtype if found.is_floating_point() else None)

    given = {name: tensor(array) for name, array in inputs.items()}
    return given if set(given) <= set(inspect.signature(module.forward).parameters) else tuple(given.values())


def _arguments(forward: Callable[..., Any], named: set[str]) -> list[str]:
    """Arguments that the data has to fill: those without a default, and others that it names."""
    parameters = inspect.signature(forward).parameters.values()
    plain = [p for p in parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    found = [p.name for p in plain if p.default is p.empty or p.name in named]
    if not found:  # forward(*args), or all have defaults: what the data names, else its first argument
        found = [name for name in sorted(named) if name not in LABELS] or [next((p.name for p in plain), "input")]
    return found


def _names(item: Any) -> Iterable[str]:
    """Names of arrays, where the data has names."""
    if isinstance(item, (str, Path)) and Path(item).suffix == ".npz":
        return stored_arrays(Path(item))
    if isinstance(item, tuple) and item and isinstance(item[0], Mapping):
        item = item[0]
    return map(str, item) if isinstance(item, Mapping) else ()


def _batched(item: Any) -> Any:
    """An item of a torch Dataset is one sample, which its label shows: a number, no array of them."""
    if isinstance(item, (tuple, list)) and len(item) == 2 and hasattr(item[0], "shape") and not np.shape(item[1]):
        return as_array(item[0], "the first sample")[None], np.asarray([item[1]])
    return item
