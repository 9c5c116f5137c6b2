"""Layers that int8 costs too much: which are left in float, and that a good file always comes out."""

import numpy as np
import pytest
from test_output_errors import calibrated, in_batches
from toy_networks import images, network, sqnr_db

import lowbit as lb
from lowbit.metadata import from_text
from lowbit.model import Model
from lowbit.repair import leave_in_float as module
from lowbit.repair.wider import layers_around


def wide_range(spread: float) -> Model:
    """conv → relu → conv → relu → conv; channel 0 of the first is `spread` times as large and read with 1/spread."""
    rng = np.random.default_rng(0)
    first, second = rng.normal(size=(8, 3, 3, 3)) / 5, rng.normal(size=(8, 8, 3, 3)) / 8
    first[0] *= spread
    second[:, 0] /= spread
    return network(
        """
        wide (float[N,3,8,8] x) => (float[N,4,8,8] y) {
            a = Conv <pads = [1,1,1,1]> (x, w1)
            b = Relu (a)
            c = Conv <pads = [1,1,1,1]> (b, w2)
            d = Relu (c)
            y = Conv <pads = [1,1,1,1]> (d, w3)
        }""",
        w1=first,
        w2=second,
        w3=rng.normal(size=(4, 8, 3, 3)) / 8,
    )


def test_the_layer_before_an_absorbed_clip_is_around_the_value_and_the_clip_is_no_layer():
    model = wide_range(1.0)
    simulation = calibrated(model, in_batches(images(32)))
    names = layers_around(simulation.program, simulation.placement, "b")
    assert names == ["conv_0", "conv_2"]


def test_a_network_that_int8_ruins_ends_in_a_file_that_does_its_job():
    model, x = wide_range(3000.0), images(96)
    quantized = lb.quantize(model, x)
    plain = lb.quantize(model, x, "int8-fast")
    exact = model.run({"x": x})["y"]
    assert sqnr_db(exact, plain.run({"x": x})["y"]) < 17
    assert sqnr_db(exact, quantized.run({"x": x})["y"]) > 17
    assert "left in float, as they cost most" in quantized.metadata["lowbit.passes"]
    assert any(row.get("reason") == "by rule" for row in from_text(quantized.metadata["lowbit.ledger"]))


@pytest.mark.parametrize("tolerance", [1e-3, 1e-5, 1e-9])
def test_however_much_is_asked_a_file_comes_out_that_is_no_worse(tolerance, monkeypatch):
    model, x = wide_range(1.0), images(48)
    exact = model.run({"x": x})["y"]
    before = sqnr_db(exact, lb.quantize(model, x).run({"x": x})["y"])
    monkeypatch.setattr(module, "TOLERANCE", tolerance)
    assert sqnr_db(exact, lb.quantize(model, x).run({"x": x})["y"]) > before - 1
