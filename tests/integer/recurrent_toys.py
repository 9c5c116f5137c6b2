"""Recurrent layers of 24 states over 12 steps of 10 inputs, in every form that has one in integers."""

import numpy as np
from toy_networks import network

from lowbit.model import Model

RECURRENT = {
    "LSTM": ("float[M,1,24] y, float[D,1,24] h, float[D,1,24] c", "y, h, c = LSTM <hidden_size = 24> (x, w, r, b)"),
    "LSTM with states": (
        "float[M,1,24] y, float[D,1,24] h, float[D,1,24] c",
        "y, h, c = LSTM <hidden_size = 24> (x, w, r, b, , h0, c0)",
    ),
    "LSTM in both directions": (
        "float[M,2,1,24] y",
        'y, h, c = LSTM <hidden_size = 24, direction = "bidirectional"> (x, w, r, b)',
    ),
    "GRU": ("float[M,1,24] y, float[D,1,24] h", "y, h = GRU <hidden_size = 24, linear_before_reset = 1> (x, w, r, b)"),
    "GRU with its reset before": ("float[M,1,24] y, float[D,1,24] h", "y, h = GRU <hidden_size = 24> (x, w, r, b)"),
    "GRU with its reset before and a state": (
        "float[M,1,24] y, float[D,1,24] h",
        "y, h = GRU <hidden_size = 24> (x, w, r, b, , h0)",
    ),
    "RNN": ("float[M,1,24] y, float[D,1,24] h", "y, h = RNN <hidden_size = 24> (x, w, r, b)"),
    "GRU backwards": (
        "float[D,1,24] h",
        'y, h = GRU <hidden_size = 24, linear_before_reset = 1, direction = "reverse"> (x, w, r, b)',
    ),
}


def recurrent(case: str) -> tuple[Model, list[dict[str, np.ndarray]]]:
    """The network of a case of RECURRENT, and eight samples."""
    outputs, body = RECURRENT[case]
    gates, directions = {"GRU": 3, "RNN": 1, "LSTM": 4}[case.split()[0]], 2 if "both" in case else 1
    states = ", float[1,1,24] h0" * ("state" in case) + ", float[1,1,24] c0" * ("states" in case)
    outputs = outputs.replace("M,1,24", "12,1,1,24").replace("M,2", "12,2").replace("D", str(directions))
    rng = np.random.default_rng(0)
    weights = {
        "w": rng.normal(size=(directions, gates * 24, 10)) / 2,
        "r": rng.normal(size=(directions, gates * 24, 24)) / 4,
        "b": rng.normal(size=(directions, 2 * gates * 24)) / 8,
    }
    model = network(f"f (float[12,1,10] x{states}) => ({outputs}) {{ {body} }}", **weights)
    sizes = {port.name: [d if isinstance(d, int) else 1 for d in port.shape] for port in model.inputs}
    samples = [{name: rng.uniform(-1, 1, s).astype(np.float32) for name, s in sizes.items()} for _ in range(8)]
    return model, samples
