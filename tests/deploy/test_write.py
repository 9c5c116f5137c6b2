"""What the written file holds: integers where they were asked for, the user's names, and nothing that nobody reads."""

import numpy as np
import onnx_ir as ir
import pytest
from toy_networks import network

from lowbit.deploy.write import ActivationTensor, BiasTensor, StoredTensor, write
from lowbit.engines.read_back import BY_BLOCK, INTEGERS
from lowbit.errors import InputError, UnsupportedError
from lowbit.model import Model
from lowbit.numerics import Format, Int, QuantTensor, channel, group

W = np.array([[1.0, -2.0], [0.5, 4.0], [3.0, 0.0]])  # (3 inputs, 2 outputs)


def product() -> Model:
    return network("m (float[N,3] x) => (float[N,2] y) { y = MatMul (x, w) }", w=W)


def activation(value: str, scale: float = 0.1, zero: int = 10, **more) -> ActivationTensor:
    return ActivationTensor(value, np.float32(scale), np.array(zero), Int(8, signed=False), **more)


def per_channel() -> StoredTensor:
    scale = np.array([[1 / 32, 1 / 16]], np.float32)
    stored = QuantTensor(np.rint(W / scale).astype(np.int8), Format(Int(8), channel(1)), (3, 1), scale)
    return StoredTensor("w", stored, arithmetic=INTEGERS)


def stored(program: ir.Model) -> dict[str, np.ndarray]:
    return {str(name): value.const_value.numpy() for name, value in program.graph.initializers.items()}


def test_a_weight_becomes_codes_scale_and_zero_and_the_float_is_gone():
    program = write(product().program, [per_channel()])
    assert set(stored(program)) == {"w_codes", "w_scale", "w_zero"}
    assert stored(program)["w_codes"].dtype == np.int8
    assert stored(program)["w_codes"].tolist() == [[32, -32], [16, 64], [96, 0]]
    x = np.eye(3, dtype=np.float32)
    assert Model(program).run({"x": x})["y"].tolist() == W.tolist()


def test_the_program_that_was_given_is_not_touched():
    model = product()
    write(model.program, [activation("x"), per_channel()])
    assert list(model.program.graph.initializers) == ["w"]
    assert [node.op_type for node in model.program.graph] == ["MatMul"]


def test_an_activation_is_rounded_to_the_nearest_code_and_cut_at_the_ends():
    program = write(product().program, [activation("x")])
    x = np.array([[0.14, 0.16, 99.0]], np.float32)  # codes 11, 12, 255 → 0.1, 0.2, 24.5
    assert np.allclose(Model(program).run({"x": x})["y"], np.array([[0.1, 0.2, 24.5]]) @ W, atol=1e-5)


def test_inputs_outputs_and_nodes_keep_their_names():
    program = write(product().program, [activation("x"), per_channel(), activation("y", 1.0, 128)])
    assert [value.name for value in program.graph.inputs] == ["x"]
    assert [value.name for value in program.graph.outputs] == ["y"]
    assert "matmul_0" in [node.name for node in program.graph]
    assert [node.op_type for node in program.graph if node.op_type.endswith("izeLinear")].count("QuantizeLinear") == 2


def test_only_the_readers_that_were_named_see_the_quantized_value():
    model = network("m (float[N,3] x) => (float[N,3] y, float[N,3] z) { y = Relu (x) z = Neg (x) }")
    program = write(model.program, [activation("x", readers=frozenset({("neg_1", 0)}))])
    found = Model(program).run({"x": np.array([[0.14, 0.16, 0.04]], np.float32)})
    assert found["y"].tolist() == [[np.float32(0.14), np.float32(0.16), np.float32(0.04)]]
    assert np.allclose(found["z"], [[-0.1, -0.2, 0.0]])


@pytest.mark.parametrize(
    ("bits", "signed", "dtype"),
    [(4, True, "INT8"), (3, False, "UINT8"), (8, False, "UINT8"), (9, False, "UINT16")],
)
def test_an_engine_computes_with_codes_in_8_or_16_bits(bits, signed, dtype):
    assert ActivationTensor("w", np.float32(1), np.array(0), Int(bits, signed)).dtype is ir.DataType[dtype]


def test_a_bias_has_codes_of_32_bits():
    model = network("m (float[N,2] x) => (float[N,2] y) { y = Add (x, b) }", b=np.zeros(2))
    program = write(model.program, [BiasTensor("b", np.array([1 << 20, -3]), np.array([0.5, 0.25]))])
    assert stored(program)["b_codes"].dtype == np.int32
    assert Model(program).run({"x": np.zeros((1, 2), np.float32)})["y"].tolist() == [[1 << 19, -0.75]]


def test_a_code_that_no_engine_computes_with_is_refused():
    with pytest.raises(InputError, match="bits must be 1 to 16"):
        ActivationTensor("w", np.float32(1), np.array(0), Int(20, signed=False))


def test_integers_are_not_quantized_again():
    model = network("m (int64[N,3] x) => (int64[N,3] y) { y = Neg (x) }")
    with pytest.raises(UnsupportedError, match=r"'x' has type .*only float32"):
        write(model.program, [activation("x")])


def test_a_relu_in_front_of_unsigned_codes_costs_nothing():
    """Codes that start at 0 already cut below 0: the Relu is dropped from the file, and its name with it."""
    model = network("m (float[N,3] x) => (float[N,3] z) { y = Relu (x) z = Neg (y) }")
    program = write(model.program, [activation("y", zero=0)])
    assert "Relu" not in [node.op_type for node in program.graph]
    found = Model(program).run({"x": np.array([[-5.0, 0.0, 0.2]], np.float32)})["z"]
    assert np.allclose(found, [[0, 0, -0.2]])


def test_blocks_of_weights_have_a_scale_each():
    rng = np.random.default_rng(0)
    weight = rng.normal(size=(64, 8))
    model = network("m (float[N,64] x) => (float[N,8] y) { y = MatMul (x, w) }", w=weight)
    scale = (np.abs(weight).reshape(2, 32, 8).max(1) / 7).astype(np.float32)
    codes = np.rint(weight.reshape(2, 32, 8) / scale[:, None]).reshape(64, 8)
    blocks = QuantTensor(codes.astype(np.int8), Format(Int(4), group(32, axis=0)), (32, 1), scale)
    program = write(model.program, [StoredTensor("w", blocks, arithmetic=BY_BLOCK)])
    exact = (codes.reshape(2, 32, 8) * scale[:, None]).reshape(64, 8)
    assert np.allclose(Model(program).run({"x": np.eye(64, dtype=np.float32)})["y"], exact, atol=1e-6)
