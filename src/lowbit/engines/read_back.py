"""What an engine really runs: compile a program as its users will, and read off which nodes compute in integers.

Engines rewrite a graph while they load it: onnxruntime makes integer kernels of what lies between QuantizeLinear and
DequantizeLinear, float layers included. So what a file says is no proof of what is computed; the optimized graph is.
"""

import re
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path

import onnx
import onnx_ir as ir

from lowbit.engines.compile import ENGINES, Engine, OnnxRuntime, serialize

INTEGERS = "integers"
BY_BLOCK = "activations int8 per block"  # weights in few bits, and the kernel rounds its activations as well
FLOAT = "float"

TAG = re.compile(r"@(\d+)@")
# onnxruntime's integer kernels; all others whose name starts with QLinear are integer kernels too.
_INTEGER = re.compile(r"QLinear|QGemm|QAttention|QEmbedLayer|MatMulInteger|ConvInteger|DynamicQuantize(MatMul|LSTM)")
_ACCURACY = 4  # MatMulNBits at this level rounds its activations to int8


@dataclass(frozen=True)
class ReadBack:
    """What the nodes of a program became in an engine.

    engine       its name
    arithmetic   node name → INTEGERS or BY_BLOCK; a node that is not here computes in float, or was folded away
    operators    node name → the engine's operator that runs it, for the nodes in `arithmetic`
    unread       why nothing was read back; empty where it was
    """

    engine: str
    arithmetic: Mapping[str, str] = field(default_factory=dict)
    operators: Mapping[str, str] = field(default_factory=dict)
    unread: str = ""

    def of(self, node: str) -> str:
        """INTEGERS, FLOAT or BY_BLOCK."""
        return self.arithmetic.get(node, FLOAT)


def read_back(program: ir.Model, engine: str) -> ReadBack:
    """Compile the program in a default session of the engine and say which of its nodes run in integers.

    Nodes get numbers for names first: fused operators keep the name of one of their nodes, with additions.
    """
    if engine not in ENGINES or find_spec(engine) is None:
        return ReadBack(engine, unread=f"{engine} is not installed here: what it makes of the file was not read back")
    names = [str(node.name) for node in program.graph]
    arithmetic, operators = {}, {}
    for tag, operator, kind in _integer_kernels(_tagged(program), ENGINES[engine]):
        arithmetic[names[tag]], operators[names[tag]] = kind, operator
    return ReadBack(engine, arithmetic, operators)


def _tagged(program: ir.Model) -> bytes:
    """The program as a file whose node number n is called @n@, and so are the nodes of its bodies."""
    copy = program.clone()
    for index, node in enumerate(copy.graph):
        node.name = f"@{index}@"
        bodies = [a.as_graph() for a in node.attributes.values() if a.type is ir.AttributeType.GRAPH]
        for place, inner in enumerate(n for body in bodies for n in body.all_nodes()):
            inner.name = f"@{index}@{place}"
        for value in node.outputs:  # OpenVINO names the node that makes an output of the network after that output
            if value.is_graph_output():
                value.name = f"@{index}@{value.name}"
    return serialize(copy)


def _integer_kernels(model: bytes, engine: Engine) -> Iterator[tuple[int, str, str]]:
    """(number of the node, the engine's operator, arithmetic) for each integer kernel."""
    kernels = _of_onnxruntime(model) if isinstance(engine, OnnxRuntime) else _of_openvino(model)
    for names, operator, kind in kernels:
        for tag in TAG.findall(names):
            yield int(tag), operator, kind


def _of_onnxruntime(model: bytes) -> Iterator[tuple[str, str, str]]:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = 1
    with tempfile.TemporaryDirectory(prefix="lowbit-") as folder:
        path = Path(folder) / "optimized.onnx"
        options.optimized_model_filepath = str(path)
        options.add_session_config_entry("session.optimized_model_external_initializers_file_name", "weights")
        onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
        graph = onnx.load(path, load_external_data=False).graph
    for node in _all_nodes(graph):
        if _INTEGER.match(node.op_type):
            yield node.name, node.op_type, INTEGERS
        elif node.op_type in ("MatMulNBits", "GatherBlockQuantized"):
            level = next((a.i for a in node.attribute if a.name == "accuracy_level"), 0)
            if level == _ACCURACY:
                yield node.name, node.op_type, BY_BLOCK


def _all_nodes(graph: onnx.GraphProto) -> Iterator[onnx.NodeProto]:
    for node in graph.node:
        yield node
        for attribute in node.attribute:
            yield from _all_nodes(attribute.g)


def _of_openvino(model: bytes) -> Iterator[tuple[str, str, str]]:
    import openvino

    core = openvino.Core()
    compiled = core.compile_model(core.read_model(model), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    for operator in compiled.get_runtime_model().get_ordered_ops():
        facts = operator.get_rt_info()
        read = {
            key: facts[key].astype(str)
            for key in ("layerType", "runtimePrecision", "primitiveType", "originalLayersNames")
            if key in facts
        }
        # A FullyConnected whose weights alone are int8 says i8 too; its primitive is a float one.
        if read.get("runtimePrecision") in ("u8", "i8") and not read.get("primitiveType", "").endswith("f32"):
            yield read.get("originalLayersNames", ""), read.get("layerType", ""), INTEGERS
