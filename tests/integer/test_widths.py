"""Weights of 2 to 8 bits and activations of 8 or 16: the reference, its C, and onnxruntime on the same file."""

from pathlib import Path

import numpy as np
import pytest
from compiled import codes_of, program_of, reference_bytes, run_c
from small_networks import mobile, residual
from test_sequences import transformer
from toy_networks import convolutions, images, sqnr_db

import lowbit as lb
from lowbit.engines.compile import ENGINES
from lowbit.errors import UnsupportedError
from lowbit.integer.engine import IntegerReference
from lowbit.integer.program import Conv
from lowbit.model import Model
from lowbit.recipe import PREPARE, Recipe, Rule, TensorSpec

NETWORKS = {
    "convolutions": lambda: (convolutions(), {"x": images()}),
    "mobile": mobile,
    "residual": residual,
    "transformer": transformer,
}


def quantized(model: Model, batch: dict[str, np.ndarray], bits: int, activations: str) -> Model:
    spec = TensorSpec(f"int{bits} channel:0", "minmax")
    return lb.quantize(model, batch, Recipe((Rule("*", spec, TensorSpec(activations, "minmax")),), PREPARE, "integer"))


@pytest.mark.parametrize("name", NETWORKS)
def test_16_bit_activations_are_70_db_from_onnxruntime_and_the_same_bytes_in_c(name: str, tmp_path: Path):
    model, batch = NETWORKS[name]()
    file = quantized(model, batch, 8, "int16")
    program = program_of(file)
    assert {t.bits for t in program.tensors()} == {16}
    ours, theirs = (engine.compile(file.program)(batch) for engine in (IntegerReference(), ENGINES["onnxruntime"]))
    for port, values in theirs.items():
        assert sqnr_db(values, ours[port]) > 70  # measured 78.9 (transformer) to exact (residual); 8 bits: 30 to 40
    codes = codes_of(program, {key: array[:8] for key, array in batch.items()})
    sanitized = ["-fsanitize=undefined,address", "-fno-sanitize-recover"]
    assert run_c(program, codes, tmp_path, "gcc", *sanitized) == reference_bytes(program, codes)


@pytest.mark.parametrize(
    ("bits", "activations"),
    [
        (3, "uint8"),
        *(pytest.param(b, a, marks=pytest.mark.slow) for b in (2, 5, 6, 7) for a in ("uint8", "int16")),
    ],
)
def test_weights_of_each_width_stay_within_it_and_give_the_same_bytes_in_c(bits: int, activations: str, tmp_path: Path):
    file = quantized(convolutions(), {"x": images()}, bits, activations)
    program = program_of(file)
    weights = [layer.weight for layer in program.layers if isinstance(layer, Conv)]
    assert len(weights) == 3
    assert max(int(np.abs(weight).max()) for weight in weights) in range(2 ** (bits - 1) - 1, 2 ** (bits - 1) + 1)
    codes = codes_of(program, {"x": images(8)})
    assert run_c(program, codes, tmp_path) == reference_bytes(program, codes)
    ours, theirs = (e.compile(file.program)({"x": images()}) for e in (IntegerReference(), ENGINES["onnxruntime"]))
    assert np.abs(ours["logits"] - theirs["logits"]).max() < 1.5 * program.outputs[0].scale


def test_16_bit_codes_are_not_rounded_twice():
    file = quantized(convolutions(), {"x": images()}, 8, "int16")
    with pytest.raises(UnsupportedError, match="has 16-bit codes, which are rounded once"):
        program_of(file, "twice")
