"""Transformers and recurrent networks in integers only, for `python -m benchmarks.integers`.

silero       the LSTM of silero's voice detection (128 inputs and values), on its encoder's outputs for a recording:
             every second sequence of 32 frames calibrates, the others are measured
suppressor   the shape of a noise suppressor, exported from torch: two GRUs of 400, 161 inputs, and gains before their
             sigmoid; random weights and inputs
transformer  a torch encoder: 2 layers of 64 values, 4 heads, 16 tokens; random weights and inputs
charlstm     a character model: its two LSTMs and its head, over the rows of its table for 128 characters
minilm       the 6 layers of all-MiniLM-L6-v2 over 16 embedded tokens; STS-B sentences, those of the development part
             calibrate

`states_rows` simulates the recurrent ones with other states: float, 16 bits as in the integer program, and 8 bits: h in
steps of 2^-7, c of 2^-3, which is the range of the 16 bits.
"""

import subprocess
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import onnx
import torch
from examples import characters, sentences, voice_activity
from onnx import numpy_helper
from onnx.utils import Extractor
from torch import Tensor, nn

import lowbit as lb
from benchmarks.networks import FOLDER
from benchmarks.recurrent import Layers
from lowbit.deploy.export import export
from lowbit.deploy.proof import verify
from lowbit.engines.compile import ENGINES
from lowbit.graph.weights import constant
from lowbit.integer.c import write_c
from lowbit.integer.engine import IntegerReference, encode
from lowbit.integer.lower import lower
from lowbit.integer.reference import run
from lowbit.presets import find_recipe
from lowbit.recipe import PREPARE, Recipe, Rule, TensorSpec

Made = tuple[lb.Model, np.ndarray, np.ndarray]  # network, samples to calibrate on, samples to measure
_WIDE = Recipe((Rule("*", TensorSpec("int8 channel:0", "minmax"), TensorSpec("int16", "minmax")),), PREPARE, "integer")
LENGTH = 128  # characters of a sample
_RECORDED = "/model/encoder/3/activation/Relu_output_0"


class Recurrent(nn.Module):
    def __init__(self, layer: nn.LSTM) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        made: Tensor = self.layer(x.transpose(0, 1))[0].transpose(0, 1)
        return made


