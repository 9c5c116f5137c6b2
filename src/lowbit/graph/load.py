"""ONNX from anywhere → the program that everything else works on.

A program is an `onnx_ir.Model` with: default opset ≥ 21, initialisers that are not inputs, constants folded and held
as initialisers, shapes inferred, no dead nodes, unique names, float32 where it was float16, bfloat16 or float64. Input
and output names, their order, the documentation and the metadata stay exactly those of the source.
"""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
from onnx_ir.passes import common

from lowbit.errors import InputError, LowbitError, ModelError
from lowbit.graph.check import check_model, check_wiring
from lowbit.graph.fold import fold_constants, infer_shapes, name_uniquely, quiet
from lowbit.graph.layer import MULTIPLYING
from lowbit.graph.opset import TARGET_OPSET, raise_opset
from lowbit.graph.to_float32 import to_float32

CONVERTED = "lowbit.converted"  # key of program.meta: the types that the source computed in, where not float32
LARGEST_FILE_BYTES = (1 << 31) - 1  # protobuf's own limit; larger models keep their weights in external data
MINIMUM_IR_VERSION = 10  # what opset 21 needs
_PIECE = 1 << 22
_NO_ONNX = {
    **dict.fromkeys((".pt", ".pth", ".ckpt", ".bin"), "a PyTorch checkpoint; give the module: load(module, example)"),
    ".pt2": "a torch.export program; write it with torch.onnx.export(program, 'net.onnx')",
    **dict.fromkeys((".keras", ".h5"), "a Keras model; write it with model.export('net.onnx', format='onnx')"),
    **dict.fromkeys((".pb", ".tflite"), "a TensorFlow model; convert it with tf2onnx"),
    ".safetensors": "weights without a network; give the module that they are loaded into",
}


def read_file(path: str | os.PathLike[str], *, allow_nonfinite: bool = False) -> ir.Model:
    """The program in an ONNX file; external data stays on disk and is mapped when read."""
    path = Path(path)
    data = _read_bytes(path)
    return read_bytes(data, source=str(path), folder=path.parent, allow_nonfinite=allow_nonfinite)


def _read_bytes(path: Path) -> bytes:
    try:
        if path.suffix in _NO_ONNX:
            raise InputError(f"{path}: {_NO_ONNX[path.suffix]}.")
        if path.is_dir():
            raise InputError(f"{path}: a folder, not an ONNX file.")
        if path.exists() and not path.is_file():
            raise InputError(f"{path}: not a regular file.")
        size = path.stat().st_size
        if size > LARGEST_FILE_BYTES:
            raise InputError(f"{path}: {size / 2**30:.1f} GiB; an ONNX file over 2 GiB keeps its weights beside it.")
        return path.read_bytes()
    except FileNotFoundError:
        raise InputError(f"{path}: no such file.") from None
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}).") from None


def read_bytes(
    data: bytes, *, source: str = "bytes", folder: Path | None = None, allow_nonfinite: bool = False
) -> ir.Model:
    """The program in a serialised ONNX model; external data is read from `folder` alone."""
    if not data:
        raise InputError(f"{source}: empty.")
    proto = onnx.ModelProto()
    try:
        proto.ParseFromString(data)
    except Exception:  # protobuf's DecodeError, which has no stable public place
        raise InputError(f"{source}: not an ONNX model, or cut short ({len(data)} bytes).") from None
    return read_proto(proto, source=source, folder=folder, allow_nonfinite=allow_nonfinite)


def read_proto(
    proto: onnx.ModelProto, *, source: str = "ModelProto", folder: Path | None = None, allow_nonfinite: bool = False
) -> ir.Model:
    """The program in an ONNX message. The message is checked first: nothing in it is trusted."""
    try:
        check_model(proto, source, folder)
        with quiet():
            program = ir.from_proto(proto)
        check_wiring(program, source)
    except LowbitError as error:
        raise type(error)(_printable(str(error))) from None
    except Exception as error:
        raise InputError(f"{source}: cannot be read as ONNX ({_first_line(error)}).") from error
    if folder is not None:
        ir.external_data.set_base_dir(program.graph, folder)
    return canonical(program, source=source, allow_nonfinite=allow_nonfinite)


