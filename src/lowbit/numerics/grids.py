"""Grids: which real numbers a code can mean. A grid is its sorted table of values; everything else follows from it.

Sources stand at each grid. Codes are positions in the sorted table; only `Int` names its codes by the integer itself.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from itertools import product
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt
import torch

from lowbit.errors import InputError
from lowbit.numerics.sorted_points import Doubles, SortedPoints

if TYPE_CHECKING:
    from typing_extensions import TypeIs

Values = npt.NDArray[np.float64]


@runtime_checkable
class Grid(Protocol):
    """A fixed set of numbers.

    values() is sorted and has no duplicates: this is the definition
    bits is what one code costs when packed: 2**bits ≥ len(values())
    """

    @property
    def bits(self) -> int: ...

    def values(self) -> Values: ...

    def __hash__(self) -> int: ...


@runtime_checkable
class Fitted(Protocol):
    """A grid that depends on the data.

    bits  of a code
    fit   points → tables (n_blocks, 2**bits) float64, sorted; they are stored whole, in float32
    """

    @property
    def bits(self) -> int: ...

    def fit(self, points: SortedPoints) -> Doubles: ...

    def __hash__(self) -> int: ...


def is_fitted(grid: "Grid | Fitted") -> "TypeIs[Fitted]":
    """Whether a grid depends on the data. `isinstance` would ask a protocol for all its methods: 50 µs."""
    return hasattr(grid, "fit")


@dataclass(frozen=True)
class Int:
    """Consecutive integers, 1–16 bits. narrow=True leaves out the lowest, which makes the range symmetric."""

    bits: int
    signed: bool = True
    narrow: bool = False

    def __post_init__(self) -> None:
        if not 1 <= self.bits <= 16:
            raise InputError(f"Int({self.bits}): bits must be 1 to 16.")
        if self.narrow and (self.bits < 2 or not self.signed):
            raise InputError(f"{self!r}: narrow=True needs a signed grid of at least 2 bits.")

    @property
    def minimum(self) -> int:
        return -(1 << (self.bits - 1)) + self.narrow if self.signed else 0

    @property
    def maximum(self) -> int:
        return (1 << (self.bits - self.signed)) - 1

    def values(self) -> Values:
        return np.arange(self.minimum, self.maximum + 1, dtype=np.float64)


@dataclass(frozen=True)
class Float:
    """Sign, exponent, mantissa, with denormals; -0 is not counted as a value of its own.

    special says which codes are no numbers:
      "none"  every code is finite (OCP MX E2M1, E2M3, E3M2)
      "nan"   only the code of all ones is NaN (OCP FP8 E4M3; no infinities)
      "ieee"  the top exponent holds infinities and NaN (E5M2, float16, bfloat16)
      "fnuz"  the bias is one larger and the code of -0 is NaN (float8_e4m3fnuz)
    Source: OCP 8-bit Floating Point Specification 1.0; OCP Microscaling Formats (MX) 1.0; IEEE 754.
    """

    exponent_bits: int
    mantissa_bits: int
    special: str = "none"

    def __post_init__(self) -> None:
        if self.special not in ("none", "nan", "ieee", "fnuz"):
            raise InputError(f"{self!r}: special must be 'none', 'nan', 'ieee' or 'fnuz'.")
        if not (1 <= self.exponent_bits <= 8 and self.mantissa_bits >= 0 and self.bits <= 16):
            raise InputError(f"{self!r}: needs 1 to 8 exponent bits and at most 16 bits with sign and mantissa.")

    @property
    def bits(self) -> int:
        return 1 + self.exponent_bits + self.mantissa_bits

    @property
    def bias(self) -> int:
        return (1 << (self.exponent_bits - 1)) - (self.special != "fnuz")

    def values(self) -> Values:
        code = np.arange(1 << (self.exponent_bits + self.mantissa_bits))
        dropped = {"none": 0, "nan": 1, "ieee": 1 << self.mantissa_bits, "fnuz": 0}[self.special]
        code = code[: len(code) - dropped]
        exponent, mantissa = code >> self.mantissa_bits, code & ((1 << self.mantissa_bits) - 1)
        normal = exponent > 0
        significand = normal + mantissa / (1 << self.mantissa_bits)
        positive = np.ldexp(significand, np.where(normal, exponent, 1) - self.bias)
        return np.unique(np.concatenate([-positive, positive]) + 0.0)


@dataclass(frozen=True)
class Pow2:
    """Positive powers of two, 2**lowest upwards; `reserved` codes at the top mean no number (E8M0 keeps one for NaN).

    Of 0 bits it is one number: as the grid of a scale it fixes that scale, whatever the range.

    Source: OCP MX 1.0 (E8M0 scales); shared micro-exponents, Darvish Rouhani et al. 2023 (arXiv 2302.08007).
    """

    bits: int
    lowest: int
    reserved: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.bits <= 8:
            raise InputError(f"{self!r}: bits must be 0 to 8.")
        highest = self.lowest + (1 << self.bits) - 1 - self.reserved
        if self.lowest < -149 or highest > 127:
            raise InputError(f"{self!r} reaches 2**{self.lowest} … 2**{highest}, outside float32. Move lowest.")

    def values(self) -> Values:
        return np.ldexp(1.0, self.lowest + np.arange((1 << self.bits) - self.reserved))


@dataclass(frozen=True)
class SignedPow2:
    """Logarithmic: 0 and ±2**0, ±2**-1, … : 2**bits - 1 values, the largest 1.

    Source: Miyashita et al. 2016 (arXiv 1603.01025); Zhou et al. 2017 (INQ, arXiv 1702.03044).
    """

    bits: int

    def __post_init__(self) -> None:
        if not 2 <= self.bits <= 8:
            raise InputError(f"{self!r}: bits must be 2 to 8.")

    def values(self) -> Values:
        positive = np.ldexp(1.0, -np.arange((1 << (self.bits - 1)) - 1))
        return np.sort(np.concatenate([-positive, [0.0], positive]))


@dataclass(frozen=True)
class AdditivePow2:
    """Additive powers of two (APoT): a sign, and a magnitude that is a sum of powers of two.

    Each term has `base_bits` bits: of n terms, term i takes one of {0, 2**-i, 2**-(i+n), …}; a remainder of bits makes
    one shorter term, whose powers come last. Scaled so that the largest value is 1. signed=False drops the sign and
    spends its bit on the magnitude.
    Source: Li et al. 2020 (arXiv 1909.13144), eq. 5, with base_bits k = 2 as there.
    """

    bits: int
    base_bits: int = 2
    signed: bool = True

    def __post_init__(self) -> None:
        if not 2 <= self.bits <= 8 or not 1 <= self.base_bits <= 3:
            raise InputError(f"{self!r}: bits must be 2 to 8 and base_bits 1 to 3.")

    def values(self) -> Values:
        full, rest = divmod(self.bits - self.signed, self.base_bits)
        rounds, rest_levels = (1 << self.base_bits) - 1, (1 << rest) - 1
        terms: list[list[float]] = [[0.0] for _ in range(full + (rest > 0))]
        exponent = 0
        for step in range(rounds):
            has_rest = step >= rounds - rest_levels
            for term in ([full] if has_rest else []) + list(range(full)):
                exponent -= 1
                terms[term].append(2.0**exponent)
        positive = np.array([sum(choice) for choice in product(*terms)])
        positive /= positive.max()
        return np.unique(np.concatenate([-positive, positive]) + 0.0) if self.signed else np.unique(positive)


@dataclass(frozen=True)
class Codebook:
    """Any fixed table of numbers."""

    table: tuple[float, ...]

    def __post_init__(self) -> None:
        if not self.table or sorted(set(self.table)) != list(self.table) or not np.isfinite(self.table).all():
            raise InputError(f"Codebook needs finite values, sorted and without duplicates; it has {self.table!r}.")

    @property
    def bits(self) -> int:
        return max(1, (len(self.table) - 1).bit_length())

    def values(self) -> Values:
        return np.array(self.table, dtype=np.float64)


# Least squared error for a normal variable with so many bits (Max 1960, table I), in 127ths of the largest: an int8
# kernel computes with these as they are.
LLOYD_VALUES: dict[int, tuple[float, ...]] = {
    bits: tuple(float(round(127 * sign * x / levels[-1])) for sign in (-1, 1) for x in levels[::sign])
    for bits, levels in {
        2: (0.4528, 1.510),
        3: (0.2451, 0.7560, 1.344, 2.152),
        4: (0.1284, 0.3881, 0.6568, 0.9424, 1.256, 1.618, 2.069, 2.733),
        5: (
            *(0.0659, 0.1981, 0.3314, 0.4668, 0.6050, 0.7473, 0.8947, 1.049),
            *(1.212, 1.387, 1.577, 1.788, 2.029, 2.319, 2.692, 3.263),
        ),
    }.items()
}


@dataclass(frozen=True)
class GridTable:
    """A grid's values, ready to compute with: float32 values and the position of zero among them."""

    values: npt.NDArray[np.float32]
    zero_position: int
    has_zero: bool
    minimum: float
    maximum: float


