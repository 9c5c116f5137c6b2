"""Equalization as a step: what it gains where channels differ, what it leaves alone, and that the file has it."""

import numpy as np
from toy_networks import network, sqnr_db

import lowbit as lb
from lowbit.model import Model
from lowbit.recipe import PREPARE

RNG = np.random.default_rng(0)
SPREAD = np.geomspace(0.02, 1, 8)  # of the channels between the layers
BY_TENSOR = lb.Rule("*", lb.TensorSpec("int8", "minmax"), lb.TensorSpec("uint8", "minmax"))


def depthwise(clip: str = "Relu (h)", **constants: float) -> Model:
    """A depthwise layer between two pointwise ones, whose channels differ 50-fold."""
    shape = (8, 1, 1, 1)
    return network(
        f"""
        d (float[N,3,8,8] x) => (float[N,5,6,6] y) {{
            h = Conv (x, w1, b1)
            r = {clip}
            k = Conv <group = 8> (r, w2, b2)
            s = Relu (k)
            y = Conv (s, w3, b3)
        }}""",
        w1=RNG.normal(size=(8, 3, 1, 1)) * SPREAD.reshape(shape),
        b1=0.1 * SPREAD,
        w2=RNG.normal(size=(8, 1, 3, 3)) / SPREAD.reshape(shape),
        b2=np.zeros(8),
        w3=RNG.normal(size=(5, 8, 1, 1)),
        b3=np.zeros(5),
        **{name: np.array(value) for name, value in constants.items()},
    )


def quality(model: Model, *steps: str) -> tuple[float, str]:
    """dB of the file in onnxruntime on other samples, and the notes."""
    x = RNG.normal(size=(64, 3, 8, 8)).astype(np.float32)
    quantized = lb.quantize(model, x, lb.Recipe((BY_TENSOR,), (*PREPARE, *steps)))
    other = {"x": RNG.normal(size=(64, 3, 8, 8)).astype(np.float32)}
    return sqnr_db(model.run(other)["y"], quantized.run(other)["y"]), quantized.metadata["lowbit.passes"]


def test_channels_that_differ_fifty_fold_fit_one_scale_after_equalizing():
    model = depthwise()
    before, _ = quality(model)
    after, notes = quality(model, "equalize")
    assert "equalized the output channels of 2 layers" in notes
    assert after > before + 6  # dB


def test_a_channel_at_the_ceiling_keeps_its_factor_and_the_others_stay_below_it():
    """Channels of 0.02 to 1 times N(0, 3) under a ceiling of 1.5: the large ones reach it."""
    model = depthwise("Clip (h, zero, top)", zero=0.0, top=1.5)
    x = RNG.normal(size=(64, 3, 8, 8)).astype(np.float32)
    rules = (BY_TENSOR,)
    plain, moved = (lb.simulation(model, x, lb.Recipe(rules, (*PREPARE, *steps))) for steps in ((), ("equalize",)))
    one = {"x": x[32:40]}  # the first 16 judge
    assert moved.program is not plain.program
    after = Model(moved.program, "moved").run(one)["y"]
    assert np.abs(after - model.run(one)["y"]).max() < 1e-4 * np.abs(after).max()
    assert (
        float(next(v for v in moved.program.graph.initializers.values() if v.name == "top").const_value.numpy()) == 1.5
    )


def test_without_ceilings_the_clip_rises_to_what_one_channel_needs():
    model = depthwise("Clip (h, zero, top)", zero=0.0, top=6.0)
    before, _ = quality(model)
    after, notes = quality(model, "equalize_without_ceilings")
    assert "and raised their ceilings" in notes
    assert after > before + 6  # dB


def test_a_network_in_which_nothing_can_move_is_left_as_it_is():
    model = network(
        "d (float[N,4] x) => (float[N,4] y) { h = MatMul (x, w)  y = Sigmoid (h) }", w=RNG.normal(size=(4, 4))
    )
    x = RNG.normal(size=(64, 4)).astype(np.float32)
    quantized = lb.quantize(model, x, lb.Recipe((BY_TENSOR,), (*PREPARE, "equalize", "equalize_without_ceilings")))
    assert "equalized" not in quantized.metadata["lowbit.passes"]
