"""An LSTM whose products are in integers, step by step, as onnxruntime's DynamicQuantizeLSTM computes it.

    gates of step t = q(x)[t] · Wᵀ + q(h[t−1]) · Rᵀ + b

q rounds to uint8 between the least and the greatest value: of all steps of x together, and of the states of each step,
where all sequences of a batch are taken together. Gates and states are float. With one thread the two agree to float
rounding; with more, onnxruntime splits a batch and each part has its own range.
"""

from typing import Any

import torch
from torch import Tensor, nn

from lowbit.network.operators_recurrent import Outputs, lstm
from lowbit.network.operators_shape import reverse_sequence
from lowbit.network.quantizers import FakeQuant
from lowbit.recipe import TensorSpec


class DynamicLSTM(nn.Module):
    """Takes the place of the operator; without its quantizer it is the operator."""

    def __init__(self, spec: TensorSpec) -> None:
        super().__init__()
        self.quantizer = FakeQuant(spec, ())

    def forward(
        self,
        x: Tensor,
        w: Tensor,
        r: Tensor,
        b: Tensor | None = None,
        sequence_lens: Tensor | None = None,
        *initial: Tensor | None,
        outputs: int = 1,
        direction: str = "forward",
        **settled: Any,
    ) -> Outputs:
        """Inputs and outputs as ONNX has them."""
        if self.quantizer.mode != "quantize":
            return lstm(x, w, r, b, sequence_lens, *initial, outputs=outputs, direction=direction, **settled)
        lengths = torch.full((x.shape[1],), len(x)) if sequence_lens is None else sequence_lens
        longest = int(lengths.max()) if len(lengths) else 0  # steps behind it are not read, so not in the range of x
        found = []
        for d in range(len(w)):
            zeros = x.new_zeros(x.shape[1], r.shape[2])
            h, c = (zeros if state is None else state[d] for state in [*initial, None, None][:2])
            backwards = d == 1 or direction == "reverse"
            steps = reverse_sequence(x, lengths) if backwards else x
            y, *last = self._direction(steps[:longest], w[d], r[d], None if b is None else b[d], lengths, h, c)
            y = torch.cat([y, y.new_zeros(len(x) - longest, *y.shape[1:])])
            found.append((reverse_sequence(y, lengths) if backwards else y, *last))
        y, h, c = (torch.stack(parts, axis) for parts, axis in zip(zip(*found, strict=True), (1, 0, 0), strict=True))
        return y if outputs == 1 else (y, h, c)

    def _direction(
        self, x: Tensor, w: Tensor, r: Tensor, b: Tensor | None, lengths: Tensor, h: Tensor, c: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """All steps in order; a sequence that has ended keeps its state, and gives and quantizes 0."""
        inputs = self.quantizer(x) @ w.T + (0 if b is None else sum(b.chunk(2)))
        y = [x.new_zeros(0, *h.shape)]
        for t, input_gates in enumerate(inputs):
            runs = (lengths > t)[:, None]
            i, o, f, g = (input_gates + self.quantizer(torch.where(runs, h, 0)) @ r.T).chunk(4, 1)
            cell = f.sigmoid() * c + i.sigmoid() * g.tanh()
            state = o.sigmoid() * cell.tanh()
            h, c = torch.where(runs, state, h), torch.where(runs, cell, c)
            y.append(torch.where(runs, state, 0)[None])
        empty = (lengths == 0)[:, None]
        return torch.cat(y), torch.where(empty, 0, h), torch.where(empty, 0, c)