def _constant(function: Callable[[Any], "GridTable"]) -> Callable[[Any], "GridTable"]:
    """What torch.compiler.assume_constant_result does, without its import of the compiler, which takes 1 s."""
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


@lru_cache(maxsize=256)
@_constant
def grid_table(grid: Grid | Fitted) -> GridTable:
    """The table of a grid, computed once; InputError for a fitted one.

    Ties go to the value whose position counted from zero is even: for `Float` that is the even mantissa of IEEE 754,
    for `Int` the even integer.
    """
    if is_fitted(grid):
        raise InputError(f"{grid!r} is fitted to data and has no values of its own: give the table that was found.")
    values = grid.values()
    zero = int(np.searchsorted(values, 0.0))
    has_zero = zero < len(values) and values[zero] == 0
    ends = float(values[0]), float(values[-1])
    return GridTable(values.astype(np.float32), zero if has_zero else 0, bool(has_zero), *ends)


def is_whole(grid: Grid | Fitted) -> bool:
    """Whether an integer kernel can compute with its values: it is Int, or they are whole numbers within int8."""
    if isinstance(grid, Int):
        return True
    if is_fitted(grid):
        return False
    values = grid.values()
    return bool((values == np.rint(values)).all() and values[0] >= -128 and values[-1] <= 127)


def code_dtype(grid: Grid | Fitted) -> torch.dtype:
    """The smallest integer type that holds the grid's codes."""
    first, last = (grid.minimum, grid.maximum) if isinstance(grid, Int) else (0, (1 << grid.bits) - 1)
    for dtype in (torch.uint8, torch.int8, torch.int16):
        info = torch.iinfo(dtype)
        if info.min <= first and last <= info.max:
            return dtype
    return torch.int32


E8M0 = Pow2(8, -127, reserved=1)
E4M3 = Float(4, 3, "nan")
E5M2 = Float(5, 2, "ieee")
E3M4 = Float(3, 4, "ieee")
E3M2 = Float(3, 2)
E2M3 = Float(2, 3)
E2M1 = Float(2, 1)
FLOAT16 = Float(5, 10, "ieee")
BFLOAT16 = Float(8, 7, "ieee")
# Dettmers et al. 2023 (QLoRA, arXiv 2305.14314), appendix E: quantiles of a normal distribution, 0 included.
NF4_VALUES = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)
