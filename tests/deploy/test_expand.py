"""Every format as plain ONNX: onnxruntime computes the simulation's numbers, and the file has the format's bytes."""

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch

from lowbit.deploy.expand import expand
from lowbit.numerics import FORMATS, QuantTensor, parse_format, quantize


def program(stored: QuantTensor) -> bytes:
    """A file whose only output is the expanded tensor."""
    expansion = expand(stored, "w", "w_expanded")
    output = expansion.nodes[-1].outputs[0]
    graph = ir.Graph(
        [], [output], nodes=expansion.nodes, initializers=expansion.initializers, opset_imports={"": 21}, name="g"
    )
    proto = ir.to_proto(ir.Model(graph, ir_version=10))
    onnx.checker.check_model(proto, full_check=True)
    return proto.SerializeToString()


def run(file: bytes) -> np.ndarray:
    options = ort.SessionOptions()
    options.log_severity_level = 3
    return ort.InferenceSession(file, options, providers=["CPUExecutionProvider"]).run(None, {})[0]


def weights(*shape: int) -> torch.Tensor:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    return x * torch.exp(torch.randn(shape[0], *[1] * (len(shape) - 1), generator=torch.Generator().manual_seed(1)))


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("shape", [(24, 64), (7, 37)], ids=["even", "ragged"])
def test_the_engine_computes_what_was_simulated(name, shape):
    stored = quantize(weights(*shape), FORMATS[name])
    assert np.array_equal(run(program(stored)), stored.dequantize().numpy())


@pytest.mark.parametrize(
    "words",
    [
        "int5 group:3:1",
        "uint3 channel:1",
        "uint4 group:5:1",
        "int4 tile:2x3",
        "int4 channel:0 scale:2^-3",
        "codebook3 channel:0",
        "codebook2 group:4:1",
        "bases3 channel:0",
        "mxfp4 group:4:1",
        "int4 group:4:1 scale:fp16",
        "int12 element",
    ],
)
def test_blocks_of_every_kind_in_a_convolution(words):
    stored = quantize(weights(6, 8, 3, 3), parse_format(words))
    assert np.array_equal(run(program(stored)), stored.dequantize().numpy())


@pytest.mark.parametrize("name", FORMATS)
def test_a_million_weights_take_the_bits_of_their_format(name):
    stored = quantize(weights(1024, 1024), FORMATS[name])
    assert len(program(stored)) == pytest.approx(stored.bits / 8, rel=0.02)


def test_a_fixed_scale_takes_4_bytes_whatever_the_blocks():
    """As its bits say: 4 a weight. The blocks of 4 have 16,384 scales."""
    stored = quantize(weights(256, 256), parse_format("int4 group:4:1 scale:2^-2"))
    assert stored.bits == 4 * 256 * 256
    assert np.array_equal(run(program(stored)), stored.dequantize().numpy())
    (codes, scale) = expand(stored, "w", "w_expanded").initializers
    assert (codes.const_value.nbytes, scale.const_value.nbytes) == (4 * 256 * 256 // 8, 4)


@pytest.mark.parametrize("bits", range(1, 17))
def test_codes_of_any_width_come_back(bits):
    stored = quantize(weights(11, 13), parse_format(f"uint{bits}"))
    assert np.array_equal(run(program(stored)), stored.dequantize().numpy())


def test_the_engine_folds_the_expansion_when_it_loads(tmp_path):
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_BASIC
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    ort.InferenceSession(program(quantize(weights(64, 64), "mx6")), options, providers=["CPUExecutionProvider"])
    nodes = [node.op_type for node in onnx.load(tmp_path / "optimized.onnx").graph.node]
    assert len(nodes) <= 1
