"""Each reason for which a layer stays in float is said, with its operator."""

import numpy as np
import pytest
from toy_networks import network

from lowbit.network.place import place
from lowbit.presets import RECIPES

CONV = np.random.default_rng(0).normal(size=(4, 4, 1, 1))
MATRIX = np.random.default_rng(0).normal(size=(8, 8))
REASONS = {  # nodes between two layers in integers → node, reason
    "m = Clip (a, low)": ("clip_2", "Clip at computed bounds, which no range can absorb"),
    "m = MatMul (a, a)": ("matmul_2", "MatMul of two activations, which target 'onnxruntime' computes in float"),
    "m = MatMul (a, v)": ("matmul_2", "MatMul with a vector, which is not worth an integer kernel"),
    "f = Flatten (a) m = Gemm <alpha = 0.5> (f, w)": (
        "gemm_3",
        "Gemm with alpha, beta or transA, for which there is no integer kernel",
    ),
    "f = Flatten (a) m = Gemm (f, w, one)": (
        "gemm_3",
        "Gemm without a bias of its own, one number an output (pass 'fuse_gemm' makes one)",
    ),
    "m = Add (a, mask)": (
        "add_2",
        "Add with a constant of 1e8 or more, as in a mask, which must not stretch a range",
    ),
    "m = Pad (a, pads, mask)": (
        "pad_2",
        "Pad with a constant of 1e8 or more, as in a mask, which must not stretch a range",
    ),
}
CONSTANTS = {
    "v": MATRIX[0],
    "w": MATRIX,
    "one": np.ones(1),
    "mask": np.float32(-1e9),
    "pads": np.zeros(8, np.int64),
}


@pytest.mark.parametrize("nodes", REASONS)
def test_the_reason_names_the_operator(nodes):
    read = {name: array for name, array in CONSTANTS.items() if f", {name}" in nodes}
    model = network(
        f"t (float[N,4,8,8] x) => (float y) {{ low = ReduceMin <keepdims = 0> (x) a = Conv (x, c) {nodes} "
        "y = Conv (m, c2) }",
        c=CONV,
        c2=CONV,
        **read,
    )
    placement = place(model.program, RECIPES["int8"]("onnxruntime"))
    node, reason = REASONS[nodes]
    assert placement.float_reasons[node] == reason
    assert node not in placement.integer


def test_a_layer_of_which_only_weights_are_asked_for_gives_no_reason():
    model = network("t (float[N,4,8,8] x) => (float y) { y = Conv (x, c) }", c=np.ones((32, 4, 3, 3)))
    placement = place(model.program, RECIPES["int8-weights"]("onnxruntime"))
    assert set(placement.sites) == {"c"}
    assert not placement.float_reasons
    assert not placement.integer
