"""An LSTM, GRU or RNN whose products are in integers, step by step, as the deployed file computes it.

    gates of step t = q(x)[t] · Wᵀ + q(h[t−1]) · Rᵀ + b

q rounds to uint8 between the least and the greatest value: of all steps of x together, and of the states of each step,
where all sequences of a batch are taken together. Gates and states are float. An LSTM is onnxruntime's
DynamicQuantizeLSTM: with one thread the two agree to float rounding; with more, onnxruntime splits a batch and each
part has its own range. A GRU or RNN is a Scan of MatMulInteger (`deploy/scan.py`).
"""

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

from torch import Tensor, nn

from lowbit.network.operators_recurrent import gru, lstm, rnn
from lowbit.network.quantizers import FakeQuant
from lowbit.network.recurrent_steps import Outputs, gru_steps, in_steps, lstm_steps, rnn_steps
from lowbit.recipe import TensorSpec

STEPS: Mapping[Any, Callable[..., Any]] = MappingProxyType({lstm: lstm_steps, gru: gru_steps, rnn: rnn_steps})


class DynamicRecurrence(nn.Module):
    """Takes the place of an operator, a key of STEPS; without its quantizer it is the operator."""

    def __init__(self, operator: Callable[..., Outputs], spec: TensorSpec) -> None:
        super().__init__()
        self.operator, self.quantizer = operator, FakeQuant(spec, ())

    def forward(self, *inputs: Tensor | None, **how: Any) -> Outputs:
        """Inputs, attributes and outputs as ONNX has them."""
        if self.quantizer.mode != "quantize":
            return self.operator(*inputs, **how)
        return in_steps(STEPS[self.operator], self.quantizer, *inputs, **how)  # type: ignore[arg-type]
