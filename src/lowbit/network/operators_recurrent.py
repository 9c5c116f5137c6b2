"""LSTM, GRU and RNN.

Where a network is of the standard form (its default activations, no clipping, no peepholes, no lengths), torch's fused
kernels run it; every other form is stepped through here, gate by gate, as the ONNX specification writes it.
"""

from collections.abc import Callable, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

Activation = Callable[[Tensor], Tensor]
State = tuple[Tensor, ...]

# name: (function of x, alpha, beta; default alpha; default beta)
_ACTIVATIONS: dict[str, tuple[Callable[[Tensor, float, float], Tensor], float, float]] = {
    "relu": (lambda x, a, b: torch.relu(x), 0, 0),
    "tanh": (lambda x, a, b: torch.tanh(x), 0, 0),
    "sigmoid": (lambda x, a, b: torch.sigmoid(x), 0, 0),
    "affine": (lambda x, a, b: a * x + b, 1, 0),
    "leakyrelu": (lambda x, a, b: F.leaky_relu(x, a), 0.01, 0),
    "thresholdedrelu": (lambda x, a, b: torch.where(x >= a, x, 0), 1, 0),
    "scaledtanh": (lambda x, a, b: a * torch.tanh(b * x), 1, 1),
    "hardsigmoid": (lambda x, a, b: torch.clamp(a * x + b, 0, 1), 0.2, 0.5),
    "elu": (lambda x, a, b: F.elu(x, a), 1, 0),
    "softsign": (lambda x, a, b: F.softsign(x), 0, 0),
    "softplus": (lambda x, a, b: F.softplus(x), 0, 0),
}
_WITH_ALPHA = {"affine", "leakyrelu", "thresholdedrelu", "scaledtanh", "hardsigmoid", "elu"}
_WITH_BETA = {"affine", "scaledtanh", "hardsigmoid"}


def _activations(
    names: Sequence[str], alphas: Sequence[float] | None, betas: Sequence[float] | None
) -> list[Activation]:
    """The activation functions in order; alphas and betas are given only for those that have them."""
    alpha, beta = iter(alphas or ()), iter(betas or ())
    chosen: list[Activation] = []
    for name in (n.lower() for n in names):
        function, a, b = _ACTIVATIONS[name]
        a = next(alpha, a) if name in _WITH_ALPHA else a
        b = next(beta, b) if name in _WITH_BETA else b
        chosen.append(lambda x, f=function, a=a, b=b: f(x, a, b))  # type: ignore[misc]
    return chosen


def _run(
    step: Callable[[Tensor, State], State], gates: Tensor, state: State, backward: bool, lengths: Tensor | None
) -> tuple[Tensor, State]:
    """Step through time; gates (T, batch, …) hold the input's part. Ended sequences keep their state and give 0."""
    steps = gates.shape[0]
    outputs: list[Tensor] = [gates] * steps
    for t in reversed(range(steps)) if backward else range(steps):
        new = step(gates[t], state)
        output = new[0]
        if lengths is not None:
            alive = (t < lengths)[:, None]
            new = tuple(torch.where(alive, n, s) for n, s in zip(new, state, strict=True))
            output = torch.where(alive, output, 0)
        state, outputs[t] = new, output
    return torch.stack(outputs), state


def _lstm_step(
    gates: Tensor,
    state: State,
    *,
    r: Tensor,
    activations: Sequence[Activation],
    clip: Activation,
    peep: Tensor | None,
    coupled: int,
) -> State:
    """Gate order i, o, f, c. peep (3, hidden): for i, o, f."""
    f, g, h = activations
    hidden, cell = state
    i, o, forget, c = (gates + hidden @ r.t()).chunk(4, -1)
    if peep is not None:
        i, forget = i + peep[0] * cell, forget + peep[2] * cell
    i = f(clip(i))
    forget = 1 - i if coupled else f(clip(forget))
    cell = forget * cell + i * g(clip(c))
    o = f(clip(o if peep is None else o + peep[1] * cell))
    return o * h(cell), cell


def _gru_step(
    gates: Tensor,
    state: State,
    *,
    r: Tensor,
    rb: Tensor,
    activations: Sequence[Activation],
    clip: Activation,
    after: int,
) -> State:
    """Gate order z, r, h; rb is the recurrent bias of h, which linear_before_reset (`after`) puts inside the reset."""
    f, g = activations
    (hidden,) = state
    rz, rr, rh = r.chunk(3, 0)
    z, reset, new = gates.chunk(3, -1)
    z, reset = f(clip(z + hidden @ rz.t())), f(clip(reset + hidden @ rr.t()))
    memory = reset * (hidden @ rh.t() + rb) if after else (reset * hidden) @ rh.t() + rb
    return ((1 - z) * g(clip(new + memory)) + z * hidden,)


