"""What stays float may be stored in float16: half the bytes, and the simulation rounds it too."""

from dataclasses import replace

import numpy as np
import pytest
from toy_networks import network

import lowbit as lb
from lowbit.errors import InputError
from lowbit.presets import find_recipe
from lowbit.recipe import Recipe


def model() -> lb.Model:
    """y = max(s · tanh(x · w), far); s and far have no quantizer."""
    rng = np.random.default_rng(0)
    far = np.where(np.arange(64) == 3, -3.4e38, 0.1)
    text = "g (float[n, 64] x) => (float[n, 64] y) { p = MatMul(x, w) t = Tanh(p) m = Mul(t, s) y = Max(m, far) }"
    return network(text, far=far, w=rng.standard_normal((64, 64)), s=rng.standard_normal(64))


def halved() -> lb.Model:
    return lb.quantize(model(), None, replace(find_recipe("int8-weights"), rest="float16"))


def test_constants_that_stay_float_take_two_bytes_and_compute_what_was_simulated():
    types = {v.name: v.const_value.dtype.name for v in halved().program.graph.initializers.values()}
    assert types["s"] == "FLOAT16"
    assert types["far"] == "FLOAT"  # −3.4e38 is beyond float16
    x = {"x": np.random.default_rng(1).standard_normal((4, 64)).astype(np.float32)}
    scales = model().program.graph.initializers["s"].const_value.numpy()
    apart = np.abs(halved().run(x)["y"] - lb.quantize(model(), None, "int8-weights").run(x)["y"]).max()
    assert 0 < apart < 0.02 * np.abs(scales).max()  # rounded to 11 bits


def test_rest_travels_in_the_recipe():
    recipe = replace(find_recipe("int8"), rest="float16")
    assert 'rest = "float16"' in recipe.to_toml()
    assert Recipe.from_toml(recipe.to_toml()) == recipe
    assert "rest" not in find_recipe("int8").to_toml()


def test_an_unknown_rest_is_told():
    with pytest.raises(InputError, match="rest='bfloat16' is none of 'float32', 'float16'"):
        replace(find_recipe("int8"), rest="bfloat16")
