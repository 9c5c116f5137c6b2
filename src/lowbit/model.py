"""A network that can be run, saved and quantized: the ONNX program and its session."""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import onnx_ir as ir

from lowbit.engines.compile import ENGINES, LARGEST_MESSAGE_BYTES, Batch, Run, serialize, weight_bytes
from lowbit.errors import DataError, InputError, ModelError, ShapeError
from lowbit.graph import load as reading
from lowbit.graph.fix_inputs import fix_inputs

if TYPE_CHECKING:
    import torch

    from lowbit.graph.torch_export import Axes


@dataclass(frozen=True)
class Port:
    """An input or output: its name, element type and shape (a string for a symbolic dimension, None for unknown)."""

    name: str
    dtype: np.dtype[Any]
    shape: tuple[int | str | None, ...]
    ranked: bool = True  # False: the file does not even say how many dimensions there are, and shape is ()

    def __str__(self) -> str:
        return f"'{self.name}' {self.dtype}[{', '.join('?' if d is None else str(d) for d in self.shape)}]"


class Model:
    """A network as an ONNX program, ready to run.

    program    the `onnx_ir.Model`; opset ≥ 21, constants folded, unique names
    source     where it came from, for messages
    metadata   what travels in the file: recipe and ledger among it
    converted  the types that the source computed in, where load made float32 of it
    After changing the program, call `changed()`: the session is built again at the next run.
    """

    def __init__(self, program: ir.Model, source: str = "model", converted: tuple[str, ...] = ()) -> None:
        self.program = program
        self.source = source
        self.converted = converted
        self._run: Run | None = None

    def __repr__(self) -> str:
        return f"Model({self.source!r}, inputs=[{_list(self.inputs)}], outputs=[{_list(self.outputs)}])"

    @property
    def inputs(self) -> tuple[Port, ...]:
        return tuple(map(_port, self.program.graph.inputs))

    @property
    def outputs(self) -> tuple[Port, ...]:
        return tuple(map(_port, self.program.graph.outputs))

    @property
    def metadata(self) -> MutableMapping[str, str]:
        return self.program.metadata_props

    def run(self, batch: Batch) -> Batch:
        """Outputs by name for one batch, computed by onnxruntime on the CPU.

        DataError or ShapeError names the input that is missing, unknown, or of another type or shape than declared, and
        inputs of different lengths on axes of one name, where the network does not run on them.
        """
        checked = check_batch(batch, self.inputs)
        if self._run is None:
            self._run = ENGINES["onnxruntime"].compile(self.program)
        try:
            return self._run(checked)
        except ModelError as error:
            if differ := _different_lengths(checked, self.inputs):
                raise ShapeError(f"{differ} {error}") from None
            raise

    def changed(self) -> None:
        """Forget the compiled session: the program was edited."""
        self._run = None

    def save(self, path: str | os.PathLike[str]) -> int:
        """Write the ONNX file and return its bytes on disk; over 2 GB the weights go to `<path>.data` beside it.

        Written aside and renamed: on any error, and on Ctrl-C, the old file is intact. InputError where the path is
        the file that this model's weights are still read from.
        """
        from lowbit.storage.atomic import refuse_overwriting_input, write_bytes  # storage's own modules import Model

        path = Path(path)
        refuse_overwriting_input(path, *_files_read(self.program))
        if weight_bytes(self.program) <= LARGEST_MESSAGE_BYTES:
            return write_bytes(path, serialize(self.program))
        return _save_large(self.program, path)

    def copy(self) -> Model:
        """An independent copy; weights are shared until replaced, since tensors are never edited in place."""
        return Model(self.program.clone(), self.source, self.converted)


def load(
    source: str | os.PathLike[str] | bytes | onnx.ModelProto | ir.Model | torch.nn.Module,
    example_inputs: Any = None,
    *,
    dynamic_axes: Axes | None = None,
    dynamic_shapes: Any = None,
    fixed: Mapping[str, Any] | None = None,
    allow_nonfinite: bool = False,
) -> Model:
    """Read a network: an ONNX file, its bytes, a .lowbit container, an ONNX message, `onnx_ir.Model` or torch module.

    example_inputs    for a PyTorch module: a tensor, a tuple of them, or a dict of keyword arguments
    dynamic_axes      for a PyTorch module: {input: {axis: name}}; by default the batch axis is dynamic
    dynamic_shapes    for a PyTorch module: torch.export's own form, instead of dynamic_axes
    fixed             inputs and symbolic dimensions that are always the same: {"sr": 16000, "sequence": 576}. They
                      become constants, and each `If` that they decide becomes the branch that is taken
    allow_nonfinite   accept weights that hold NaN or infinity

    InputError where the source is not a usable model, ModelError where a module cannot be exported.
    """
    if isinstance(source, Model):
        return source.copy()
    program, name = _read(source, example_inputs, dynamic_axes, dynamic_shapes, allow_nonfinite)
    if fixed:
        fix_inputs(program, fixed)
    converted = program.meta.get(reading.CONVERTED, ())
    if converted:
        warnings.warn(
            f"{name} computes in {' and '.join(converted)}: it was converted to float32, from which it is quantized.",
            stacklevel=2,
        )
    return Model(program, name, converted)


