"""What a value of the integer program is: codes with scale and zero, and how an accumulator becomes a code."""

from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from lowbit.errors import UnsupportedError

Ints = NDArray[np.integer[Any]]
Rounding = Literal["onnxruntime", "once", "twice"]
"""How an accumulator becomes a code; the one place that says so.

onnxruntime   the default, what its kernels compute in float32: acc, and its product with the float32 factor, are
              rounded to 24 bits, then the product to a whole number; each time to nearest, ties to even. For
              convolutions and matrix products with weights of 8 bits; all else rounds once
once    y = (acc · multiplier + 2^(30 + shift)) >> (31 + shift): the 64-bit product is rounded once, half up
twice   TFLite's and ARM's rule: the product's high 31 bits rounded to nearest, then shifted with rounding half away
        from zero. Two roundings: about one code in a thousand differs from `once` by one
"""


@dataclass(frozen=True)
class Tensor:
    """A value of the program, for one sample: real = (code − zero) · scale.

    shape   as it lies in memory, channels last; the first axis is the batch, 1
    order   axis i of the memory is axis order[i] of the ONNX value: (0, 2, 3, 1) is NCHW turned to NHWC
    bits    of a code: codes are signed, and of at most 8 bits int8, else int16
    """

    name: str
    shape: tuple[int, ...]
    order: tuple[int, ...]
    scale: float
    zero: int
    bits: int = 8

    @property
    def dtype(self) -> np.dtype[Any]:
        return np.dtype(np.int8 if self.bits <= 8 else np.int16)

    @property
    def size(self) -> int:
        return int(np.prod(self.shape))

    @property
    def bytes(self) -> int:
        return self.size * self.dtype.itemsize

    @property
    def ends(self) -> tuple[int, int]:
        """The lowest and the highest code."""
        return -(1 << (self.bits - 1)), (1 << (self.bits - 1)) - 1


class OneInput:
    """A layer that reads one tensor, `input`."""

    input: Tensor

    @property
    def inputs(self) -> tuple[Tensor, ...]:
        return (self.input,)


class TwoInputs:
    """A layer that reads two tensors; b's codes may be `constant`, those of the network."""

    a: Tensor
    b: Tensor
    constant: Ints | None

    @property
    def inputs(self) -> tuple[Tensor, ...]:
        return (self.a,) if self.constant is not None else (self.a, self.b)


Sizes = tuple[int, int, int, int]


def spatial(tensor: Tensor) -> Sizes:
    """Depth, height, width, channels: the axes behind the batch, missing ones 1; of a sequence (steps, 1, channels)."""
    shape = (tensor.shape[1:] if tensor.shape[0] == 1 else tensor.shape) or (1,)
    *positions, channels = shape if len(shape) <= 4 else (int(np.prod(shape[:-3])), *shape[-3:])
    d, h, w = (*(1,) * (3 - len(positions)), *positions)
    return d, h, w, channels


class Window(NamedTuple):
    """Which positions a layer reads, over depth, height, width: at · strides − pads + tap · dilations.

    size, out   depth, height, width, channels of what is read and of what is made
    """

    size: Sizes
    out: Sizes
    taps: tuple[int, ...]
    strides: tuple[int, int, int]
    pads: tuple[int, int, int]
    dilations: tuple[int, int, int] = (1, 1, 1)


@dataclass(frozen=True)
class Rescale:
    """A positive factor, or one an output channel, as integers: multiplier · 2^(left − 31 − shift).

    multiplier   int32, 2^30 ≤ multiplier < 2^31 (Q31); 0 where the factor is below 2^−62
    shift        int32, at least 1
    left         bits that accumulators are shifted up before, the same for all; 0 unless a factor is 1/2 or more
    """

    multiplier: Ints
    shift: Ints
    left: int = 0

    @property
    def numbers(self) -> tuple[int, int, int]:
        """Multiplier, shift and left of a single factor."""
        return int(self.multiplier[0]), int(self.shift[0]), self.left

    @staticmethod
    def of(factors: "float | NDArray[np.float64]") -> "Rescale":
        factor = np.atleast_1d(np.asarray(factors, np.float64))
        if not np.all(np.isfinite(factor)) or np.any(factor < 0) or factor.max() >= 2**15:
            raise UnsupportedError(
                f"a scale is multiplied by {factor.max():g}, which no rescaling in integers reaches."
            )
        mantissa, exponent = np.frexp(factor)
        multiplier = np.rint(mantissa * 2.0**31).astype(np.int64)
        exponent = np.where(multiplier == 2**31, exponent + 1, exponent)
        multiplier = np.where(multiplier == 2**31, 2**30, multiplier)
        gone = (exponent < -31) | (factor == 0)
        multiplier, exponent = np.where(gone, 0, multiplier), np.where(gone, -1, exponent)
        left = max(0, int(exponent.max()) + 1)
        return Rescale(multiplier.astype(np.int32), (left - exponent).astype(np.int32), left)
