"""Fewer bits of mantissa: still float32."""

import ml_dtypes
import numpy as np
import torch

from lowbit.numerics.mantissa import fewer_mantissa_bits


def test_seven_mantissa_bits_are_bfloat16():
    numbers = np.random.default_rng(0).normal(0, 3, 10_000).astype(np.float32)
    numbers = np.concatenate([numbers, np.float32([0, -0.0, 1, 1.00390625, 1.01171875, 1e-30, -3e38])])
    rounded = fewer_mantissa_bits(torch.from_numpy(numbers), 7).numpy()
    assert np.array_equal(rounded, numbers.astype(ml_dtypes.bfloat16).astype(np.float32))
    assert np.array_equal(fewer_mantissa_bits(torch.from_numpy(numbers), 23).numpy(), numbers)


def test_a_scalar_stays_a_scalar():
    assert fewer_mantissa_bits(torch.tensor(1.1), 2).tolist() == 1.0
