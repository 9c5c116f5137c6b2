"""An LSTM, GRU or RNN that multiplies in integers, step by step, as what is deployed computes it.

    gates of step t = q(x)[t] · Wᵀ + q(h[t−1]) · Rᵀ + b

Measured   q rounds to uint8 between the least and the greatest value: of all steps of x together, and of the states of
           each step, where all sequences of a batch are taken together. Gates and states are float. An LSTM is
           onnxruntime's DynamicQuantizeLSTM: with one thread the two agree to float rounding; with more, onnxruntime
           splits a batch and each part has its own range. A GRU or RNN is a Scan of MatMulInteger (`deploy/scan.py`).
Fixed      the quantizer in front has rounded x; h and an LSTM's c have formats with a scale of their own, in which each
           step hands them on. Gates are float. A target that computes so names the formats (`Target.states`).
"""

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from lowbit.network.operators_recurrent import gru, lstm, rnn
from lowbit.network.quantizers import FakeQuant
from lowbit.network.recurrent_steps import Outputs, Rounding, gru_steps, in_steps, lstm_steps, rnn_steps
from lowbit.numerics import scale_and_zero
from lowbit.recipe import TensorSpec

STEPS: Mapping[Any, Callable[..., Any]] = MappingProxyType({lstm: lstm_steps, gru: gru_steps, rnn: rnn_steps})


class QuantizedRecurrence(nn.Module):
    """Takes the place of an operator, a key of STEPS; without its quantizers it is the operator.

    read     of what the products read, where its range is measured
    states   by name, h and an LSTM's c, where their scales are fixed; a state in float has no quantizer
    """

    def __init__(
        self,
        operator: Callable[..., Outputs],
        read: TensorSpec | None,
        states: Mapping[str, TensorSpec] = MappingProxyType({}),
    ) -> None:
        super().__init__()
        self.operator = operator
        self.read = None if read is None else FakeQuant(read, ())
        self.states = nn.ModuleDict({name: _state_quantizer(spec) for name, spec in states.items()})

    def forward(self, *inputs: Tensor | None, **how: Any) -> Outputs:
        """Inputs, attributes and outputs as ONNX has them."""
        quantizers = [m for m in (self.read, *self.states.values()) if isinstance(m, FakeQuant)]
        if all(quantizer.mode != "quantize" for quantizer in quantizers):
            return self.operator(*inputs, **how)
        rounding = Rounding(**self.states) if self.read is None else Rounding(x=self.read, factor=self.read)
        return in_steps(STEPS[self.operator], rounding, *inputs, **how)  # type: ignore[arg-type]


def _state_quantizer(spec: TensorSpec) -> nn.Module:
    if spec.format is None:
        return nn.Identity()
    quantizer = FakeQuant(spec, ())
    if not quantizer.dynamic:
        scale, zero = scale_and_zero(torch.zeros(1, 1), torch.ones(1, 1), spec.format)  # any range has this scale
        quantizer.set_parameters(scale.reshape(()), zero.reshape(()))
    return quantizer
