"""Layers of transformers and recurrent networks: products of two values, Softmax, LayerNormalization, recurrences.

Softmax and LayerNormalization follow I-BERT (Kim et al. 2021, arXiv 2101.01321): exponentials by halving and a
polynomial, the root by Newton's method.
"""

from dataclasses import dataclass

import numpy as np

from lowbit.errors import UnsupportedError
from lowbit.integer.tensors import Ints, OneInput, Rescale, Tensor

HALVES = (1 << 30, -744187942, 257211654, -57311496, 7419127)
"""2^−f for 0 ≤ f < 1 in steps of 2^−30: the polynomial's coefficients. It is off by 2.2e-6 at most.

I-BERT has a square here, which is off by 1.9e-3: half a step of an 8-bit probability.
"""
GATE, STATE = 2.0**-12, 2.0**-15  # one step of what tanh reads, and of what it gives
KINDS = ("lstm", "gru", "gru_before", "rnn")  # before: the reset comes before the product
CELL = 2.0**-11  # one step of an LSTM's cell state: ±16 in 16 bits


def tanh_table() -> Ints:
    """int16, (513,): tanh at −8, −8 + 1/32, … 8 in steps of STATE; between, straight lines, off by 1e-4 at most."""
    return np.asarray(np.minimum(np.rint(np.tanh(np.arange(-256, 257) / 32) / STATE), 2**15 - 1).astype(np.int16))


@dataclass(frozen=True)
class Product:
    """y[i, j] = zero_y + rescale(Σ_k (a[i, k] − zero_a) · (b[j, k] − zero_b)), for each of the leading axes.

    b lies with its rows turned, so that both are read in order.
    """

    name: str
    a: Tensor
    b: Tensor
    output: Tensor
    rescale: Rescale
    low: int
    high: int

    @property
    def inputs(self) -> tuple[Tensor, ...]:
        return self.a, self.b

    @property
    def depth(self) -> int:
        """k: how many products make a sum."""
        return self.a.shape[-1]

    @property
    def products(self) -> int:
        """Multiplications for one sample."""
        return self.output.size * self.depth


@dataclass(frozen=True)
class Softmax(OneInput):
    """y = zero_y + 2^−u / Σ 2^−u, u = (the largest x − x) · scale_x · log₂ e, over the innermost axis.

    exponent   (multiplier, shift): u in steps of 2^−16 is (difference · multiplier) >> shift
    factor     (multiplier, shift): a probability in steps of 2^−30 becomes a code, (p · multiplier + half) >> shift
    """

    name: str
    input: Tensor
    output: Tensor
    exponent: tuple[int, int]
    factor: tuple[int, int]
    low: int
    high: int

    @property
    def length(self) -> int:
        """Values that sum to 1."""
        return self.input.shape[-1]


@dataclass(frozen=True)
class Normalize(OneInput):
    """y = zero_y + (v · weight[c] >> shift) + bias[c], v = (x − mean) / √(variance + epsilon), over the innermost axis.

    v         in steps of 2^−20
    weight    int32, (length,)
    bias      int32, (length,), in steps of 2^−8 of a code, to which the product is shifted; both are rounded together
    epsilon   length² · epsilon / scale_x², added to length² · variance in codes
    """

    name: str
    input: Tensor
    output: Tensor
    weight: Ints
    bias: Ints
    shift: int
    epsilon: int
    low: int
    high: int

    @property
    def length(self) -> int:
        return self.input.shape[-1]


@dataclass(frozen=True)
class Recurrent:
    """An LSTM, GRU or RNN over a sequence. Rows of the output: h after each step, then an LSTM's cell state c.

    h is in steps of 2^−15, c of 2^−11, both int16. What tanh reads, t, is in steps of 2^−12; sigmoid(t) is
    (1 + tanh(t / 2)) / 2, so the rescaling of its rows holds a half.

    LSTM, rows i o f g:  c = f · c + i · tanh(g),  h = o · tanh(c)
    GRU, rows z r n:     h = (1 − z) · tanh(n) + z · h,  where the recurrent part of n is multiplied by r, or what it is
                         the product of, h
    RNN:                 h = tanh(t)

    kind                  one of KINDS
    weight, recurrent     int8, (gates · hidden, inputs) and (gates · hidden, hidden)
    bias, bias_recurrent  int32, (gates · hidden,), at the scale of either product; zero_x · Σ weight is taken off
    rescale, again        of either product to steps of t
    initial               h, and an LSTM's c, before the first step; none: zeros
    """

    name: str
    kind: str
    input: Tensor
    initial: tuple[Tensor, ...]
    output: Tensor
    weight: Ints
    recurrent: Ints
    bias: Ints
    bias_recurrent: Ints
    rescale: Rescale
    again: Rescale
    reverse: bool = False

    @property
    def inputs(self) -> tuple[Tensor, ...]:
        return (self.input, *self.initial)

    @property
    def hidden(self) -> int:
        return int(self.recurrent.shape[1])

    @property
    def steps(self) -> int:
        return self.input.size // int(self.weight.shape[1])

    @property
    def products(self) -> int:
        """Multiplications for one sample, those of the gates among each other not counted."""
        return self.steps * (self.weight.size + self.recurrent.size)


def fixed(factor: float, bits: int = 30) -> tuple[int, int]:
    """(multiplier, shift): factor ≈ multiplier / 2^shift, the multiplier of this many bits."""
    mantissa, exponent = np.frexp(factor)
    shift = bits - int(exponent)
    if not 1 <= shift <= 62:
        raise UnsupportedError(f"a factor of {factor:g}, which no rescaling in integers reaches")
    return round(float(mantissa) * 2.0**bits), shift
