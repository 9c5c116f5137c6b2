"""What only moves values between two integer kernels runs on the integers, read off the engine's own graph."""

import numpy as np
import pytest
from test_silu import operators
from toy_networks import network

import lowbit as lb

RNG = np.random.default_rng(0)
X = RNG.normal(size=(16, 4, 8, 8)).astype(np.float32)
MOVES = {
    "Gather <axis = 3> (a, index)": np.array([0, 2, 3]),
    "GatherElements <axis = 3> (a, index)": np.zeros((16, 4, 8, 2), np.int64),
    "ReduceMax <keepdims = 1> (a, index)": np.array([3]),
}


@pytest.mark.parametrize("node", MOVES)
def test_between_two_convolutions_nothing_is_converted(node):
    model = network(
        f"t (float[16,4,8,8] x) => (float y) {{ a = Conv (x, w) m = {node} y = Conv (m, u) }}",
        w=RNG.normal(size=(4, 4, 1, 1)),
        u=RNG.normal(size=(4, 4, 1, 1)),
        index=MOVES[node],
    )
    found = operators(lb.quantize(model, X, "int8-fast"))
    assert (found["QuantizeLinear"], found["DequantizeLinear"], found["QLinearConv"]) == (1, 1, 2)
