"""The integer program: a network as plain data, from input codes to output codes without one float.

Source of the arithmetic: Jacob et al. 2018 (arXiv 1712.05877), section 2; docs/integers.md derives it.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from lowbit.integer.sequences import Normalize, Product, Recurrent, Softmax
from lowbit.integer.tensors import Ints, OneInput, Rescale, Rounding, Tensor, TwoInputs, Window, spatial


@dataclass(frozen=True)
class Conv(OneInput):
    """y = zero_y + rescale(bias + Σ weight · x), x outside its tensor being zero_x. A matrix product has kernel 1.

    weight    int8, (outputs, depth, height, width, inputs of a group): each row lies as what it is multiplied with
    bias      int32, (outputs,): zero_x · Σ weight is taken off
    strides, pads, dilations   over depth, height, width; pads in front. What has fewer axes has a depth of 1
    low, high   the least and the largest code of y: a Relu or Clip behind is part of it
    """

    name: str
    input: Tensor
    output: Tensor
    weight: Ints
    bias: Ints
    rescale: Rescale
    strides: tuple[int, int, int]
    pads: tuple[int, int, int]
    dilations: tuple[int, int, int]
    groups: int
    low: int
    high: int
    weight_scale: NDArray[np.float64] = field(default_factory=lambda: np.zeros(0))

    @property
    def products(self) -> int:
        """Multiplications for one sample."""
        return self.output.size * int(np.prod(self.weight.shape[1:]))

    @property
    def window(self) -> Window:
        size, out = spatial(self.input), spatial(self.output)
        return Window(size, out, self.weight.shape[1:4], self.strides, self.pads, self.dilations)

    @property
    def rows(self) -> Ints:
        """(outputs, products of one output)"""
        return self.weight.reshape(len(self.weight), -1)

    def bias_without(self, zero: int) -> Ints:
        """int64: the bias beside inputs from which `zero` was taken off."""
        return np.asarray(self.bias + zero * self.rows.astype(np.int64).sum(1))

    @property
    def packed(self) -> bool:
        """Whether all weights fit in 4 bits: two of them share a byte of flash. Not beside 16-bit codes."""
        return self.input.bits <= 8 and bool(self.weight.min(initial=0) >= -8 and self.weight.max(initial=0) <= 7)

    @property
    def depthwise(self) -> bool:
        """Whether each output channel reads the input channel of the same number, and no other."""
        return self.groups > 1 and self.groups == self.weight.shape[0] and self.weight.shape[-1] == 1


@dataclass(frozen=True)
class Add(TwoInputs):
    """y = zero_y + ((a − zero_a) · multipliers[0] + (b − zero_b) · multipliers[1] + 2^(shift−1)) >> shift.

    multipliers   of a and b, at most 2^30 in absolute value; b's is negative in a subtraction. The sum takes 40 bits:
                  with 21-bit multipliers and 32 bits one code in 5,000 was another one
    constant      codes of b where it is a constant of the network, of b's shape
    """

    name: str
    a: Tensor
    b: Tensor
    output: Tensor
    multipliers: tuple[int, int]
    shift: int
    low: int
    high: int
    constant: Ints | None = None

    @property
    def sign(self) -> int:
        """−1 in a subtraction."""
        return 1 if self.multipliers[1] > 0 else -1

    def factors(self) -> tuple[Rescale, Rescale, Rescale]:
        """What TFLite multiplies with, of a, b and their sum: operands, 20 bits up, come to twice the larger scale."""
        twice = 2 * max(self.a.scale, self.b.scale)
        return (
            Rescale.of(self.a.scale / twice),
            Rescale.of(self.b.scale / twice),
            Rescale.of(twice / 2**20 / self.output.scale),
        )


@dataclass(frozen=True)
class Multiply(TwoInputs):
    """y = zero_y + rescale((a − zero_a) · (b − zero_b)); b's shape may have axes of 1 where a's has more."""

    name: str
    a: Tensor
    b: Tensor
    output: Tensor
    rescale: Rescale
    low: int
    high: int
    constant: Ints | None = None


@dataclass(frozen=True)
class AveragePool(OneInput):
    """y = zero_y + the mean over a window of (x − zero_x) · factor, divided exactly and rounded half up.

    factor        multiplier / 2^shift, multiplier at most 2^30; (1, shift) where it is a power of two
    count_padding whether places outside count, with (x − zero_x) = 0
    """

    name: str
    input: Tensor
    output: Tensor
    kernel: tuple[int, int, int]
    strides: tuple[int, int, int]
    pads: tuple[int, int, int]
    count_padding: bool
    multiplier: int
    shift: int
    low: int
    high: int

    @property
    def window(self) -> Window:
        """Positions and channels that it makes of its input, whatever axes its output keeps."""
        size, shape = spatial(self.input), spatial(self.output)
        channels = size[3]
        if self.output.size == channels:
            shape = (1, 1, 1, channels)
        elif shape[3] != channels:
            shape = (1, self.output.size // channels, 1, channels)
        return Window(size, shape, self.kernel, self.strides, self.pads)

    @property
    def whole(self) -> bool:
        """Whether all places of a channel become one: TFLite's MEAN."""
        return (
            self.output.size == self.input.shape[-1]
            and int(np.prod(self.kernel)) == self.input.size // self.output.size
        )

    def factor(self) -> Rescale:
        """What TFLite multiplies the sum of all places with: the ratio of the scales, divided by how many they are."""
        ratio, places = Rescale.of(self.input.scale / self.output.scale), self.input.size // self.output.size
        up = places.bit_length() - 1
        return Rescale((ratio.multiplier.astype(np.int64) << up) // places, ratio.shift + up, ratio.left)


@dataclass(frozen=True)
class MaxPool(OneInput):
    """The largest code of a window; places outside do not count."""

    name: str
    input: Tensor
    output: Tensor
    kernel: tuple[int, int, int]
    strides: tuple[int, int, int]
    pads: tuple[int, int, int]
    dilations: tuple[int, int, int]

    @property
    def window(self) -> Window:
        size, out = spatial(self.input), spatial(self.output)
        return Window(size, out, self.kernel, self.strides, self.pads, self.dilations)


@dataclass(frozen=True)
class Table(OneInput):
    """Any function of one value: y = table[x + 128]; of 16 bits a straight line between two of 513 entries.

    table   of y's type: (256,); or (513,), of which entry i belongs to the code 128 · i − 32,768
    """

    name: str
    input: Tensor
    output: Tensor
    table: Ints


@dataclass(frozen=True)
class Piece:
    """A block of codes that is copied: loops from the outermost, each with its steps in the source and the target."""

    source: int
    counts: tuple[int, ...]
    read_from: int
    read_steps: tuple[int, ...]
    write_to: int
    write_steps: tuple[int, ...]


@dataclass(frozen=True)
class Copy:
    """Codes in other places: transpose, concatenation, slices, padding, nearest resizing. Nothing is computed.

    fill   the code of what no piece writes; None: pieces write everything
    """

    name: str
    sources: tuple[Tensor, ...]
    output: Tensor
    pieces: tuple[Piece, ...]
    fill: int | None = None

    @property
    def inputs(self) -> tuple[Tensor, ...]:
        return self.sources


Layer = Conv | Add | Multiply | AveragePool | MaxPool | Table | Copy | Product | Softmax | Normalize | Recurrent


@dataclass(frozen=True)
class Program:
    """Layers in the order in which they run; each reads what inputs and layers before it gave.

    names   of the outputs in the ONNX file
    """

    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]
    names: tuple[str, ...]
    layers: tuple[Layer, ...]
    rounding: Rounding = "onnxruntime"

    def tensors(self) -> Iterator[Tensor]:
        """Inputs, then what each layer makes."""
        yield from self.inputs
        yield from (layer.output for layer in self.layers)
