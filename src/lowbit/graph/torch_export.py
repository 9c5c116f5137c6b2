"""A PyTorch module → the ONNX program, through torch's own exporter.

Parameters keep their names (a Linear's transposed weight too), inputs are named by `forward`'s signature, outputs by
the keys of what it returns, the batch is a free dimension, BatchNormalization is kept for the passes to fold.
"""

from __future__ import annotations

import contextlib
import copy
import inspect
import io
import logging
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_ir as ir

from lowbit.errors import InputError, ModelError
from lowbit.graph.fold import quiet
from lowbit.graph.layer import RECURRENT
from lowbit.graph.load import canonical
from lowbit.graph.torch_leftovers import tidy

if TYPE_CHECKING:
    import torch

Axes = Mapping[str, Mapping[int, str] | Sequence[int]]
EXPORT_OPSET = 21


def export_module(
    module: torch.nn.Module,
    example_inputs: Any,
    *,
    dynamic_axes: Axes | None = None,
    dynamic_shapes: Any = None,
    allow_nonfinite: bool = False,
) -> ir.Model:
    """The program that `module` computes in eval mode; the module itself is left as it was.

    example_inputs   a tensor or array; a tuple or list of positional ones; or a dict of keyword arguments
    dynamic_axes     {input: {axis: name}} or {input: [axes]}; by default axis 0 of each input that shares the first's
    dynamic_shapes   instead: torch.export's own form

    ModelError says in one line what could not be exported and what to try. Where only the default dynamic batch is
    what fails, the shapes of the example are fixed, with a warning.
    """
    from lowbit.graph.torch_projections import without_projections  # it imports torch

    args, kwargs = _arguments(module, example_inputs)
    with _evaluating(module), without_projections(module) as module:
        names = _output_names(_forward(module, args, kwargs))
        asked = dynamic_axes is not None or dynamic_shapes is not None
        if dynamic_shapes is None:
            args, kwargs, dynamic_shapes = _dynamic(module, args, kwargs, dynamic_axes)
        try:
            program = _export(module, args, kwargs, dynamic_shapes)
        except Exception as error:
            if not _any_dynamic(dynamic_shapes):
                raise ModelError(_explained(module, error)) from error
            try:
                program = _export(module, *_arguments(module, example_inputs), None)
            except Exception as static_error:
                raise ModelError(_explained(module, static_error)) from static_error
            if asked:
                raise ModelError(
                    f"{type(module).__name__} cannot be exported with these dynamic axes: {_root_cause(error)}. "
                    "With the shapes of the example it can: name fewer axes, or pass dynamic_axes={}."
                ) from error
            warnings.warn(
                f"{type(module).__name__} could not be exported with a dynamic batch ({_root_cause(error)}); "
                "the shapes of the example inputs are fixed.",
                stacklevel=3,
            )
    _own_the_weights(program)
    declared = _forget_output_shapes(program)
    _name_outputs(program, names)
    program = canonical(program, source=type(module).__name__, allow_nonfinite=allow_nonfinite, trust_shapes=True)
    tidy(program, {name for name, _ in module.named_parameters()})
    _declare_output_shapes(program, declared)
    return program


