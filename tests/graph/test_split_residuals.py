"""Residuals keep their own format where the layers beside them read fewer bits."""

import numpy as np
import torch
from toy_networks import network

import lowbit as lb
from lowbit.graph.layer import layer_names
from lowbit.graph.split_residuals import split_residuals
from lowbit.model import Model, load

RNG = np.random.default_rng(0)
X = RNG.normal(size=(64, 3, 8, 8)).astype(np.float32)


def residual_network() -> Model:
    """x → conv1 → relu = a; a + conv3(relu(conv2(a))) → relu → conv4 → logits."""
    return network(
        """
        toy (float[N,3,8,8] x) => (float[N,4] logits) {
            p = Conv <pads = [1,1,1,1]> (x, w1, b1)
            a = Relu (p)
            q = Conv <pads = [1,1,1,1]> (a, w2, b1)
            b = Relu (q)
            c = Conv <pads = [1,1,1,1]> (b, w3, b1)
            d = Add (a, c)
            e = Relu (d)
            f = Conv (e, w4, b1)
            g = GlobalAveragePool (f)
            h = Flatten (g)
            logits = Gemm <transB = 1> (h, fc, b5)
        }""",
        w1=RNG.normal(size=(8, 3, 3, 3)) / 5,
        b1=RNG.normal(size=8) / 10,
        w2=RNG.normal(size=(8, 8, 3, 3)) / 8,
        w3=RNG.normal(size=(8, 8, 3, 3)) / 8,
        w4=RNG.normal(size=(8, 8, 3, 3)) / 8,
        fc=RNG.normal(size=(4, 8)),
        b5=RNG.normal(size=4) / 10,
    )


def test_layers_read_a_copy_of_what_a_residual_reads_and_nothing_changes():
    model = residual_network()
    before = model.run({"x": X})["logits"]
    done = split_residuals(model.program)
    assert list(done) == ["layers read a copy of 'a', which a residual reads too"]
    assert np.array_equal(model.run({"x": X})["logits"], before)
    nodes = {node.name: node for node in model.program.graph}
    assert nodes["conv_2"].inputs[0].name == "a_copy"
    assert {v.name for v in nodes["add_5"].inputs} == {"a", "c"}


def test_rules_reach_the_sum_its_clip_and_the_layer_in_front_of_it():
    named = {n.name for n in residual_network().program.graph if "at:residual" in layer_names(n)}
    assert named == {"conv_4", "add_5", "relu_6"}


def test_a_residual_keeps_8_bits_where_layers_read_2_and_all_of_it_runs_in_integers(tmp_path):
    prepared = lb.prepare(residual_network(), X, "w2a2")
    bits = {name: q.format.grid.bits for name, q in prepared.network.activations().items()}
    assert {name: bits[name] for name in ("a_copy", "b")} == {"a_copy": 2, "b": 2}
    assert {bits[name] for name in ("x", "a", "c", "e")} == {8}
    lb.convert(prepared).save(tmp_path / "net.onnx")
    deployed = load(tmp_path / "net.onnx")
    with torch.no_grad():
        trained = prepared.eval()(torch.from_numpy(X))["logits"].numpy()
    off = np.square(deployed.run({"x": X})["logits"] - trained).sum() / np.square(trained).sum()
    assert off < 1e-3  # measured 3e-5: one code of 2 bits on the other side of a tie