def _rnn_step(gates: Tensor, state: State, *, r: Tensor, activations: Sequence[Activation], clip: Activation) -> State:
    (f,) = activations
    return (f(clip(gates + state[0] @ r.t())),)


def _clip(limit: float | None) -> Activation:
    return (lambda x: x) if limit is None else (lambda x: torch.clamp(x, -limit, limit))


def _time_first(x: Tensor, r: Tensor, initial: Sequence[Tensor | None], layout: int) -> tuple[Tensor, State]:
    """The input as (T, batch, features) and the states as (directions, batch, hidden), zero where none is given."""
    if layout:
        x = x.transpose(0, 1)
        initial = [None if s is None else s.transpose(0, 1) for s in initial]
    zeros = x.new_zeros(r.shape[0], x.shape[1], r.shape[2])
    return x, tuple(zeros if s is None else s for s in initial)


def _as_asked(y: Tensor, final: Sequence[Tensor], layout: int, outputs: int) -> Tensor | tuple[Tensor, ...]:
    """Y (T, directions, batch, hidden) and the final states (directions, batch, hidden), batch first if so laid out."""
    if layout:
        y, final = y.permute(2, 0, 1, 3), [s.transpose(0, 1) for s in final]
    return y if outputs == 1 else (y, *final)


def _fused(
    kernel: Callable[..., Sequence[Tensor]],
    order: Sequence[int],
    x: Tensor,
    w: Tensor,
    r: Tensor,
    b: Tensor | None,
    state: State,
    direction: str,
) -> tuple[Tensor, Sequence[Tensor]]:
    """torch's kernel for one layer. order: torch's gates, as places in ONNX's."""

    def arranged(weight: Tensor) -> Tensor:
        parts = weight.chunk(len(order))
        return torch.cat([parts[i] for i in order]) if len(order) > 1 else weight

    weights: list[Tensor] = []
    for d in range(w.shape[0]):
        weights += [arranged(w[d]), arranged(r[d])]
        if b is not None:
            weights += [arranged(part) for part in b[d].chunk(2)]
    hidden = [s.contiguous() for s in state]
    x = x.flip(0) if direction == "reverse" else x
    y, *final = kernel(
        x, hidden if len(hidden) > 1 else hidden[0], weights, b is not None, 1, 0.0, False, len(w) == 2, False
    )
    y = y.flip(0) if direction == "reverse" else y
    return y.reshape(*y.shape[:2], *r.shape[::2]).transpose(1, 2), final


def _stepped(
    steps: Sequence[Callable[[Tensor, State], State]],
    gates: Sequence[Tensor],
    state: State,
    direction: str,
    lengths: Tensor | None,
) -> tuple[Tensor, Sequence[Tensor]]:
    """One step function and one input part of the gates for each direction."""
    ys, finals = [], []
    for d, (step, gate) in enumerate(zip(steps, gates, strict=True)):
        y, final = _run(step, gate, tuple(s[d] for s in state), direction == "reverse" or d == 1, lengths)
        ys.append(y)
        finals.append(final)
    return torch.stack(ys, 1), [torch.stack(parts) for parts in zip(*finals, strict=True)]


def _ends_early(lengths: Tensor | None, steps: int) -> Tensor | None:
    """The lengths, or None where every sequence fills all steps."""
    return None if lengths is None or bool((lengths == steps).all()) else lengths


