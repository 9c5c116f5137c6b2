"""Shared weights as codes and tables: onnxruntime computes what was meant."""

import numpy as np
import onnx_ir as ir
import pytest

import lowbit as lb
from lowbit.deploy.write import StoredTensor, write
from lowbit.engines.compile import ENGINES
from lowbit.numerics import Format, KMeans, QuantTensor


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


def shared(codes: np.ndarray, tables: np.ndarray, bits: int) -> QuantTensor:
    return QuantTensor(codes, Format(KMeans(bits)), (len(codes) // len(tables), codes.shape[1]), None, table=tables)


@pytest.mark.parametrize("engine", ["onnxruntime", "openvino"])
@pytest.mark.parametrize(
    ("count", "bits", "groups"), [(2, 1, 1), (11, 4, 1), (17, 5, 1), (256, 8, 1), (16, 4, 4), (100, 7, 8)]
)
@pytest.mark.parametrize("whole", [True, False])
def test_engines_expand_codes_and_tables(engine: str, count: int, bits: int, groups: int, whole: bool) -> None:
    rng = np.random.default_rng(count)
    codes = rng.integers(0, count, (32, 24)).astype(np.uint8)
    tables = rng.normal(size=(groups, count)).astype(np.float32)
    dense = tables[np.arange(32)[:, None] // (32 // groups), codes]
    written = write(program(dense), [StoredTensor("w", shared(codes, tables, bits))], whole_codes=whole)
    held = [v.const_value for n, v in written.graph.initializers.items() if n.startswith("w_codes")]
    bits_stored = (4 if count <= 16 else 8) if whole else bits  # one code an element is what an entropy coder wants
    assert sum(tensor.nbytes for tensor in held) == 32 * 24 * bits_stored // 8
    assert len(held) == 1 or not whole
    x = rng.normal(size=(5, 32)).astype(np.float32)
    assert np.allclose(ENGINES[engine].compile(written)({"x": x})["y"], x @ dense, atol=1e-4)


def test_a_compressed_file_loads_with_its_weights_folded() -> None:
    codes = np.random.default_rng(0).integers(0, 8, (32, 24)).astype(np.uint8)
    tables = np.arange(8, dtype=np.float32).reshape(1, 8)
    before = program(np.zeros((32, 24), np.float32))
    written = write(before, [StoredTensor("w", shared(codes, tables, 3))])
    x = np.ones((1, 32), np.float32)
    assert np.allclose(lb.load(written).run({"x": x})["y"], codes.sum(axis=0))
    assert list(before.graph.initializers) == ["w"]  # what is read is left alone
