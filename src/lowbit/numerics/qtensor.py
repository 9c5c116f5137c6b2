"""QuantTensor: a tensor stored as codes, scales, zeros and tables. Plain data, no tensor subclass."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from math import prod
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

from lowbit.numerics.encode import decode, decode_rows, encode_rows
from lowbit.numerics.formats import Format
from lowbit.numerics.grids import Float, Int, grid_table
from lowbit.numerics.roundings import Rounding, nearest
from lowbit.numerics.rows import from_rows, tile_counts, tiles_to_rows

Array: TypeAlias = Tensor | np.ndarray[Any, Any]


@dataclass(frozen=True, eq=False)
class QuantTensor:
    """A tensor stored as integer codes.

    codes.shape == the original shape; an `Int` grid's codes are its integers, any other's are positions in its table
    tile is the length on each axis of what shares one scale; the last tile of an axis may be shorter
    scale, zero: one number per tile, of shape ceil(shape / tile); scale may itself be a QuantTensor; None: none
    table: values fitted to the data, (n_tiles, n_codes), one sorted row per tile; None: the grid's own. It may have
    fewer than the 2**bits values that codes can tell apart, and 0 among them, which is then exact
    original ≈ (decode(codes) - decode(zero)) * scale, each tile with its own scale, zero and table
    codes, scale, zero and table are numpy arrays or torch tensors, as the original was
    """

    codes: Array
    format: Format
    tile: tuple[int, ...]
    scale: "Array | QuantTensor | None"
    zero: Array | None = None
    table: Array | None = None
    dtype: Any = torch.float32

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.codes.shape)

    @property
    def tiles(self) -> tuple[int, ...]:
        """Number of tiles along each axis: the shape of scale and zero."""
        return tile_counts(self.shape, self.tile)

    def scale_values(self) -> Array:
        """The effective float32 scale of each tile, in the shape of the grid of tiles; ones where there is none."""
        return _like(self._scale(), self.codes)

    def zero_values(self) -> Array:
        """The zero of each tile in units of the grid's values, in the shape of the grid of tiles; zeros where none."""
        return _like(self._zero(), self.codes)

    def steps(self) -> Tensor:
        """Mean distance of neighbouring values of each tile, in the shape of the grid of tiles."""
        table = (
            torch.from_numpy(grid_table(self.format.grid).values)[None] if self.table is None else as_torch(self.table)
        )
        mean = (table[:, -1] - table[:, 0]) / max(1, table.shape[1] - 1)
        return self._scale() * (mean if self.table is None else mean.reshape(self.tiles))

    def dequantize(self) -> Array:
        """The numbers that are stored, in the dtype and kind of the original."""
        rows = decode_rows(tiles_to_rows(as_torch(self.codes), self.tile), **self._by_row())
        return like(from_rows(rows, self.shape, self.tile), self.dtype)

    def by_rows(self, count: int) -> "Iterator[tuple[slice, QuantTensor]]":
        """Pieces of so many rows, for what must not hold all of it decoded; whole where tiles span rows."""
        length = self.shape[0] if self.shape else 1
        if not self.shape or self.tile[0] > 1 or length <= count:
            yield slice(None), self
            return
        scale = None if self.scale is None else self._scale()
        tiles_a_row = prod(self.tiles[1:])
        for start in range(0, length, count):
            rows = slice(start, start + count)
            table = None if self.table is None else self.table[start * tiles_a_row : (start + count) * tiles_a_row]
            part = replace(self, codes=self.codes[rows], table=table, scale=None if scale is None else scale[rows])
            yield rows, part if self.zero is None else replace(part, zero=self.zero[rows])

    def encode(self, x: Tensor, rounding: Rounding = nearest) -> "QuantTensor":
        """Other numbers of this shape, each at a neighbouring code; scales, zeros and tables stay."""
        rows = tiles_to_rows(x.detach().to(torch.float32), self.tile)
        codes = encode_rows(rows, rounding=rounding, **self._by_row())
        return replace(self, codes=from_rows(codes, self.shape, self.tile))

    def table_positions(self) -> Tensor:
        """(n_tiles, n) where in the flattened tables the value of each code is, tile after tile."""
        assert self.table is not None
        rows = tiles_to_rows(as_torch(self.codes), self.tile).long()
        return rows + torch.arange(len(rows)).reshape(-1, 1) * self.table.shape[1]

    def to_bits(self) -> Array:
        """The codes as the bit patterns of their standard: uint8, or uint16 for more than 8 bits.

        `Int` in two's complement, `Float` as sign, exponent and mantissa, E8M0 as its exponent, in the low bits; so a
        view of them as `ml_dtypes.float4_e2m1fn` or `torch.float8_e4m3fn` holds the grid's values. Grids without a
        standard keep their positions.
        """
        codes, grid = as_torch(self.codes).to(torch.int32), self.format.grid
        if isinstance(grid, Int):
            codes = codes & ((1 << grid.bits) - 1)
        elif isinstance(grid, Float):
            codes = codes - grid_table(grid).zero_position
            codes = codes.abs() | ((codes < 0).to(torch.int32) << (grid.bits - 1))
        return _like(codes.to(torch.uint8 if grid.bits <= 8 else torch.uint16), self.codes)

    @property
    def bits(self) -> float:
        """Bits stored: codes, scales, zeros and tables."""
        return self.format.bits_per_element(self.shape) * prod(self.shape)

    def _by_row(self) -> dict[str, Any]:
        """What `encode_rows` and `decode_rows` want to know of the tiles."""
        one = torch.ones(1, 1, device=as_torch(self.codes).device)
        return {
            "scale": one if self.scale is None else self._scale().reshape(-1, 1),
            "zero": one * 0 if self.zero is None else self._zero().reshape(-1, 1),
            "grid": self.format.grid,
            "table": None if self.table is None else as_torch(self.table),
        }

    def _scale(self) -> Tensor:
        if isinstance(self.scale, QuantTensor):
            return as_torch(self.scale.dequantize()).to(torch.float32)
        if self.scale is None:
            return torch.ones(self.tiles, device=as_torch(self.codes).device)
        return as_torch(self.scale)

    def _zero(self) -> Tensor:
        if self.zero is None:
            return torch.zeros(self.tiles, device=as_torch(self.codes).device)
        return decode(as_torch(self.zero), self.format.grid)

    def __repr__(self) -> str:
        return f"QuantTensor({list(self.shape)}, {self.format!r})"


def as_torch(x: Array) -> Tensor:
    """A torch view of x; numpy's bfloat16 and float8 (ml_dtypes) are copied to float32, which holds them exactly."""
    if isinstance(x, Tensor):
        return x.detach()
    x = np.asarray(x)
    if x.dtype.kind == "V" or x.dtype.name not in _TORCH_KNOWS:
        x = x.astype(np.float32)
    if not x.flags.writeable or any(stride < 0 for stride in x.strides):
        x = x.copy()
    return torch.from_numpy(x)


def like(x: Tensor, dtype: Any) -> Array:
    """x as a torch tensor of a torch dtype, or as a numpy array of a numpy dtype."""
    return x.to(dtype) if isinstance(dtype, torch.dtype) else x.cpu().numpy().astype(dtype, copy=False)


def _like(x: Tensor, other: Array) -> Array:
    return x if isinstance(other, Tensor) else x.cpu().numpy()


_TORCH_KNOWS = {"float16", "float32", "float64", "int8", "int16", "int32", "int64", "uint8", "bool"}
