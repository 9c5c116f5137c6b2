"""Recurrent networks in `int8-dynamic`: float, lowbit's file and onnxruntime's own dynamic quantizer, in turn.

`python -m benchmarks.recurrent [NETWORK …]`: ms of processor time of one call (medians, one thread, batch 1; the mean
of two sessions of each file), SQNR of the outputs against float, bytes as a share of float's.
`--cells [--states 64,400]` times one layer instead: in float, its int8 weights expanded at load, and its products in
integers, whichever of them lowbit would choose.

gru       two GRUs of 400, 161 inputs, gains before their sigmoid: the shape of a noise suppressor; random weights
lstm      two bidirectional LSTMs of 128, 64 inputs; random weights
silero    voice activity detection; the network gets float's state at each frame of the recording
charlstm  a character model of two LSTMs; its evaluation text
"""

import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from itertools import islice
from pathlib import Path
from types import MappingProxyType

import numpy as np
import torch
from examples import characters, voice_activity
from torch import Tensor, nn

import lowbit as lb
from benchmarks import peers
from benchmarks.networks import FOLDER
from benchmarks.tables import arguments, show
from benchmarks.timing import alternating
from lowbit import targets
from lowbit.engines.compile import ENGINES, Batch
from lowbit.flows.fidelity import Closeness

LENGTHS = (1, 10, 100)
STATES = (64, 128, 256, 320, 400, 800)
Made = tuple[lb.Model, list[Batch]]  # a network, and inputs to time and to compare with


class Layers(nn.Module):
    """Recurrent layers over (time, batch, inputs), and a number for each input behind them."""

    def __init__(self, layers: nn.Module, states: int, inputs: int) -> None:
        super().__init__()
        self.layers, self.behind = layers, nn.Linear(states, inputs)

    def forward(self, x: Tensor) -> Tensor:
        gains: Tensor = self.behind(self.layers(x)[0])
        return gains


def _layers(layers: nn.RNNBase, lengths: tuple[int, ...] = LENGTHS) -> Made:
    torch.manual_seed(0)
    for parameter in layers.parameters():
        nn.init.uniform_(parameter, -(layers.hidden_size**-0.5), layers.hidden_size**-0.5)
    module = Layers(layers, layers.hidden_size * (1 + layers.bidirectional), layers.input_size)
    model, random = lb.load(module.eval(), torch.zeros(7, 1, layers.input_size)), np.random.default_rng(0)
    shapes = [(steps, 1, layers.input_size) for steps in lengths]
    return model, [{model.inputs[0].name: random.normal(size=shape).astype(np.float32)} for shape in shapes]


def silero() -> Made:
    model = lb.load(FOLDER / "speech/silero_vad_16k_op15.onnx")
    return model, [inputs for inputs, _ in islice(voice_activity.heard(model), 0, None, 8)]


def charlstm() -> Made:
    model = lb.load(FOLDER / "text/charlstm-charlotte_bronte.onnx")
    return model, [{model.inputs[0].name: ids} for ids in islice(characters.calibration(), 40)]


NETWORKS: Mapping[str, Callable[[], Made]] = MappingProxyType(
    {
        "gru": lambda: _layers(nn.GRU(161, 400, 2)),
        "lstm": lambda: _layers(nn.LSTM(64, 128, 2, bidirectional=True)),
        "silero": silero,
        "charlstm": charlstm,
    }
)


def compared(name: str, seconds: float) -> Iterator[dict[str, object]]:
    """A row for each length of the inputs; networks with one length get one, over all inputs."""
    model, batches = NETWORKS[name]()
    with tempfile.TemporaryDirectory(prefix="lowbit-") as folder:
        files = {kind: Path(folder) / f"{kind}.onnx" for kind in ("float", "lowbit", "peer")}
        model.save(files["float"])
        lb.quantize(model, None, "int8-dynamic").save(files["lowbit"])
        peers.onnxruntime_dynamic(files["float"], files["peer"])
        # Two sessions of one file differ by up to 2 % with their places in memory and in the round. Rounds go forth and
        # back: in this order float, which leaves the caches cold, stands as often before either of the others.
        order = ("float", "lowbit", "peer", "lowbit again", "peer again", "float again")
        sessions = {key: ENGINES["onnxruntime"].compile(files[key.split()[0]], threads=1) for key in order}
        runs = {kind: sessions[kind] for kind in files}
        sizes = {kind: file.stat().st_size for kind, file in files.items()}
        groups = [[batch] for batch in batches] if name in ("gru", "lstm") else [batches]
        for group in groups:
            times = alternating({key: partial(run, group[0]) for key, run in sessions.items()}, seconds=seconds)
            row: dict[str, object] = {"network": name, "input": str(next(iter(group[0].values())).shape)}
            row |= {f"{kind} ms": (times[kind] + times[f"{kind} again"]) / 2 for kind in files}
            for kind in ("lowbit", "peer"):
                closeness = Closeness()
                for batch in group:
                    exact, rough = runs["float"](batch), runs[kind](batch)
                    output = next(iter(exact))
                    closeness.add(exact[output], rough[output], None)
                row[f"{kind} dB"] = closeness.fidelity(kind).sqnr_db
            yield row | {f"{kind} bytes": sizes[kind] / sizes["float"] for kind in ("lowbit", "peer")}


@contextmanager
def _integers_from(states: int) -> Iterator[None]:
    """Recurrent layers in integers from that many states on, whatever the targets say."""
    before = targets.TARGETS
    targets.TARGETS = MappingProxyType(
        {name: replace(t, dynamic=dict.fromkeys(t.dynamic, states)) for name, t in before.items()}
    )
    try:
        yield
    finally:
        targets.TARGETS = before


def cell(kind: type[nn.GRU | nn.RNN], states: int, seconds: float) -> Iterator[dict[str, object]]:
    """A row for each length in time: one layer of 161 inputs."""
    model, batches = _layers(kind(161, states))
    files = {"float": model}
    for name, least in (("expanded", 10**6), ("integers", 1)):
        with _integers_from(least):
            files[name] = lb.quantize(model, None, "int8-dynamic")
    runs = {name: ENGINES["onnxruntime"].compile(file.program, threads=1) for name, file in files.items()}
    for steps, batch in zip(LENGTHS, batches, strict=True):
        times = alternating({name: partial(run, batch) for name, run in runs.items()}, seconds=seconds)
        row: dict[str, object] = {"layer": kind.__name__, "states": states, "steps": steps}
        yield row | {f"{name} ms": time for name, time in times.items()}


def main(arguments_given: list[str] | None = None) -> None:
    parser = arguments(__doc__ or "", list(NETWORKS))
    parser.add_argument("--cells", action="store_true", help="one layer, in float and in both forms of int8")
    parser.add_argument("--states", default=",".join(map(str, STATES)), help="with --cells: of the layers")
    parser.add_argument("--seconds", type=float, default=1.0, help="to time each row for")
    given = parser.parse_args(arguments_given)
    torch.set_num_threads(1)
    if given.cells:
        kinds, states = (nn.GRU, nn.RNN), [int(number) for number in given.states.split(",")]
        rows = [row for kind in kinds for count in states for row in cell(kind, count, given.seconds)]
        show("One recurrent layer of 161 inputs, batch 1, one thread, ms of processor time", rows, given.json)
        return
    rows = [row for name in given.networks or NETWORKS for row in compared(name, given.seconds)]
    show("int8-dynamic, batch 1, one thread, ms of processor time; the peer is onnxruntime's", rows, given.json)


if __name__ == "__main__":
    main()
