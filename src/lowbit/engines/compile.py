"""Engines that run an ONNX program: compile once, call many times. One entry in ENGINES each."""

from __future__ import annotations

import contextlib
import re
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import onnx_ir as ir

from lowbit.errors import DataError, LowbitError, ModelError, UnsupportedError

Batch = dict[str, np.ndarray]  # arrays by the name of the input or output
Run = Callable[[Batch], Batch]

# Above this a serialised model goes through a temporary file with external data; protobuf's own limit is 2 GiB.
LARGEST_MESSAGE_BYTES = 1_800_000_000


class Engine(Protocol):
    """What can run a program on this machine."""

    @property
    def name(self) -> str: ...

    def compile(
        self,
        program: ir.Model | Path,
        *,
        threads: int | None = None,
        outputs: Sequence[str] | None = None,
        optimize: bool = True,
    ) -> Run:
        """A function batch → outputs by name.

        threads    cores to use; None: the engine's own choice
        outputs    values to return, intermediate ones too; None: the program's outputs
        optimize   False runs the graph as it is written
        ModelError carries the first line of what the engine says.
        """
        ...


@dataclass(frozen=True)
class OnnxRuntime:
    """onnxruntime on the CPU."""

    name: str = "onnxruntime"

    def compile(
        self,
        program: ir.Model | Path,
        *,
        threads: int | None = None,
        outputs: Sequence[str] | None = None,
        optimize: bool = True,
    ) -> Run:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.log_severity_level = 4
        if threads is not None:
            options.intra_op_num_threads = threads
            options.inter_op_num_threads = 1
        levels = onnxruntime.GraphOptimizationLevel
        options.graph_optimization_level = levels.ORT_ENABLE_ALL if optimize else levels.ORT_DISABLE_ALL
        folder = _folder_of_weights(program)
        if folder is not None:  # mapped from there: a table may be larger than memory
            options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(folder))
        with _as_file_or_bytes(program, outputs, folder) as model, _errors("onnxruntime cannot load the model"):
            source = str(model) if isinstance(model, Path) else model
            session = onnxruntime.InferenceSession(source, options, providers=["CPUExecutionProvider"])
        names = [port.name for port in session.get_outputs()] if outputs is None else list(outputs)
        never_empty = _never_empty(program) if isinstance(program, ir.Model) else set()

        def run(batch: Batch) -> Batch:
            doing = "onnxruntime failed while running the model"
            if any(0 in array.shape for array in batch.values()):
                doing = f"{_allowed_empty(batch, never_empty)} is empty, and {doing}"
            with _errors(doing):
                return dict(zip(names, session.run(names, batch), strict=True))

        return run


@dataclass(frozen=True)
class OpenVino:
    """OpenVINO on the CPU; the extra `lowbit[openvino]`."""

    name: str = "openvino"

    def compile(
        self,
        program: ir.Model | Path,
        *,
        threads: int | None = None,
        outputs: Sequence[str] | None = None,
        optimize: bool = True,
    ) -> Run:
        openvino = _import_openvino()
        # One request at a time, answered as fast as can be; float32 stays float32 on machines with bfloat16 units.
        config: dict[str, Any] = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_PRECISION_HINT": "f32", "NUM_STREAMS": 1}
        if threads is not None:
            config["INFERENCE_NUM_THREADS"] = threads
        with _as_file_or_bytes(program, outputs) as model, _errors("OpenVINO cannot load the model"):
            core = openvino.Core()
            read = core.read_model(str(model)) if isinstance(model, Path) else core.read_model(model)
            wanted = _port_names(read.outputs) if outputs is None else list(outputs)
            compiled = core.compile_model(read, "CPU", config)
            request = compiled.create_infer_request()
        inputs = {name: port for port in compiled.inputs for name in port.get_names()}
        shapes = {name: port.partial_shape for name, port in inputs.items()}
        ports = [compiled.output(name) for name in wanted]

        def run(batch: Batch) -> Batch:
            for name, array in batch.items():
                # With one thread OpenVINO takes a wrong shape without a word and computes something.
                if name in shapes and not shapes[name].compatible(openvino.PartialShape(list(array.shape))):
                    raise ModelError(
                        f"OpenVINO: input '{name}' {shapes[name]} was given the shape {list(array.shape)}."
                    )
            with _errors("OpenVINO failed while running the model"):
                given = {inputs[name]: np.asarray(array, order="C") for name, array in batch.items() if name in inputs}
                results = request.infer(given)
                return {name: np.array(results[port]) for name, port in zip(wanted, ports, strict=True)}

        return run


ENGINES: dict[str, Engine] = {engine.name: engine for engine in (OnnxRuntime(), OpenVino())}


def unsupported(engine: Engine, program: ir.Model) -> str:
    """Why an engine cannot run the program, in words; empty if it can run it."""
    try:
        engine.compile(program, threads=1, optimize=False)
    except LowbitError as error:
        return str(error)
    return ""


def _import_openvino() -> Any:
    try:
        import openvino
    except ImportError as error:
        raise UnsupportedError("OpenVINO is not installed: pip install 'lowbit[openvino]'.") from error
    return openvino


def _never_empty(program: ir.Model) -> set[tuple[str, int]]:
    """(input, axis) that may not have the length 0: onnxruntime would end the process (seen with 1.31).

    Its LSTM does so without a sequence, its GRU also without a step. Where shapes do not tell, all axes are named.
    """
    found = [n for n in program.graph.all_nodes() if n.op_type in ("LSTM", "GRU", "DynamicQuantizeLSTM")]
    shapes = [None if node.inputs[0] is None else node.inputs[0].shape for node in found]
    may: set[str] = set()
    if all(shape is not None for shape in shapes) and all("LSTM" in node.op_type for node in found):
        steps, batches = ({str(shape[axis]) for shape in shapes if shape is not None} for axis in (0, 1))
        may = steps - batches
    sides = [(str(v.name), axis, str(side)) for v in program.graph.inputs for axis, side in enumerate(v.shape or ())]
    return {(name, axis) for name, axis, side in sides if side not in may} if found else set()


