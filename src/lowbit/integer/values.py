"""What a float value of a Q/DQ graph is in integers: codes, a constant, or an accumulator that waits for its scale."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lowbit.integer.program import Layer
from lowbit.integer.tensors import Tensor

Array = NDArray[Any]


@dataclass(frozen=True)
class Coded:
    """A function of the codes of one tensor; what DequantizeLinear gives where `function` is None.

    function   float64, (256,): its value at the codes −128 … 127; of a 16-bit tensor (513,), at every 128th code
    """

    tensor: Tensor
    function: NDArray[np.float64] | None = None

    def values(self) -> NDArray[np.float64]:
        """The value at each of the 256 codes; of a 16-bit tensor at −32,768, −32,640, … 32,768."""
        if self.function is not None:
            return self.function
        codes = np.arange(-128, 128) if self.tensor.bits <= 8 else np.arange(-(1 << 15), (1 << 15) + 1, 128)
        return (codes - self.tensor.zero) * np.float64(self.tensor.scale)

    @property
    def shape(self) -> tuple[int, ...]:
        """In ONNX's order of axes."""
        return onnx_shape(self.tensor)


@dataclass(frozen=True)
class Constant:
    """An initialiser: numbers, or codes with scale and zero.

    axis   along which scale and zero lie; None: one for all
    """

    array: Array
    scale: Array | None = None
    zero: Array | None = None
    axis: int | None = None

    def along(self, numbers: Array) -> Array:
        """Scales or zeros in a shape that broadcasts against the array."""
        shape = [-1 if axis == self.axis else 1 for axis in range(self.array.ndim)]
        return numbers.reshape(shape if self.axis is not None else ())

    def real(self) -> Array:
        """The numbers; of codes in float64."""
        if self.scale is None:
            return self.array
        zero = 0 if self.zero is None else self.along(self.zero).astype(np.int64)
        return np.asarray((self.array.astype(np.int64) - zero) * self.along(self.scale.astype(np.float64)))


@dataclass(frozen=True)
class Waiting:
    """An accumulator: the layer is made once QuantizeLinear says scale and zero.

    finish      (output, lowest code, highest code) → the layer
    shape       of the output, in ONNX's order; in memory its axes lie in `order`
    low, high   bounds of the clips that stand behind, in real numbers
    add_bias    the same with a constant added, where that can be part of the layer
    """

    finish: Callable[[Tensor, int, int], Layer]
    shape: tuple[int, ...]
    order: tuple[int, ...]
    low: float = -np.inf
    high: float = np.inf
    add_bias: "Callable[[Constant], Waiting] | None" = None


def onnx_shape(tensor: Tensor) -> tuple[int, ...]:
    """The shape in ONNX's order of axes."""
    shape = [0] * len(tensor.order)
    for place, axis in enumerate(tensor.order):
        shape[axis] = tensor.shape[place]
    return tuple(shape)


def channels_last(rank: int) -> tuple[int, ...]:
    """(0, 2, 3, 1) for NCHW; what has no positions stays as it is."""
    return (0, *range(2, rank), 1) if rank > 2 else tuple(range(rank))
