"""Formats: a grid, the block that shares a scale, and how that scale is itself stored: a Format again.

One recursion covers int8, MX, NVFP4, VS-Quant and shared micro-exponents; `FORMATS` names the common ones.
"""

from dataclasses import dataclass, replace
from math import prod

from lowbit.errors import InputError, UnsupportedError
from lowbit.numerics.fitted import Bases, KMeans, Piecewise
from lowbit.numerics.grids import (
    BFLOAT16,
    E2M1,
    E2M3,
    E3M2,
    E3M4,
    E4M3,
    E5M2,
    E8M0,
    FLOAT16,
    LLOYD_VALUES,
    NF4_VALUES,
    AdditivePow2,
    Codebook,
    Fitted,
    Grid,
    Int,
    Pow2,
    SignedPow2,
    grid_table,
    is_fitted,
)
from lowbit.numerics.roundings import parse_rounding
from lowbit.numerics.rows import TENSOR, Block, channel, group, tile_counts

FLOAT_BITS = 32


@dataclass(frozen=True)
class Format:
    """How a tensor is stored.

    grid        which numbers a code can mean; a `Fitted` grid finds them, one table for each block
    block       what shares one scale; None: no scale at all, the grid's values are the values
    scale       how the scales are stored: a Format over the tensor of scales, or None for float32
    zero_point  whether a tile also has a zero: value = (grid value - zero) * scale
    reach       grid value on which the top of a range lands; None: the grid's maximum
    rounding    name of a rounding, see `roundings.ROUNDINGS`
    """

    grid: Grid | Fitted
    block: Block | None = TENSOR
    scale: "Format | None" = None
    zero_point: bool = False
    reach: float | None = None
    rounding: str = "nearest"

    def __post_init__(self) -> None:
        parse_rounding(self.rounding)
        if self.block is None and (self.scale is not None or self.zero_point or self.reach is not None):
            raise InputError(f"{self!r} has no block, so no scale, zero_point or reach can belong to it.")
        if self.block is not None and not self.grid.bits:
            raise InputError(f"{self!r}: a grid of 0 bits is one number; no block and no scale can belong to it.")
        if is_fitted(self.grid) and (self.block is None or self.scale or self.zero_point or self.reach):
            raise InputError(
                f"{self!r} is fitted: it needs a block, and no scale, zero_point or reach beside its table."
            )
        if self.zero_point and self.scale is not None and self.scale.block is not None:
            raise UnsupportedError(
                f"{self!r}: a zero point needs a scale of its own, not one that shares a second scale."
            )
        if self.reach is not None and not 0 < self.reach < float("inf"):
            raise InputError(f"{self!r}: reach must be a positive number.")
        if self.block is not None and not is_fitted(self.grid):
            table = grid_table(self.grid)
            if (self.reach or table.maximum) <= (table.minimum if self.zero_point else 0):
                raise InputError(
                    f"{self!r}: the largest value of its grid is {table.maximum:g}, and no scale puts a range on that. "
                    "Give it a zero point, or use uint1 or binary for one bit."
                )

    def __repr__(self) -> str:
        parts = [repr(self.grid)]
        if self.block != TENSOR:
            parts.append(repr(self.block))
        for field, default in (("scale", None), ("zero_point", False), ("reach", None), ("rounding", "nearest")):
            if getattr(self, field) != default:
                parts.append(f"{field}={getattr(self, field)!r}")
        return f"Format({', '.join(parts)})"

    def with_block(self, block: Block) -> "Format":
        """The same numbers shared by another block."""
        return replace(self, block=block)

    def along(self, axis: int) -> "Format":
        """The same numbers with groups, and groups of their scales, running along another axis."""
        scale = None if self.scale is None else self.scale.along(axis)
        if self.block is None or self.block.group_axis is None:
            return replace(self, scale=scale)
        return replace(self, block=group(self.block.lengths[0][1], axis), scale=scale)

    @property
    def has_fixed_scale(self) -> bool:
        """Whether its scale is one number whatever the range."""
        return self.scale is not None and not self.scale.grid.bits

    @property
    def shares_scale(self) -> bool:
        """Whether scales share a second scale, so that one tile's range moves other tiles' scales."""
        return self.scale is not None and self.scale.block is not None

    def bits_per_element(self, shape: tuple[int, ...] | None = None) -> float:
        """Bits an element costs, its share of scales and zeros included.

        Without a shape: the limit for large tensors, in which a scale per tensor or per channel costs nothing.
        """
        if self.block is None:
            return float(self.grid.bits)
        counts = None if shape is None else tile_counts(shape, self.block.tile(shape))
        if is_fitted(self.grid):
            block_bits: float = FLOAT_BITS * (1 << self.grid.bits)
        else:
            block_bits = FLOAT_BITS if self.scale is None else self.scale.bits_per_element(counts)
            block_bits += self.grid.bits if self.zero_point else 0
        blocks_per_element = 1 / self.block.elements if counts is None else prod(counts) / max(1, prod(shape or ()))
        return self.grid.bits + block_bits * blocks_per_element


