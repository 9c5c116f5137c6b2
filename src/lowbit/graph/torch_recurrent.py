"""torch's recurrent layers on their way through its exporter: what has to be in place while one runs.

LSTM, GRU   torch translates them itself. Once per process: the export leaves a kernel in the operator's dispatch cache
            that unrolls the next one over time, whose length is then fixed (seen with torch 2.13)
RNN         torch unrolls it and has no translation: it gets ONNX's RNN here
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch


@contextlib.contextmanager
def recurrent_operators() -> Iterator[None]:
    """Every export inside finds the dispatcher as the first one of a process does; RNN is not unrolled."""
    aten = torch.ops.aten
    traced = torch._C.DispatchKey.CompositeImplicitAutograd
    plain = (aten.rnn_tanh.input, aten.rnn_relu.input)
    every = (aten.lstm.input, aten.gru.input, *plain)
    before = [operator.py_kernels.get(traced) for operator in plain]
    for operator in every:
        operator._dispatch_cache.clear()
    for operator in plain:
        operator.py_kernels[traced] = _shapes_of_rnn
    try:
        yield
    finally:
        for operator, kernel in zip(plain, before, strict=True):
            if kernel is None:
                del operator.py_kernels[traced]
            else:
                operator.py_kernels[traced] = kernel
        for operator in every:
            operator._dispatch_cache.clear()


def translations() -> dict[Callable[..., Any], Callable[..., Any]]:
    """torch operator → function that writes ONNX, for those that torch's exporter has none for."""
    aten = torch.ops.aten
    return {aten.rnn_tanh.input: _writer_of_rnn("Tanh"), aten.rnn_relu.input: _writer_of_rnn("Relu")}


def _shapes_of_rnn(
    input: torch.Tensor,
    hx: torch.Tensor,
    params: Sequence[torch.Tensor],
    has_biases: bool,
    num_layers: int,
    dropout: float,
    train: bool,
    bidirectional: bool,
    batch_first: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """What the exporter has to know of an RNN: the shapes of its results."""
    width = hx.shape[-1] * (2 if bidirectional else 1)
    return input.new_empty((*input.shape[:-1], width)), torch.empty_like(hx)


def _writer_of_rnn(activation: str) -> Callable[..., Any]:
    def write(
        input: Any, hx: Any, params: Sequence[Any], has_biases: bool, num_layers: int, dropout: float, train: bool,
        bidirectional: bool, batch_first: bool,
    ) -> Any:  # fmt: skip
        return _write_rnn(activation, input, hx, params, has_biases, num_layers, bidirectional, batch_first)

    return write


def _write_rnn(
    activation: str,
    input: Any,
    hx: Any,
    params: Sequence[Any],
    has_biases: bool,
    num_layers: int,
    bidirectional: bool,
    batch_first: bool,
) -> tuple[Any, Any]:
    """One ONNX RNN for each layer.

    input    (time, batch, features), or (batch, time, features)
    hx       (layers · directions, batch, hidden)
    params   W (hidden, features), R (hidden, hidden) and their biases, for each direction of each layer
    return   (time, batch, directions · hidden), in the input's order; the last states, as hx
    """
    from onnxscript import opset18 as op

    directions, each = (2 if bidirectional else 1), (4 if has_biases else 2)
    x = op.Transpose(input, perm=[1, 0, 2]) if batch_first else input
    last_states = []
    for layer in range(num_layers):
        first = layer * directions
        own = [params[(first + d) * each : (first + d + 1) * each] for d in range(directions)]
        w, r = (op.Concat(*(op.Unsqueeze(p[k], [0]) for p in own), axis=0) for k in (0, 1))
        biases = [op.Unsqueeze(op.Concat(p[2], p[3], axis=0), [0]) for p in own] if has_biases else []
        state = op.Slice(hx, [first], [first + directions], [0])
        y, last = op.RNN(
            x,
            w,
            r,
            op.Concat(*biases, axis=0) if biases else None,
            initial_h=state,
            activations=[activation] * directions,
            direction="bidirectional" if bidirectional else "forward",
            hidden_size=hx.shape[2],
        )
        last_states.append(last)
        # (time, directions, batch, hidden) → (time, batch, directions · hidden)
        x = op.Reshape(op.Transpose(y, perm=[0, 2, 1, 3]), op.Constant(value_ints=[0, 0, -1]))
    states = last_states[0] if num_layers == 1 else op.Concat(*last_states, axis=0)
    return (op.Transpose(x, perm=[1, 0, 2]) if batch_first else x), states
