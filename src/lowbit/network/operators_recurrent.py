"""LSTM, GRU and RNN of the standard form, by torch's fused kernels.

The standard form has its default activations (an RNN may have Relu), no clipping, no peepholes and no coupled gates.
Every other form runs in onnxruntime (`engine_node`). Torch has no kernel of a GRU whose reset comes before the
recurrent product: it is computed step by step.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import onnx_ir as ir
import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

from lowbit.network.operators_shape import reverse_sequence
from lowbit.network.recurrent_steps import Outputs, Rounding, batch_first, gru_steps, in_steps

_STANDARD = {"LSTM": (("Sigmoid", "Tanh", "Tanh"),), "GRU": (("Sigmoid", "Tanh"),), "RNN": (("Tanh",), ("Relu",))}
_ATTRIBUTES = {"activations", "direction", "hidden_size", "input_forget", "layout", "linear_before_reset"}
_PEEPHOLES = 7  # input of an LSTM


def is_standard(node: ir.Node) -> bool:
    """Whether an LSTM, GRU or RNN has the standard form."""
    how = node.attributes
    if not how.keys() <= _ATTRIBUTES or any(node.inputs[_PEEPHOLES:]) or how.get_int("input_forget", 0) != 0:
        return False
    directions = 2 if how.get_string("direction") == "bidirectional" else 1
    names = tuple(how.get_strings("activations", ()))
    return not names or names in [standard * directions for standard in _STANDARD[node.op_type]]


def lstm(*inputs: Tensor | None, outputs: int = 1, **how: Any) -> Outputs:
    return _layer(torch.lstm, (0, 2, 3, 1), *inputs, outputs=outputs, **how)  # type: ignore[arg-type]  # i o f c


def gru(*inputs: Tensor | None, outputs: int = 1, linear_before_reset: int = 0, **how: Any) -> Outputs:
    if not linear_before_reset:
        return in_steps(gru_steps, Rounding(), *inputs, outputs=outputs, **how)  # type: ignore[arg-type]
    return _layer(torch.gru, (1, 0, 2), *inputs, outputs=outputs, **how)  # type: ignore[arg-type]  # z r h → r z h


def rnn(*inputs: Tensor | None, activations: Sequence[str] = (), outputs: int = 1, **how: Any) -> Outputs:
    kernel = torch.rnn_relu if "Relu" in activations else torch.rnn_tanh
    return _layer(kernel, (0,), *inputs, outputs=outputs, **how)  # type: ignore[arg-type]


def _layer(
    kernel: Callable[..., Sequence[Tensor]],
    order: Sequence[int],
    x: Tensor,
    w: Tensor,
    r: Tensor,
    b: Tensor | None = None,
    sequence_lens: Tensor | None = None,
    *initial: Tensor | None,
    outputs: int,
    direction: str = "forward",
    layout: int = 0,
    **settled: Any,
) -> Outputs:
    """Inputs and outputs as ONNX has them.

    order    torch's gates, as places in ONNX's
    settled  attributes that the kernel and the weights imply
    """
    if layout:
        run = partial(_layer, kernel, order)
        return batch_first(run, x, w, r, b, sequence_lens, *initial, outputs=outputs, direction=direction, **settled)
    zeros = x.new_zeros(r.shape[0], x.shape[1], r.shape[2])
    given = [*initial, None, None][: 2 if kernel is torch.lstm else 1]
    states = [zeros if state is None else state.contiguous() for state in given]
    weights: list[Tensor] = []
    for d in range(len(w)):
        biases = () if b is None else b[d].chunk(2)
        weights += [_arranged(weight, order) for weight in (w[d], r[d], *biases)]
    constants = (weights, b is not None, 1, 0.0, False, len(w) == 2)
    reverse = direction == "reverse"
    if sequence_lens is None or bool((sequence_lens == len(x)).all()):
        x = x.flip(0) if reverse else x
        y, *last = kernel(x, states if len(states) > 1 else states[0], *constants, False)
        y = y.flip(0) if reverse else y
    else:  # ended sequences keep their state and give 0
        x = reverse_sequence(x, sequence_lens) if reverse else x
        runs = (sequence_lens > 0)[:, None]
        packed = pack_padded_sequence(x, sequence_lens.cpu().clamp(min=1), enforce_sorted=False)
        assert packed.sorted_indices is not None
        assert packed.unsorted_indices is not None
        states = [state[:, packed.sorted_indices] for state in states]
        y, *last = kernel(*packed[:2], states if len(states) > 1 else states[0], *constants)
        y, _ = pad_packed_sequence(PackedSequence(y, *packed[1:]), total_length=len(x))
        y = reverse_sequence(y, sequence_lens) if reverse else y
        # Torch packs no empty sequence: it runs one step here. Its outputs and last states are 0, as in onnxruntime.
        y, *last = (
            torch.where(runs, value, 0) for value in (y, *(state[:, packed.unsorted_indices] for state in last))
        )
    y = y.reshape(*y.shape[:2], *r.shape[::2]).transpose(1, 2)
    return y if outputs == 1 else (y, *last)


def _arranged(weight: Tensor, order: Sequence[int]) -> Tensor:
    """The gates of a weight or bias as torch orders them."""
    parts = weight.chunk(len(order))
    return torch.cat([parts[i] for i in order]) if len(order) > 1 else weight