def lstm(
    x: Tensor,
    w: Tensor,
    r: Tensor,
    b: Tensor | None = None,
    sequence_lens: Tensor | None = None,
    initial_h: Tensor | None = None,
    initial_c: Tensor | None = None,
    p: Tensor | None = None,
    *,
    activation_alpha: tuple[float, ...] | None = None,
    activation_beta: tuple[float, ...] | None = None,
    activations: tuple[str, ...] | None = None,
    clip: float | None = None,
    direction: str = "forward",
    hidden_size: int | None = None,
    input_forget: int = 0,
    layout: int = 0,
    outputs: int = 1,
) -> Tensor | tuple[Tensor, ...]:
    x, state = _time_first(x, r, (initial_h, initial_c), layout)
    lengths = _ends_early(sequence_lens, len(x))
    default = ("Sigmoid", "Tanh", "Tanh") * len(w)
    if clip is None and p is None and not input_forget and lengths is None and (activations or default) == default:
        y, final = _fused(torch.lstm, (0, 2, 3, 1), x, w, r, b, state, direction)  # i o f c → i f c o
        return _as_asked(y, final, layout, outputs)
    f = _activations(activations or default, activation_alpha, activation_beta)
    peep = [None if p is None else p[d].reshape(3, -1) for d in range(len(w))]
    steps = [
        partial(
            _lstm_step, r=r[d], activations=f[3 * d : 3 * d + 3], clip=_clip(clip), peep=peep[d], coupled=input_forget
        )
        for d in range(len(w))
    ]
    gates = [F.linear(x, w[d], None if b is None else b[d].reshape(2, -1).sum(0)) for d in range(len(w))]
    y, final = _stepped(steps, gates, state, direction, lengths)
    return _as_asked(y, final, layout, outputs)


def gru(
    x: Tensor,
    w: Tensor,
    r: Tensor,
    b: Tensor | None = None,
    sequence_lens: Tensor | None = None,
    initial_h: Tensor | None = None,
    *,
    activation_alpha: tuple[float, ...] | None = None,
    activation_beta: tuple[float, ...] | None = None,
    activations: tuple[str, ...] | None = None,
    clip: float | None = None,
    direction: str = "forward",
    hidden_size: int | None = None,
    layout: int = 0,
    linear_before_reset: int = 0,
    outputs: int = 1,
) -> Tensor | tuple[Tensor, ...]:
    x, state = _time_first(x, r, (initial_h,), layout)
    lengths = _ends_early(sequence_lens, len(x))
    default = ("Sigmoid", "Tanh") * len(w)
    if clip is None and linear_before_reset and lengths is None and (activations or default) == default:
        y, final = _fused(torch.gru, (1, 0, 2), x, w, r, b, state, direction)  # z r h → r z h
        return _as_asked(y, final, layout, outputs)
    f = _activations(activations or default, activation_alpha, activation_beta)
    bias = x.new_zeros(len(w), 2, 3, r.shape[2]) if b is None else b.reshape(len(w), 2, 3, -1)
    steps = [
        partial(
            _gru_step,
            r=r[d],
            rb=bias[d, 1, 2],
            activations=f[2 * d : 2 * d + 2],
            clip=_clip(clip),
            after=linear_before_reset,
        )
        for d in range(len(w))
    ]
    gates = [
        F.linear(x, w[d], torch.cat([bias[d, 0, :2] + bias[d, 1, :2], bias[d, 0, 2:]]).flatten()) for d in range(len(w))
    ]
    y, final = _stepped(steps, gates, state, direction, lengths)
    return _as_asked(y, final, layout, outputs)


def rnn(
    x: Tensor,
    w: Tensor,
    r: Tensor,
    b: Tensor | None = None,
    sequence_lens: Tensor | None = None,
    initial_h: Tensor | None = None,
    *,
    activation_alpha: tuple[float, ...] | None = None,
    activation_beta: tuple[float, ...] | None = None,
    activations: tuple[str, ...] | None = None,
    clip: float | None = None,
    direction: str = "forward",
    hidden_size: int | None = None,
    layout: int = 0,
    outputs: int = 1,
) -> Tensor | tuple[Tensor, ...]:
    x, state = _time_first(x, r, (initial_h,), layout)
    lengths = _ends_early(sequence_lens, len(x))
    names = activations or ("Tanh",) * len(w)
    kernel = {"Tanh": torch.rnn_tanh, "Relu": torch.rnn_relu}.get(names[0])
    if clip is None and lengths is None and kernel is not None and len(set(names)) == 1:
        y, final = _fused(kernel, (0,), x, w, r, b, state, direction)
        return _as_asked(y, final, layout, outputs)
    f = _activations(names, activation_alpha, activation_beta)
    steps = [partial(_rnn_step, r=r[d], activations=f[d : d + 1], clip=_clip(clip)) for d in range(len(w))]
    gates = [F.linear(x, w[d], None if b is None else b[d].reshape(2, -1).sum(0)) for d in range(len(w))]
    y, final = _stepped(steps, gates, state, direction, lengths)
    return _as_asked(y, final, layout, outputs)
