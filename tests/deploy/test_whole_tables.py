"""Weights in a table of whole numbers: few bits in the file, integer kernels in the engine."""

import numpy as np
import pytest
import torch
from toy_networks import convolutions, images, sqnr_db

import lowbit as lb
from lowbit.metadata import from_text
from lowbit.numerics import E2M1, Codebook, Int, KMeans, quantize
from lowbit.numerics.grids import LLOYD_VALUES, is_whole

DISTORTION = {2: 0.1175, 3: 0.03454, 4: 0.009497, 5: 0.002499}  # Max 1960, table I: mean squared error, variance 1


def with_weights(word: str) -> lb.Recipe:
    return lb.Recipe((lb.Rule("*", word, lb.TensorSpec("uint8", "minmax")),), ("fuse_gemm",))


@pytest.mark.parametrize("bits", [2, 3, 4, 5])
def test_the_file_looks_its_integers_up_and_every_layer_computes_with_them(bits):
    model, x = convolutions(), images()
    quantized = lb.quantize(model, x, with_weights(f"lloyd{bits} channel:0"))
    rows = [row for row in from_text(quantized.metadata["lowbit.ledger"]) if row["role"] == "weight"]
    assert [row["arithmetic"] for row in rows] == ["integers"] * 3  # read back from onnxruntime's own graph
    held = [v.const_value for v in quantized.program.graph.initializers.values()]
    codes = sum(t.nbytes for t in held if t.size > 64 and t.dtype.bitwidth <= 8)
    values = sum(w.size for w in (v.const_value for v in model.program.graph.initializers.values()) if len(w.shape) > 1)
    assert codes <= values * bits / 8 + 8
    assert sqnr_db(model.run({"x": x})["logits"], quantized.run({"x": x})["logits"]) > 5.0 * bits - 5


@pytest.mark.parametrize("bits", [2, 3, 4, 5])
def test_normal_weights_come_as_near_as_max_1960_says(bits):
    weight = torch.randn(1, 200_000, generator=torch.Generator().manual_seed(0))
    kind = lb.parse_format(f"lloyd{bits}")
    largest = {2: 1.510, 3: 2.152, 4: 2.733, 5: 3.263}[bits]
    stored = quantize(weight, kind, (torch.tensor([[-largest]]), torch.tensor([[largest]])))
    error = float((weight - stored.dequantize()).square().mean())
    assert error == pytest.approx(DISTORTION[bits], rel=0.03)  # levels are rounded to 127ths


def test_these_grids_are_whole():
    assert all(is_whole(Codebook(values)) for values in LLOYD_VALUES.values())
    assert is_whole(Int(4))
    assert is_whole(Codebook((-1.0, 1.0)))
    assert not is_whole(E2M1)  # it has halves
    assert not is_whole(KMeans(4))  # its values are not known yet
    assert not is_whole(Codebook((0.0, 128.0)))
    assert np.all(np.array(LLOYD_VALUES[4]) == -np.array(LLOYD_VALUES[4])[::-1])