def _read(
    source: Any, example_inputs: Any, dynamic_axes: Axes | None, dynamic_shapes: Any, allow_nonfinite: bool
) -> tuple[ir.Model, str]:
    """The program of whatever `load` takes, and what to call it in messages."""
    if isinstance(source, (str, os.PathLike)) and Path(source).suffix == ".lowbit":
        from lowbit.storage.container import unpacked_bytes

        return reading.read_bytes(unpacked_bytes(source), source=str(source), allow_nonfinite=allow_nonfinite), str(
            source
        )
    if isinstance(source, (str, os.PathLike)):
        return reading.read_file(source, allow_nonfinite=allow_nonfinite), str(source)
    if isinstance(source, (bytes, bytearray, memoryview)):
        return reading.read_bytes(bytes(source), allow_nonfinite=allow_nonfinite), "bytes"
    if isinstance(source, onnx.ModelProto):
        return reading.read_proto(source, allow_nonfinite=allow_nonfinite), "ModelProto"
    if isinstance(source, ir.Model):
        return reading.canonical(source.clone(), allow_nonfinite=allow_nonfinite), "ir.Model"
    if isinstance(source, Mapping):
        raise InputError("a state dict holds weights, no network: give the torch module that it was loaded into.")
    if isinstance(source, type):
        raise InputError(f"{source.__name__} is a class: give a module made of it, {source.__name__}(…).")
    if not _is_module(source):
        raise InputError(f"cannot load a {type(source).__name__}: give an ONNX file, its bytes, or a torch.nn.Module.")
    from lowbit.graph.torch_export import export_module

    program = export_module(
        source,
        example_inputs,
        dynamic_axes=dynamic_axes,
        dynamic_shapes=dynamic_shapes,
        allow_nonfinite=allow_nonfinite,
    )
    return program, type(source).__name__


def check_batch(batch: Batch, ports: tuple[Port, ...]) -> Batch:
    """The batch as arrays, one for each port; errors name the input, what was expected and what was given."""
    names = [port.name for port in ports]
    if not isinstance(batch, dict):
        raise DataError(f"a batch is a dict of arrays by input name ({', '.join(names)}), not {type(batch).__name__}.")
    if missing := [port for port in ports if port.name not in batch]:
        raise DataError(f"input {missing[0]} is missing; given: {', '.join(map(repr, batch)) or 'nothing'}.")
    if unknown := [name for name in batch if name not in names]:
        raise DataError(f"the model has no input '{unknown[0]}'; its inputs are {_list(ports)}.")
    return {port.name: _check_array(np.asarray(batch[port.name]), port) for port in ports}


def _different_lengths(batch: Batch, ports: tuple[Port, ...]) -> str:
    """In words: two inputs that disagree about an axis of one name; empty where none do."""
    first: dict[str, tuple[str, int]] = {}
    for port in ports:
        for name, length in zip(port.shape, batch[port.name].shape, strict=False):
            known, other = first.setdefault(name, (port.name, length)) if isinstance(name, str) else ("", length)
            if other != length:
                return f"axis '{name}' is {other} in '{known}' and {length} in '{port.name}': give both the same."
    return ""


def _check_array(array: np.ndarray, port: Port) -> np.ndarray:
    if array.dtype != port.dtype and not (port.dtype == object and array.dtype.kind in "US"):
        raise DataError(f"input {port} was given {array.dtype}; convert it with .astype('{port.dtype}').")
    fits = not port.ranked or array.ndim == len(port.shape)
    fits = fits and all(
        not isinstance(want, int) or want == have for want, have in zip(port.shape, array.shape, strict=False)
    )
    if not fits:
        raise ShapeError(f"input {port} was given the shape {list(array.shape)}.")
    return array


def _port(value: ir.Value) -> Port:
    dtype = np.dtype(object) if value.dtype in (None, ir.DataType.STRING) else np.dtype(value.dtype.numpy())
    shape = () if value.shape is None else tuple(d if isinstance(d, int) else d.value for d in value.shape)
    return Port(value.name or "", dtype, shape, ranked=value.shape is not None)


def _list(ports: tuple[Port, ...]) -> str:
    return ", ".join(map(str, ports))


def _files_read(program: ir.Model) -> list[Path]:
    tensors = [value.const_value for graph in program.graphs() for value in graph.initializers.values()]
    return sorted({Path(tensor.path) for tensor in tensors if isinstance(tensor, ir.ExternalTensor)})


def _save_large(program: ir.Model, path: Path) -> int:
    """Weights into `<path>.data`, the graph into `path`; both aside first, renamed when both are whole."""
    from lowbit.storage.atomic import refuse_overwriting_input, replacing

    data = path.with_name(path.name + ".data")
    refuse_overwriting_input(data, *_files_read(program))
    with replacing(data) as data_aside, replacing(path) as aside:
        ir.save(program, aside, external_data=data_aside.name, size_threshold_bytes=1024)
        proto = onnx.load(aside, load_external_data=False)
        for tensor in proto.graph.initializer:
            for entry in tensor.external_data:
                if entry.key == "location":
                    entry.value = data.name
        aside.write_bytes(proto.SerializeToString())
        size = aside.stat().st_size + data_aside.stat().st_size
    return size


def _is_module(source: object) -> bool:
    """Whether it is a torch module, without importing torch for those who have none."""
    return any(
        base.__module__ == "torch.nn.modules.module" and base.__name__ == "Module" for base in type(source).__mro__
    )