def _arguments(module: torch.nn.Module, example_inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    import torch

    def tensor(value: Any) -> Any:
        return torch.from_numpy(np.array(value)) if isinstance(value, np.ndarray) else value

    if example_inputs is None:
        raise InputError(
            f"a torch module needs example_inputs to be read: a tensor, a tuple, or a dict for {_signature(module)}."
        )
    if isinstance(example_inputs, Mapping):
        return (), {str(name): tensor(value) for name, value in example_inputs.items()}
    if isinstance(example_inputs, (tuple, list)):
        return tuple(tensor(value) for value in example_inputs), {}
    return (tensor(example_inputs),), {}


def _signature(module: torch.nn.Module) -> str:
    return f"{type(module).__name__}.forward{inspect.signature(module.forward)}"


def _forward(module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    import torch

    try:
        with torch.no_grad():
            return module(*copy.deepcopy(args), **copy.deepcopy(kwargs))
    except Exception as error:
        raise InputError(
            f"{type(module).__name__} fails on the example inputs ({_root_cause(error)}); it is {_signature(module)}."
        ) from error


@contextlib.contextmanager
def _evaluating(module: torch.nn.Module) -> Iterator[None]:
    """Eval mode inside; afterwards every submodule is back in the mode that it was in."""
    modes = [(part, part.training) for part in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for part, training in modes:
            part.training = training


def _dynamic(
    module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], axes: Axes | None
) -> tuple[tuple[Any, ...], dict[str, Any], dict[str, Any]]:
    """Arguments and torch.export's dynamic_shapes for the asked axes, or for the batch.

    torch.export takes an axis of size 1 for a constant: a batch of one is doubled.
    """
    import torch

    names = list(inspect.signature(module.forward).parameters)
    given: dict[str, Any] = dict(zip(names, args, strict=False)) | kwargs
    if axes is not None:
        if unknown := sorted(set(axes) - set(given)):
            raise InputError(f"dynamic_axes names {unknown}, but the example inputs are {list(given)}.")
        named = {
            name: dict(each) if isinstance(each, Mapping) else {axis: f"{name}_{axis}" for axis in each}
            for name, each in axes.items()
        }
        return args, kwargs, {name: _dims(value, named.get(name)) for name, value in given.items()}
    tensors = [value for value in given.values() if isinstance(value, torch.Tensor) and value.ndim > 0]
    batch = tensors[0].shape[0] if tensors else 0

    def shared(value: Any) -> bool:
        return isinstance(value, torch.Tensor) and value.ndim > 0 and value.shape[0] == batch

    if batch == 1:
        args = tuple(torch.cat([value, value]) if shared(value) else value for value in args)
        kwargs = {name: torch.cat([value, value]) if shared(value) else value for name, value in kwargs.items()}
    shapes = {name: _dims(value, {0: "batch"} if shared(value) else None) for name, value in given.items()}
    return args, kwargs, shapes


def _dims(value: Any, axes: Mapping[int, str] | None) -> dict[int, str] | None:
    import torch

    if not isinstance(value, torch.Tensor):
        return None
    return {axis % max(value.ndim, 1): name for axis, name in (axes or {}).items()}


def _any_dynamic(shapes: Any) -> bool:
    return isinstance(shapes, dict) and any(shapes.values())


def _export(module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], shapes: Any) -> ir.Model:
    import torch

    from lowbit.graph.torch_bags import embedding_bags
    from lowbit.graph.torch_recurrent import recurrent_operators, translations

    with contextlib.ExitStack() as stack:
        for context in (warnings.catch_warnings(), quiet(), contextlib.redirect_stdout(io.StringIO())):
            stack.enter_context(context)
        stack.enter_context(recurrent_operators())
        stack.enter_context(embedding_bags())
        warnings.simplefilter("ignore")
        before = logging.root.manager.disable
        logging.disable(logging.CRITICAL)
        try:
            exported = torch.onnx.export(
                module,
                args,
                kwargs=kwargs,
                dynamic_shapes=shapes,
                opset_version=EXPORT_OPSET,
                dynamo=True,
                custom_translation_table=translations(),
                optimize=False,
                verbose=False,
            )
        finally:
            logging.disable(before)
    if exported is None:
        raise ModelError("torch.onnx.export returned nothing.")
    program: ir.Model = exported.model
    return program


def _forget_output_shapes(program: ir.Model) -> list[ir.Shape | None]:
    """The shapes that the exporter declared; what is so is inferred anew.

    Behind a recurrent layer all values are: it declares the example's length in time there, which a Reshape would keep.
    """
    declared = [value.shape for value in program.graph.outputs]
    behind: set[ir.Value] = set()
    for node in program.graph:
        if node.op_type in RECURRENT or any(value in behind for value in node.inputs):
            behind |= set(node.outputs)
    for value in {*program.graph.outputs, *behind}:
        value.shape = None
    return declared


def _declare_output_shapes(program: ir.Model, declared: list[ir.Shape | None]) -> None:
    """As inferred, and where that knows nothing as declared: behind an LSTM that is the example's length in time."""
    symbols = {side.value for value in program.graph.inputs for side in value.shape or () if not isinstance(side, int)}
    for value, old in zip(program.graph.outputs, declared, strict=True):
        new = value.shape
        if new is None or old is None or len(new) != len(old):
            value.shape = old
        else:
            sides = [a if isinstance(a, int) or a.value in symbols else b for a, b in zip(new, old, strict=True)]
            value.shape = ir.Shape(sides)


def _own_the_weights(program: ir.Model) -> None:
    """Copy the weights (the exporter refers to the module's), and drop the exporter's notes: source lines and paths."""
    for graph in program.graphs():
        for name, value in graph.initializers.items():
            if value.const_value is not None:
                value.const_value = ir.tensor(np.array(value.const_value.numpy()), value.const_value.dtype, name=name)
        for value in (*graph.inputs, *graph.initializers.values()):
            value.metadata_props.clear()
        for node in graph:
            node.metadata_props.clear()
            node.doc_string = None
            for value in node.outputs:
                value.metadata_props.clear()
    program.metadata_props.clear()
    program.graph.metadata_props.clear()


def _output_names(result: Any, prefix: str = "") -> list[str]:
    """One name for each tensor that `forward` returned, in the order in which the exporter flattens them."""
    import torch

    if isinstance(result, torch.Tensor):
        return [prefix or "output"]
    if isinstance(result, Mapping):
        items = [(str(key), value) for key, value in result.items()]
    elif isinstance(result, tuple) and hasattr(result, "_fields"):
        items = list(zip(result._fields, result, strict=True))
    elif isinstance(result, (tuple, list)):
        items = [(f"output_{index}" if not prefix else str(index), value) for index, value in enumerate(result)]
    else:
        return []
    return [name for key, value in items for name in _output_names(value, f"{prefix}_{key}" if prefix else key)]


def _name_outputs(program: ir.Model, names: list[str]) -> None:
    if len(names) != len(program.graph.outputs):
        return  # a custom container: the exporter's own names stay
    taken = {value.name for value in (*program.graph.inputs, *program.graph.initializers.values())}
    taken |= {value.name for node in program.graph.all_nodes() for value in node.outputs}
    for index, (value, name) in enumerate(zip(program.graph.outputs, names, strict=True)):
        if value.is_graph_input() or value.is_initializer() or value in program.graph.outputs[:index]:
            continue
        if name in taken and value.name != name:
            name = f"{name}_out"
        value.name = name
        taken.add(name)


def _explained(module: torch.nn.Module, error: BaseException) -> str:
    cause = _root_cause(error)
    text = f"{cause} {error}".lower()
    if "data-dependent" in text or "guard" in text or "control flow" in text:
        hint = (
            "Its forward branches on values: use torch.where or torch.cond, or make the branch depend on shapes only."
        )
    elif "decomposition" in text or "dispatch" in text or "no onnx function" in text or "not supported" in text:
        hint = "Replace that operation by one that ONNX has, or cut it from the module and run it outside."
    elif "constraint" in text or "dynamic" in text or "specializ" in text:
        hint = "Pass dynamic_axes={} to fix the shapes of the example, or name fewer axes."
    else:
        hint = "Try torch.export.export(module, args) for the full report, or give an ONNX file instead."
    return f"{type(module).__name__} cannot be exported to ONNX: {cause}. {hint}"


def _root_cause(error: BaseException) -> str:
    """The innermost error in a line; where its first line only announces a list, with what stands in it."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    lines = [line for line in lines if "TORCH_LOGS" not in line] or lines
    if not lines:
        return type(error).__name__
    text = lines[0][:240]
    if listed := [line.lstrip("-* ") for line in lines[1:] if line.startswith(("-", "*"))]:
        text = f"{text.rstrip(':. ')}: {' '.join(listed)[:240]}"
    return f"{type(error).__name__}: {text.rstrip('.')}"