POWER_OF_TWO_UP = Format(E8M0, None, rounding="up")


def fixed_point(bits: int, exponent: int) -> Format:
    """Signed integers times 2**exponent: a scale of 0 bits, which no range moves. fixed_point(16, -15) holds ±1."""
    return Format(Int(bits), scale=Format(Pow2(0, exponent), None))


_SHARED_EXPONENT = Format(E8M0, None, rounding="down")


def _micro_exponents(element_bits: int) -> Format:
    """MX4, MX6, MX9: pairs share 1 bit, 8 pairs share 8 bits.

    Source: Darvish Rouhani et al. 2023 (arXiv 2302.08007), table 1: elements S1M2, S1M4, S1M7.
    """
    pairs = Format(Pow2(1, -1), group(8), scale=_SHARED_EXPONENT, rounding="down")
    return Format(Int(element_bits, narrow=True), group(2), scale=pairs, reach=2.0 ** (element_bits - 2))


def _ocp_mx(grid: Grid, reach: float) -> Format:
    """OCP MX: 32 elements share a power of two; `reach` is the grid's largest power of two.

    Source: OCP Microscaling Formats (MX) 1.0, section 6.3.
    """
    return Format(grid, group(32), scale=_SHARED_EXPONENT, reach=reach)


INT8 = Format(Int(8))
INT4 = Format(Int(4))
UINT8 = Format(Int(8, signed=False), zero_point=True)
UINT4 = Format(Int(4, signed=False), zero_point=True)
FIXED8 = Format(Int(8), scale=POWER_OF_TWO_UP)
TERNARY = Format(Int(2, narrow=True))
BINARY = Format(Codebook((-1.0, 1.0)))
NF4 = Format(Codebook(NF4_VALUES), group(64))
MXFP8_E4M3 = _ocp_mx(E4M3, 256.0)
MXFP8_E5M2 = _ocp_mx(E5M2, 32768.0)
MXFP6_E3M2 = _ocp_mx(E3M2, 16.0)
MXFP6_E2M3 = _ocp_mx(E2M3, 4.0)
MXFP4 = _ocp_mx(E2M1, 4.0)
# narrow: the code -128 would be the next power of two and raise the shared exponent when quantized again.
MXINT8 = _ocp_mx(Int(8, narrow=True), 64.0)
NVFP4 = Format(E2M1, group(16), scale=Format(E4M3))
VSQ4 = Format(Int(4, narrow=True), group(16), scale=Format(Int(4, signed=False), channel(0)))

FORMATS: dict[str, Format] = {
    **{f"int{bits}": Format(Int(bits)) for bits in range(2, 17)},
    **{f"uint{bits}": Format(Int(bits, signed=False), zero_point=True) for bits in range(1, 17)},
    "fixed8": FIXED8,
    "fixed4": Format(Int(4), scale=POWER_OF_TWO_UP),
    "ternary": TERNARY,
    "binary": BINARY,
    "log4": Format(SignedPow2(4)),
    "log3": Format(SignedPow2(3)),
    "apot3": Format(AdditivePow2(3)),
    "apot4": Format(AdditivePow2(4)),
    "apot5": Format(AdditivePow2(5)),
    "nf4": NF4,
    **{f"lloyd{bits}": Format(Codebook(values)) for bits, values in LLOYD_VALUES.items()},
    "pwlq4": Format(Piecewise(4)),
    "codebook2": Format(KMeans(2)),
    "codebook3": Format(KMeans(3)),
    "codebook4": Format(KMeans(4)),
    "bases2": Format(Bases(2)),
    "bases3": Format(Bases(3)),
    "bases4": Format(Bases(4)),
    "e4m3": Format(E4M3),
    "e5m2": Format(E5M2),
    "e3m4": Format(E3M4),
    "e3m2": Format(E3M2),
    "e2m3": Format(E2M3),
    "e2m1": Format(E2M1),
    "fp16": Format(FLOAT16, None),
    "bf16": Format(BFLOAT16, None),
    "mxfp8_e4m3": MXFP8_E4M3,
    "mxfp8_e5m2": MXFP8_E5M2,
    "mxfp6_e3m2": MXFP6_E3M2,
    "mxfp6_e2m3": MXFP6_E2M3,
    "mxfp4": MXFP4,
    "mxint8": MXINT8,
    "mx9": _micro_exponents(8),
    "mx6": _micro_exponents(5),
    "mx4": _micro_exponents(3),
    "nvfp4": NVFP4,
    "vsq4": VSQ4,
    "vsq8": Format(Int(8, narrow=True), group(16), scale=Format(Int(8, signed=False), channel(0))),
}
