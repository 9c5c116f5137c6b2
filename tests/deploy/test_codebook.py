"""Shared weights as codes and tables: onnxruntime computes what was meant."""

import ml_dtypes
import numpy as np
import onnx_ir as ir
import pytest

import lowbit as lb
from lowbit.deploy.codebook import fewer_mantissa_bits, write_codebook
from lowbit.engines.compile import ENGINES
from lowbit.errors import UnsupportedError


def program(weight: np.ndarray) -> ir.Model:
    """y = x · w"""
    tensor = ir.tensor(weight, name="w")
    w = ir.Value(name="w", shape=ir.Shape(weight.shape), type=ir.TensorType(tensor.dtype), const_value=tensor)
    x = ir.Value(name="x", shape=ir.Shape(["n", len(weight)]), type=ir.TensorType(ir.DataType.FLOAT))
    node = ir.node("MatMul", [x, w], name="m")
    y = node.outputs[0]
    y.name, y.shape, y.type = "y", ir.Shape(["n", weight.shape[1]]), ir.TensorType(ir.DataType.FLOAT)
    graph = ir.Graph([x], [y], nodes=[node], initializers=[w], opset_imports={"": 21}, name="g")
    return ir.Model(graph, ir_version=10)


@pytest.mark.parametrize("engine", ["onnxruntime", "openvino"])
@pytest.mark.parametrize(("count", "groups"), [(2, 1), (16, 1), (17, 1), (256, 1), (16, 4), (100, 8)])
def test_engines_expand_codes_and_tables(engine: str, count: int, groups: int) -> None:
    rng = np.random.default_rng(count)
    codes = rng.integers(0, count, (32, 24)).astype(np.uint8)
    tables = rng.normal(size=(groups, count)).astype(np.float32)
    dense = tables[np.arange(32)[:, None] // (32 // groups), codes]
    written = program(dense)
    stored = write_codebook(written, "w", codes, tables)
    assert stored == (32 * 24 // 2 if count <= 16 else 32 * 24, 4 * count * groups)
    x = rng.normal(size=(5, 32)).astype(np.float32)
    assert np.allclose(ENGINES[engine].compile(written)({"x": x})["y"], x @ dense, atol=1e-4)


def test_a_codebook_of_more_than_256_values_is_refused() -> None:
    weight = np.zeros((32, 24), np.float32)
    with pytest.raises(UnsupportedError, match="'w' cannot be written as codes: 300 values"):
        write_codebook(program(weight), "w", weight.astype(np.uint8), np.zeros((1, 300), np.float32))


def test_seven_mantissa_bits_are_bfloat16() -> None:
    numbers = np.random.default_rng(0).normal(0, 3, 10_000).astype(np.float32)
    numbers = np.concatenate([numbers, np.float32([0, -0.0, 1, 1.00390625, 1.01171875, 1e-30, -3e38])])
    assert np.array_equal(fewer_mantissa_bits(numbers, 7), numbers.astype(ml_dtypes.bfloat16).astype(np.float32))
    assert np.array_equal(fewer_mantissa_bits(numbers, 23), numbers)


def test_a_compressed_file_loads_with_its_weights_folded() -> None:
    codes = np.random.default_rng(0).integers(0, 8, (32, 24)).astype(np.uint8)
    written = program(np.zeros((32, 24), np.float32))
    write_codebook(written, "w", codes, np.arange(8, dtype=np.float32).reshape(1, 8))
    x = np.ones((1, 32), np.float32)
    assert np.allclose(lb.load(written).run({"x": x})["y"], codes.sum(axis=0))
