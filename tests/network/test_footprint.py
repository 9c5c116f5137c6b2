"""Memory of a sample on its way: weights are no part of it, whether a quantizer stands on them or not."""

import numpy as np
import torch
from toy_networks import network

from lowbit.network.footprint import footprint
from lowbit.network.network import Network
from lowbit.network.place import place
from lowbit.presets import find_recipe


def test_a_large_weight_takes_nothing_of_a_sample():
    text = "g (float[n, 64] x) => (float[n, 64] y) { p = MatMul(x, v) q = Tanh(p) y = MatMul(q, w) }"
    constants = {"v": np.ones((64, 2000)), "w": np.ones((2000, 64))}
    model = network(text, **constants)
    sample = [torch.ones(1, 64)]
    quantized = Network(model.program, place(model.program, find_recipe("int8-weights")))
    exact = Network(model.program, place(model.program, find_recipe("int8-weights").keep_float("*")))
    # 2 × 2000 and 64 numbers for 64; with two weights of 512 kB it was 2,032: GPTQ got few samples of MiniLM.
    assert footprint(quantized.module, sample).alive == footprint(exact.module, sample).alive < 70
