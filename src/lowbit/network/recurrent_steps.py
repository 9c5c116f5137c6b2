"""LSTM, GRU and RNN of the standard form, one step after the other, as ONNX defines them.

What a product reads can be rounded first: x once for all its steps, and the states at each step. So can the states that
a step hands on.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from lowbit.errors import DataError
from lowbit.network.operators_shape import reverse_sequence

Outputs = Tensor | tuple[Tensor, ...]
States = tuple[Tensor, ...]


def _as_it_is(x: Tensor) -> Tensor:
    return x


@dataclass(frozen=True)
class Rounding:
    """What a layer rounds.

    h, c     the states that it begins with, and those that each step hands on; h also a GRU's r·h before its product
    x        what W is multiplied with, all steps together
    factor   what R is multiplied with, where the states themselves are not rounded
    """

    h: Callable[[Tensor], Tensor] = _as_it_is
    c: Callable[[Tensor], Tensor] = _as_it_is
    x: Callable[[Tensor], Tensor] = _as_it_is
    factor: Callable[[Tensor], Tensor] = _as_it_is


@dataclass(frozen=True)
class Direction:
    """What one direction of a layer computes with; x and the states are in the order of its steps.

    round    what is rounded, and to what
    x        (time, batch, inputs)
    w, r     (gates, inputs) and (gates, states)
    biases   of W and of R, (gates,) each
    lengths  (batch,) steps of each sequence
    states   that it begins with, (batch, states) each
    """

    round: Rounding
    x: Tensor
    w: Tensor
    r: Tensor
    biases: Sequence[Tensor]
    lengths: Tensor
    states: Sequence[Tensor]


def in_steps(
    run: Callable[..., tuple[Tensor, States]],
    rounding: Rounding,
    x: Tensor,
    w: Tensor,
    r: Tensor,
    b: Tensor | None = None,
    sequence_lens: Tensor | None = None,
    *initial: Tensor | None,
    outputs: int = 1,
    direction: str = "forward",
    layout: int = 0,
    **how: Any,
) -> Outputs:
    """Inputs and outputs as ONNX has them.

    run   `lstm_steps`, `gru_steps` or `rnn_steps`
    """
    if layout:
        return batch_first(partial(in_steps, run, rounding), x, w, r, b, sequence_lens, *initial, outputs=outputs,
                           direction=direction, **how)  # fmt: skip
    every = torch.full((x.shape[1],), len(x), device=x.device)
    lengths = every if sequence_lens is None else sequence_lens.to(x.device)
    if bool(((lengths < 0) | (lengths > len(x))).any()):
        raise DataError(f"a sequence length lies outside 0 to {len(x)}, the number of steps: {lengths.tolist()}.")
    count = 2 if run is lstm_steps else 1
    zeros = x.new_zeros(x.shape[1], r.shape[2])
    found = []
    for d in range(len(w)):
        given = [zeros if state is None else state[d] for state in [*initial, None, None][:count]]
        states = [kept(state) for kept, state in zip((rounding.h, rounding.c), given, strict=False)]
        backwards = d == 1 or direction == "reverse"
        steps = reverse_sequence(x, lengths) if backwards else x
        biases = (x.new_zeros(2 * w.shape[1]) if b is None else b[d]).chunk(2)
        y, last = run(Direction(rounding, steps, w[d], r[d], biases, lengths, states), **how)
        found.append((reverse_sequence(y, lengths) if backwards else y, *last))
    joined = tuple(torch.stack(parts, 0 if i else 1) for i, parts in enumerate(zip(*found, strict=True)))
    return joined[0] if outputs == 1 else joined


def batch_first(run: Callable[..., Outputs], x: Tensor, *inputs: Tensor | None, **how: Any) -> Outputs:
    """`run`, which has layout 0, with inputs and outputs in layout 1; inputs as ONNX has them behind x."""
    first = (None if state is None else state.transpose(0, 1) for state in inputs[4:])
    made = run(x.transpose(0, 1), *inputs[:4], *first, **how)
    if isinstance(made, Tensor):
        return made.permute(2, 0, 1, 3)
    return made[0].permute(2, 0, 1, 3), *(state.transpose(0, 1) for state in made[1:])


def lstm_steps(given: Direction, **settled: Any) -> tuple[Tensor, States]:
    """All steps in order; a sequence that has ended keeps its states, and gives and rounds 0.

    As DynamicQuantizeLSTM has it: steps behind the longest sequence are not read, so they are not in the range of x.
    """
    x, lengths, (h, c), rounding = given.x, given.lengths, given.states, given.round
    longest = int(lengths.max()) if len(lengths) else 0
    inputs = rounding.x(x[:longest]) @ given.w.T + sum(given.biases)
    y = [x.new_zeros(0, *h.shape)]
    for t, input_gates in enumerate(inputs):
        runs = (lengths > t)[:, None]
        i, o, f, g = (input_gates + rounding.factor(torch.where(runs, h, 0)) @ given.r.T).chunk(4, 1)
        cell = rounding.c(f.sigmoid() * c + i.sigmoid() * g.tanh())
        state = rounding.h(o.sigmoid() * cell.tanh())
        h, c = torch.where(runs, state, h), torch.where(runs, cell, c)
        y.append(torch.where(runs, state, 0)[None])
    empty = (lengths == 0)[:, None]
    y.append(x.new_zeros(len(x) - longest, *h.shape))
    return torch.cat(y), (torch.where(empty, 0, h), torch.where(empty, 0, c))


def gru_steps(given: Direction, linear_before_reset: int = 0, **settled: Any) -> tuple[Tensor, States]:
    """Gates are update, reset and candidate; the reset comes before or after the candidate's recurrent product."""
    r, size, rounding = given.r, len(given.r) // 3, given.round
    input_bias, state_bias = given.biases
    outside = state_bias.clone()
    if linear_before_reset:
        outside[2 * size :] = 0

    def step(gates: Tensor, h: Tensor) -> Tensor:
        both, candidate = gates[:, : 2 * size], gates[:, 2 * size :]
        if linear_before_reset:
            products = rounding.factor(h) @ r.T
            update, reset = (both + products[:, : 2 * size]).sigmoid().chunk(2, 1)
            new = torch.tanh(reset * (products[:, 2 * size :] + state_bias[2 * size :]) + candidate)
        else:
            update, reset = (both + rounding.factor(h) @ r[: 2 * size].T).sigmoid().chunk(2, 1)
            new = torch.tanh(candidate + rounding.factor(rounding.h(reset * h)) @ r[2 * size :].T)
        return new + update * (h - new)

    return _free_steps(given, input_bias + outside, step)


def rnn_steps(given: Direction, activations: Sequence[str] = (), **settled: Any) -> tuple[Tensor, States]:
    """One product of the states a step, behind it tanh or ReLU."""
    clip = torch.relu if "Relu" in activations else torch.tanh
    return _free_steps(given, sum(given.biases), lambda gates, h: clip(gates + given.round.factor(h) @ given.r.T))


def _free_steps(
    given: Direction, bias: Tensor | int, step: Callable[[Tensor, Tensor], Tensor]
) -> tuple[Tensor, States]:
    """All steps of all sequences; what lies behind the end of one is read as 0, and left out of what is given."""
    x, lengths, (h,) = given.x, given.lengths, given.states
    times = torch.arange(len(x), device=lengths.device)[:, None]
    inputs = given.round.x(torch.where((times < lengths)[..., None], x, 0)) @ given.w.T + bias
    y = [x.new_zeros(0, *h.shape)]
    for gates in inputs:
        h = given.round.h(step(gates, h))
        y.append(h[None])
    states = torch.cat(y)
    last = torch.where((times == lengths - 1)[..., None], states, 0).sum(0)
    return torch.where((times < lengths)[..., None], states, 0), (last,)