def silero() -> Made:
    network = lb.load(FOLDER / "speech/silero_vad_16k_op15.onnx")
    weights = {name: array for name, array in _initialisers(network).items() if name.startswith("model.decoder.rnn.")}
    layer = nn.LSTM(128, 128)
    layer.load_state_dict({f"{name.split('.')[-1]}_l0": torch.tensor(array) for name, array in weights.items()})
    session = ENGINES["onnxruntime"].compile(network.program, outputs=[_RECORDED])
    heard = [session(inputs)[_RECORDED].reshape(-1) for inputs, _ in voice_activity.heard(network)]
    whole = np.array(heard[: len(heard) // 32 * 32], np.float32).reshape(-1, 32, 128)
    return _loaded(Recurrent(layer), whole), whole[::2], whole[1::2]


def _initialisers(network: lb.Model) -> dict[str, np.ndarray]:
    found = ((str(name), constant(value)) for name, value in network.program.graph.initializers.items())
    return {name: array for name, array in found if array is not None}


def suppressor() -> Made:
    torch.manual_seed(0)
    layers = nn.GRU(161, 400, 2, batch_first=True)
    samples = np.random.default_rng(0).normal(size=(32, 50, 161)).astype(np.float32)
    return _loaded(Layers(layers, 400, 161), samples), samples[:16], samples[16:]


def charlstm() -> Made:
    program = onnx.shape_inference.infer_shapes(onnx.load(FOLDER / f"text/{characters.NAME}.onnx"))
    behind = Extractor(program).extract_model(["emb"], ["logits"])
    behind.graph.input[0].type.tensor_type.shape.dim[1].dim_value = LENGTH
    table = next(numpy_helper.to_array(t) for t in program.graph.initializer if t.name == "embedding.weight")
    parts = [characters.ids(part)[: 48 * LENGTH].reshape(48, LENGTH) for part in ("calib", "eval")]
    return lb.load(behind), table[parts[0]], table[parts[1][:32]]


def transformer() -> Made:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(64, 4, 128, dropout=0.0, activation="gelu", batch_first=True)
    module = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
    samples = np.random.default_rng(0).normal(size=(128, 16, 64)).astype(np.float32)
    return _loaded(module, samples), samples[:64], samples[64:]


class Encoder(nn.Module):
    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.encoder(x)[0]
        return result


def minilm() -> Made:
    from transformers import AutoModel

    model = AutoModel.from_pretrained(sentences.model_folder(), attn_implementation="eager").eval()
    parts = [
        np.concatenate(
            [ids["input_ids"][:, :16] for ids, _ in sentences.batches(part, 1) if len(ids["input_ids"][0]) >= 16]
        )
        for part in ("dev", "test")
    ]
    with torch.no_grad():
        embedded = [model.embeddings(torch.tensor(ids[:16])).numpy() for ids in parts]
    return _loaded(Encoder(model.encoder), embedded[0]), embedded[0], embedded[1]


def _loaded(module: nn.Module, samples: np.ndarray) -> lb.Model:
    return lb.load(module.eval(), torch.tensor(samples[:1]))


MAKERS: Mapping[str, Callable[[], Made]] = MappingProxyType(
    {
        **{"silero": silero, "suppressor": suppressor, "charlstm": charlstm},
        **{"transformer": transformer, "minilm": minilm},
    }
)
RECURRENT = ("silero", "suppressor", "charlstm")


def row(name: str) -> dict[str, Any]:
    """Decibels between float and: the file in onnxruntime, the integer reference, that with 16-bit activations."""
    network, calibration, samples = MAKERS[name]()
    port = network.inputs[0].name
    file = lb.quantize(network, {port: calibration}, target="integer")
    wide = lb.quantize(network, {port: calibration}, _WIDE)
    exact = network.run({port: samples})
    program = lower(file.program)
    codes = encode(samples, program.inputs[0])
    with tempfile.TemporaryDirectory(prefix="lowbit-") as folder:
        source = write_c(program, "net", main=True)
        (Path(folder) / "net.c").write_text(source.code)
        (Path(folder) / "net.h").write_text(source.header)
        subprocess.run(["gcc", "-std=c99", "-O3", "-march=native", "net.c", "-o", "net"], check=True, cwd=folder)
        binary = Path(folder) / "net"
        written = subprocess.run([binary], input=codes.tobytes(), capture_output=True, check=True).stdout
    own = run(program, {program.inputs[0].name: codes})[program.outputs[0].name]
    found = {
        "onnxruntime": file.run({port: samples}),
        "reference": IntegerReference().compile(file.program)({port: samples}),
        "16-bit activations": IntegerReference().compile(wide.program)({port: samples}),
    }
    return {
        **{"network": name, "samples": len(samples)},
        **{f"{key}, dB": _sqnr_db(exact, values) for key, values in found.items()},
        "C = reference": "every byte" if written == own.tobytes() else "DIFFERS",
        "arena": source.arena_bytes,
    }


def states_rows(name: str) -> Iterator[dict[str, Any]]:
    """Decibels between float and the simulation, with activations of 8 bits and of 16, by what holds the states.

    The layers with states of 16 bits are held against the integer reference, each given the reference's codes.
    """
    network, calibration, samples = MAKERS[name]()
    port, lstm = network.inputs[0].name, any(node.op_type == "LSTM" for node in network.program.graph)
    exact = network.run({port: samples})
    columns: dict[str, dict[str, str]] = {"float": {"h": "float", "c": "float"}, "16 bits": {}}
    columns |= {"h of 8 bits": {"h": "int8 scale:2^-7"}}
    columns |= {"h and c of 8 bits": {"h": "int8 scale:2^-7", "c": "int8 scale:2^-3"}} if lstm else {}
    for bits, recipe in ((8, find_recipe("int8", "integer")), (16, _WIDE)):
        found: dict[str, Any] = {"network": name, "activations": f"{bits} bits"}
        for column, formats in columns.items():
            rules = [Rule(f"state:*.{s}", activations=f) for s, f in formats.items() if lstm or s == "h"]
            simulation = lb.simulation(
                network, {port: calibration}, replace(recipe, rules=(*recipe.rules, *rules)), target="integer"
            )
            with simulation.mode("quantize"), torch.no_grad():
                made = simulation.module(torch.from_numpy(samples))
            found[f"{column}, dB"] = _sqnr_db(exact, {key: y.numpy() for key, y in made.items()})
            if not rules:
                ones = [{port: sample[None]} for sample in samples[:8]]
                parity = verify(simulation, export(simulation), ones, IntegerReference())
        yield found | {"16 bits: codes one step from the reference %": 100 * parity.one_step, "most": parity.worst[1]}


def _sqnr_db(exact: Mapping[str, np.ndarray], rough: Mapping[str, np.ndarray]) -> float:
    ((name, wanted),) = exact.items()
    noise = np.square(wanted.astype(np.float64) - rough[name]).sum()
    return float(10 * np.log10(np.square(wanted.astype(np.float64)).sum() / noise))