def canonical(
    program: ir.Model, *, source: str = "ir.Model", allow_nonfinite: bool = False, trust_shapes: bool = False
) -> ir.Model:
    """Bring a program into the form stated above, in place, and return it.

    allow_nonfinite   accept NaN or infinity in a weight, which otherwise is an InputError that names it
    trust_shapes      keep the shapes that intermediate values come with. Those in files are often of one traced
                      example, wrong for every other batch size; they are inferred anew
    """
    inputs = [value.name for value in program.graph.inputs if value.name not in program.graph.initializers]
    before = [inputs, [value.name for value in program.graph.outputs]]
    try:
        if not trust_shapes:
            _forget_shapes(program)
        _bring_to_form(program)
    except LowbitError as error:
        raise type(error)(f"{source}: {error}") from error.__cause__
    except Exception as error:
        raise ModelError(f"{source}: cannot be brought to opset 21 ({_first_line(error)}).") from error
    after = [[value.name for value in values] for values in (program.graph.inputs, program.graph.outputs)]
    if after != before:
        raise ModelError(f"{source}: reading changed its inputs or outputs from {before} to {after}.")
    if not allow_nonfinite:
        _refuse_nonfinite(program, source)
    return program


def _bring_to_form(program: ir.Model) -> None:
    with quiet():
        program.graph.sort()
        common.RemoveInitializersFromInputsPass()(program)
        _drop_unnamed_outputs(program)
        name_uniquely(program)
        infer_shapes(program)
        if program.graph.opset_imports.get("", TARGET_OPSET) < TARGET_OPSET:
            fold_constants(program)  # what shapes are known decides how Softmax and Clip are raised
        raise_opset(program)
        if program.functions:
            common.InlinePass()(program)
            common.RemoveUnusedFunctionsPass()(program)  # type: ignore[no-untyped-call]
        if converted := to_float32(program):
            program.meta[CONVERTED] = converted
    program.ir_version = max(program.ir_version, MINIMUM_IR_VERSION)
    if "lowbit.recipe" not in program.metadata_props:  # what lowbit wrote is folded, but for what decodes its codes
        fold_constants(program)
    infer_shapes(program)


def _forget_shapes(program: ir.Model) -> None:
    for node in program.graph.all_nodes():
        for value in node.outputs:
            if node.domain in ("", "ai.onnx") and not value.is_graph_output():
                value.shape = None


def _drop_unnamed_outputs(program: ir.Model) -> None:
    """Optional outputs that a node leaves out at its end: without a name they are not computed, with one they would."""
    for graph in program.graphs():
        for node in graph:
            used = [i for i, output in enumerate(node.outputs) if output.name or output.uses()]
            if used and used[-1] + 1 < len(node.outputs):
                node.resize_outputs(used[-1] + 1)


def _refuse_nonfinite(program: ir.Model, source: str) -> None:
    """NaN nowhere; infinity not in weights (an attention mask may well add −inf)."""
    for graph in program.graphs():
        for name, value in graph.initializers.items():
            tensor = value.const_value
            if tensor is None or not tensor.dtype.is_floating_point() or tensor.dtype.bitwidth < 8:
                continue
            array = np.asarray(tensor.numpy())
            if _all_finite(array):
                continue
            nan = int(np.isnan(array).sum())
            infinite = int(np.isinf(array).sum())
            is_weight = any(use.node.op_type in {*MULTIPLYING, "BatchNormalization"} for use in value.uses())
            if nan or (infinite and is_weight):
                raise InputError(
                    f"{source}: '{name}' holds {nan} NaN and {infinite} infinite of its {array.size} values; "
                    "the training diverged or the file is damaged. Pass allow_nonfinite=True to go on anyway."
                )


def _all_finite(array: np.ndarray) -> bool:
    """In pieces: the answer for a mapped weight of gigabytes must not take another gigabyte."""
    flat = array.reshape(-1)
    return all(bool(np.isfinite(flat[start : start + _PIECE]).all()) for start in range(0, flat.size, _PIECE))


def _printable(text: str) -> str:
    """Names come from the file: whatever in them would break the line or the terminal is escaped."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def _first_line(error: BaseException) -> str:
    while error.__cause__ is not None and not str(error).strip():
        error = error.__cause__
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:300]}" if lines else type(error).__name__
