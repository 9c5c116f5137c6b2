"""Inputs and dimensions that are always the same: what they decide is computed when the network is loaded."""

import numpy as np
import onnx
import pytest
from real_models import batch_for

from lowbit.errors import InputError, ShapeError
from lowbit.model import Model, load


def operators(model: Model) -> set[str]:
    return {node.op_type for node in model.program.graph.all_nodes()}


def test_a_network_that_branches_on_its_input_becomes_flat(data):
    path = data / "speech/silero_vad_16k_op15.onnx"
    batch = batch_for(path)
    model = load(path)
    assert "If" in operators(model)
    flat = load(path, fixed={"sr": 16000, "sequence": 576})
    assert not {"If", "Shape"} & operators(flat)
    assert [port.name for port in flat.inputs] == ["input", "state"]
    result = flat.run({name: batch[name] for name in ("input", "state")})
    for name, wanted in model.run(batch).items():
        assert np.array_equal(result[name], wanted)


CHOICE = """<ir_version: 10, opset_import: ["" : 21]> g (float[N] x, bool c) => (float[N] y) {
    a = Neg (x)
    y = If (c) <then_branch = yes () => (float[1] p) { p = Constant <value = float[1] {7.0}> () },
                else_branch = no () => (float[N] q) { a = Abs (x) q = Add (a, x) }> }"""


@pytest.mark.parametrize(("choice", "wanted"), [(True, [7.0]), (False, [6.0, 0.0])], ids=["constant", "computed"])
def test_the_branch_that_is_taken_computes_what_the_if_did(choice, wanted):
    """Its values may be called as others outside are, and a branch may be a constant alone."""
    flat = load(onnx.parser.parse_model(CHOICE), fixed={"c": choice})
    assert "If" not in operators(flat)
    assert flat.run({"x": np.float32([3, -2])})["y"].tolist() == wanted
    assert [port.name for port in flat.outputs] == ["y"]


def test_what_does_not_exist_or_fit_is_refused(data):
    path = data / "speech/silero_vad_16k_op15.onnx"
    with pytest.raises(InputError, match="no input and no dimension of an input is called 'rate'; the inputs are"):
        load(path, fixed={"rate": 1})
    with pytest.raises(ShapeError, match=r"'state' of shape .* cannot be fixed to a value of shape \(2, 3\)"):
        load(path, fixed={"state": np.zeros((2, 3), np.float32)})
