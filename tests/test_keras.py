"""A Keras model, exported by Keras itself (torch backend, a process of its own), is quantized: docs/frameworks.md."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import lowbit as lb

ROOT = Path(__file__).parents[1]
PROGRAM = """
import numpy as np
import keras
from keras import layers

keras.utils.set_random_seed(0)
net = keras.Sequential([
    keras.Input((28, 28, 1)),
    layers.Conv2D(16, 3, padding="same", activation="relu"),
    layers.BatchNormalization(),
    layers.MaxPooling2D(),
    layers.SeparableConv2D(32, 3, activation="relu"),
    layers.GlobalAveragePooling2D(),
    layers.Dense(10),
])
x = np.random.default_rng(0).random((32, 28, 28, 1), np.float32)
np.savez("data.npz", x=x, y=net.predict(x, verbose=0))  # Keras exports only what has been called once
net.export("net.onnx", format="onnx", verbose=False)
"""


pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def exported(tmp_path_factory) -> Path:
    if importlib.util.find_spec("keras") is None:
        pytest.skip("keras is not installed: pip install 'lowbit[test]'")
    folder = tmp_path_factory.mktemp("keras")
    told = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        cwd=folder,
        env=os.environ | {"KERAS_BACKEND": "torch"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert told.returncode == 0, told.stderr
    return folder


def test_a_keras_model_computes_the_same_as_a_file_of_its_own(exported):
    model = lb.load(exported / "net.onnx")
    assert model.inputs[0].shape == ("batch", 28, 28, 1)
    with np.load(exported / "data.npz") as found:
        outputs = model.run({model.inputs[0].name: found["x"]})
        np.testing.assert_allclose(next(iter(outputs.values())), found["y"], atol=1e-5)


def test_a_keras_model_quantizes_and_its_layers_run_in_integers(exported):
    with np.load(exported / "data.npz") as found:
        x, y = found["x"], found["y"]
    quantized = lb.quantize(exported / "net.onnx", x)
    stored = {str(v.const_value.dtype) for v in quantized.program.graph.initializers.values()}
    assert "INT8" in stored
    outputs = quantized.run({quantized.inputs[0].name: x})
    noise = np.square(next(iter(outputs.values())) - y).sum() / np.square(y).sum()
    assert 10 * np.log10(1 / noise) > 25