def _allowed_empty(batch: Batch, never: set[tuple[str, int]]) -> str:
    """The first input of a batch that is empty, in words; DataError where it may not be."""
    axes = [(name, axis) for name, array in batch.items() for axis, side in enumerate(array.shape) if side == 0]
    told = f"input '{axes[0][0]}' {batch[axes[0][0]].shape}"
    if never.isdisjoint(axes):
        return told
    raise DataError(
        f"{told} is empty: onnxruntime's LSTM and GRU end the whole process there. "
        "Give one step of one sequence at least."
    )


def _port_names(ports: Sequence[Any]) -> list[str]:
    return [port.get_any_name() for port in ports]


@contextlib.contextmanager
def _as_file_or_bytes(
    program: ir.Model | Path, outputs: Sequence[str] | None, folder: Path | None = None
) -> Iterator[Path | bytes]:
    """What an engine reads: the file itself, the serialised program, or above 2 GB a temporary file.

    folder   the engine maps weights that lie in files there: the serialised program only names them
    """
    if isinstance(program, Path):
        if outputs is None:
            yield program
            return
        program = ir.load(program)
    if outputs is not None:
        program = _with_outputs(program, outputs)
    if folder is not None:
        yield bytes(ir.to_proto(program).SerializeToString())
        return
    if weight_bytes(program) <= LARGEST_MESSAGE_BYTES:
        yield serialize(program)
        return
    with tempfile.TemporaryDirectory(prefix="lowbit-") as aside:
        path = Path(aside) / "model.onnx"
        # A copy: `save` points the tensors to the new file while it writes, and threads may share the program.
        ir.save(program.clone(), path, external_data="model.onnx.data", size_threshold_bytes=1024)
        yield path


def _folder_of_weights(program: ir.Model | Path) -> Path | None:
    """The one folder of the files that a program's weights lie in; None where there are none or several."""
    if isinstance(program, Path):
        return None
    tensors = [value.const_value for graph in program.graphs() for value in graph.initializers.values()]
    folders = {Path(tensor.base_dir) for tensor in tensors if isinstance(tensor, ir.ExternalTensor)}
    return folders.pop().absolute() if len(folders) == 1 else None


def _with_outputs(program: ir.Model, names: Sequence[str]) -> ir.Model:
    """A copy of the program, its tensors shared, that also returns the named values."""
    program = program.clone()
    values = ir.convenience.create_value_mapping(program.graph)
    present = {value.name for value in program.graph.outputs}
    for name in names:
        if name not in values:
            raise ModelError(f"the model has no value '{name}' to return.")
        if name not in present:
            program.graph.outputs.append(values[name])
            present.add(name)
    return program


def weight_bytes(program: ir.Model) -> int:
    """Bytes of all constants of the program, those in subgraphs and attributes included."""
    total = 0
    for graph in program.graphs():
        total += sum(value.const_value.nbytes for value in graph.initializers.values() if value.const_value is not None)
        for node in graph:
            for attr in node.attributes.values():
                if attr.type == ir.AttributeType.TENSOR and not attr.is_ref():
                    total += attr.as_tensor().nbytes
    return total


def serialize(program: ir.Model) -> bytes:
    """The program as one ONNX message, external data taken into it. It is only read: threads may share it."""
    values = [value for graph in program.graphs() for value in graph.initializers.values()]
    if any(isinstance(value.const_value, ir.ExternalTensor) for value in values):
        program = program.clone()
        for graph in program.graphs():
            for name, value in graph.initializers.items():
                tensor = value.const_value
                if isinstance(tensor, ir.ExternalTensor):  # mapped arrays: the message then carries their bytes
                    value.const_value = ir.Tensor(tensor.numpy(), dtype=tensor.dtype, shape=tensor.shape, name=name)
    return bytes(ir.to_proto(program).SerializeToString())


_OUTSIDE = re.compile(r"Name:'(.*?)'.*idx=(-?\d+) must be within the inclusive range \[-\d+,(\d+)\]", re.DOTALL)
_LENGTH = re.compile(r"Invalid value/s in sequence_lens.*seq_length=(\d+)|Invalid sequence length: .*\[0,\s*(\d+)\]")
# What OpenVINO says before it says what is wrong.
_NO_NEWS = ("Exception from", "Check '", "FrontEnd API failed", "Model wasn't fully converted", "Summary:")


@contextlib.contextmanager
def _errors(doing: str) -> Iterator[None]:
    """Whatever an engine throws becomes a ModelError with the engine's own first line; a wrong index a DataError."""
    try:
        yield
    except (ModelError, KeyboardInterrupt):
        raise
    except Exception as error:
        if outside := _OUTSIDE.search(str(error)):
            node, index, last = outside.groups()
            reads = f" that node '{node}' reads" if node else ""  # quantized files leave out names of nodes
            raise DataError(
                f"{doing}: index {index} lies outside the table of {int(last) + 1} rows{reads}. "
                f"Give indices from 0 to {last}."
            ) from None
        if too_long := _LENGTH.search(str(error)):
            steps = too_long[1] or too_long[2]
            raise DataError(f"{doing}: a sequence length lies outside 0 to {steps}, the number of steps.") from None
        lines = [line.strip(" -\t") for line in str(error).splitlines() if line.strip()]
        first = next((line for line in lines if not line.startswith(_NO_NEWS)), type(error).__name__)
        raise ModelError(f"{doing}: {first[:400]}") from error
