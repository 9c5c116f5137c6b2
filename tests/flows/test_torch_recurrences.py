"""Recurrent networks as torch exports them, in `int8-dynamic`: the file runs at other lengths than the example."""

import numpy as np
import pytest
import torch
from torch import nn
from toy_networks import sqnr_db

import lowbit as lb
from lowbit.engines.read_back import read_back

pytestmark = pytest.mark.slow  # torch's exporter takes 2 s for each


class Behind(nn.Module):
    """Layers over (time, batch, 24) and a layer behind them."""

    def __init__(self, layers: nn.RNNBase) -> None:
        super().__init__()
        width = layers.hidden_size * (1 + layers.bidirectional)
        self.layers, self.head = layers, nn.Linear(width, 10)

    def forward(self, x):
        return self.head(self.layers(x)[0])


class Cell(nn.Module):
    """One step from a state that is given, as a network that runs sample by sample has it."""

    def __init__(self, cell: nn.RNNCellBase) -> None:
        super().__init__()
        self.cell, self.head = cell, nn.Linear(48, 10)

    def forward(self, x, h):
        state = self.cell(x, (h, h)) if isinstance(self.cell, nn.LSTMCell) else self.cell(x, h)
        return self.head(state[0] if isinstance(state, tuple) else state)


LAYERS = {
    "stacked GRU of 400": (lambda: nn.GRU(24, 400, 2), ["DynamicQuantizeMatMul"]),
    "bidirectional LSTM": (lambda: nn.LSTM(24, 48, 2, bidirectional=True), ["DynamicQuantizeLSTM"]),
    "RNN of 256": (lambda: nn.RNN(24, 256), ["DynamicQuantizeMatMul"]),
    "small GRU": (lambda: nn.GRU(24, 48), []),
}


@pytest.mark.parametrize(("make", "kernels"), LAYERS.values(), ids=LAYERS)
def test_layers_run_at_other_lengths(make, kernels):
    torch.manual_seed(0)
    model = lb.load(Behind(make()).eval(), torch.zeros(7, 2, 24))
    quantized = lb.quantize(model, None, "int8-dynamic")
    layers = [node.name for node in model.program.graph if node.op_type in ("LSTM", "GRU", "RNN")]
    found = read_back(quantized.program, "onnxruntime").operators
    assert [found[name] for name in layers if name in found] == kernels * len(layers)
    for steps in (1, 7, 30):
        x = {"x": np.random.default_rng(steps).normal(size=(steps, 2, 24)).astype(np.float32)}
        assert sqnr_db(model.run(x)["output"], quantized.run(x)["output"]) > 30


@pytest.mark.parametrize("kind", [nn.LSTMCell, nn.GRUCell, nn.RNNCell])
def test_cells_multiply_in_integers(kind):
    torch.manual_seed(0)
    model = lb.load(Cell(kind(24, 48)).eval(), (torch.zeros(2, 24), torch.zeros(2, 48)))
    quantized = lb.quantize(model, None, "int8-dynamic")
    found = [op for op in read_back(quantized.program, "onnxruntime").operators.values() if "MatMul" in op]
    assert len(found) >= 3  # of x, of the state, and behind the cell
    rng = np.random.default_rng(0)
    for count in (1, 5):
        batch = {"x": rng.normal(size=(count, 24)), "h": np.tanh(rng.normal(size=(count, 48)))}
        batch = {name: array.astype(np.float32) for name, array in batch.items()}
        assert sqnr_db(model.run(batch)["output"], quantized.run(batch)["output"]) > 30
