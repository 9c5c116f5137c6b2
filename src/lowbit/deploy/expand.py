"""Any stored tensor as plain ONNX: packed codes in initialisers, expanded to floats by standard operators.

The operators say what the codes mean: unpack, look up, scale. No engine needs to know the format: onnxruntime computes
them once, when it loads the file, and runs at float speed from there. The expanded tensor is equal to
`QuantTensor.dequantize` bit for bit: the same float32 operations in the same order. A large table whose rows a Gather
reads is unpacked at load, and scaled row by row at each call. The codes for an integer kernel are unpacked to int8.

Codes of 4, 8 and 16 bits use ONNX's own integer types; all others are split into planes of 8, 4, 2 and 1 bits, and the
planes of 2 and 1 bits are divided out of bytes. So b bits take b bits, whatever b is.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx_ir as ir

from lowbit.errors import UnsupportedError
from lowbit.numerics import Fitted, Float, Int, QuantTensor
from lowbit.numerics.grids import BFLOAT16, FLOAT16, grid_table
from lowbit.numerics.rows import tile_counts

Array = np.ndarray[Any, Any]
_PLANES = ((8, ir.DataType.UINT8), (4, ir.DataType.UINT4), (2, ir.DataType.UINT8), (1, ir.DataType.UINT8))

_HALVES = {FLOAT16: ir.DataType.FLOAT16, BFLOAT16: ir.DataType.BFLOAT16}


_STORED = {  # codes that ONNX has an integer type for
    (4, True): ir.DataType.INT4,
    (4, False): ir.DataType.UINT4,
    (8, True): ir.DataType.INT8,
    (8, False): ir.DataType.UINT8,
    (16, True): ir.DataType.INT16,
    (16, False): ir.DataType.UINT16,
}


@dataclass
class Pool:
    """What the tensors of one program have in common.

    whole_codes  codes of a table take 4, 8 or 16 bits each, one after the other, as an entropy coder wants them
    constants    tables, shifts and shapes that the program has already
    """

    whole_codes: bool = False
    constants: dict[tuple[str, tuple[int, ...], bytes], ir.Value] = field(default_factory=dict)


def expand(stored: QuantTensor, name: str, output: str, pool: Pool | None = None) -> "Expansion":
    """The initialisers and nodes that compute a stored tensor; the last node gives the value named `output`."""
    expansion = Expansion(name, pool or Pool())
    result = expansion.tensor(stored, "")
    result.name = output
    result.shape, result.type = ir.Shape(stored.shape), ir.TensorType(ir.DataType.FLOAT)
    return expansion


def kernel_type(grid: Int) -> ir.DataType:
    """The integers of 8 or 16 bits that an engine computes these codes in."""
    return _STORED[8 if grid.bits <= 8 else 16, grid.signed]


def stored_type(grid: Int) -> ir.DataType:
    """The ONNX integers that take as many bits as these codes do; UnsupportedError where there are none."""
    if (grid.bits, grid.signed) not in _STORED:
        raise UnsupportedError(f"ONNX has no integers of {grid.bits} bits. A kernel of blocks needs 4 or 8.")
    return _STORED[grid.bits, grid.signed]


def has_separate_rows(stored: QuantTensor) -> bool:
    """Whether a row of a matrix can be decoded without the others, in blocks of equal length."""
    if len(stored.shape) != 2 or (stored.table is not None and len(stored.table) > 1):
        return False
    along = stored.tile[1]
    return (stored.tile[0] == 1 or stored.tiles[0] == 1) and (stored.tiles[1] == 1 or stored.shape[1] % along == 0)


@dataclass
class Expansion:
    """Nodes in order, and the constants that they read and that the program does not have yet.

    name   prefix of all names made here; they are short, and values have no types: both would weigh in small files
    """

    name: str
    pool: Pool
    initializers: list[ir.Value] = field(default_factory=list)
    nodes: list[ir.Node] = field(default_factory=list)

    def tensor(self, stored: QuantTensor, part: str) -> ir.Value:
        """float32 values of a stored tensor, in its shape. `part` tells the tensor's own numbers from its scale's."""
        value = self._values(stored, np.asarray(stored.codes), part)
        return self._scaled(value, stored, part, lambda numbers: self._spread(numbers, stored.shape, stored.tile))

    def rows(self, stored: QuantTensor, ids: ir.Value, rank: int) -> ir.Value:
        """Rows of a matrix, (*ids, columns): codes and scales are looked up, then multiplied.

        ids   row numbers, of `rank` axes
        MiniLM's 30,522 × 384 table in int4 group:32, one thread: decoding it at each call took 22.8 ms of 24.2.
        """
        rows, columns = stored.shape
        blocks = stored.tiles[1] if 1 < stored.tile[1] < columns else 0

        def chosen(numbers: ir.Value) -> ir.Value:
            return self.node("Gather", numbers, ids, axis=0)

        def chosen_codes(codes: ir.Value) -> ir.Value:
            return chosen(self.reshape(codes, (rows, blocks, columns // blocks)) if blocks else codes)

        def chosen_numbers(numbers: ir.Value) -> ir.Value:
            shaped = self.reshape(numbers, (*stored.tiles, 1)) if blocks else numbers
            return chosen(shaped) if stored.tiles[0] > 1 else shaped

        value = self._values(stored, np.asarray(stored.codes), "", chosen_codes)
        value = self._scaled(value, stored, "", chosen_numbers)
        return self.reshape(value, (*[0] * rank, columns)) if blocks else value

    def _scaled(
        self, value: ir.Value, stored: QuantTensor, part: str, spread: Callable[[ir.Value], ir.Value]
    ) -> ir.Value:
        """(value − zero) · scale; `spread` brings the numbers of the tiles to a shape that broadcasts."""
        if stored.zero is not None:
            value = self.node("Sub", value, spread(self._values(stored, np.asarray(stored.zero), f"{part}_zero")))
        if stored.scale is None:
            return value
        if stored.format.has_fixed_scale and len(numbers := np.unique(np.asarray(stored.scale, np.float32))) == 1:
            return self.node("Mul", value, self.shared(numbers[0], ir.DataType.FLOAT))
        if isinstance(stored.scale, QuantTensor):
            scale = self.tensor(stored.scale, f"{part}_scale")
        else:
            scale = self.constant(f"{part}_scale", np.asarray(stored.scale, np.float32), ir.DataType.FLOAT)
        return self.node("Mul", value, spread(scale))

    def _values(
        self, stored: QuantTensor, codes: Array, part: str, chosen: Callable[[ir.Value], ir.Value] | None = None
    ) -> ir.Value:
        """Grid values of codes, float32, in the codes' shape; `chosen` picks some of the codes before they are decoded.

        Codes wait for their choice in 8 or 16 bits: the engine unpacks them once, when it loads the file.
        """
        grid = stored.format.grid
        if isinstance(grid, Float) and grid in _HALVES:  # a table of all their values would weigh 260 kB
            held = self.constant(f"{part}_codes", grid_table(grid).values[codes], _HALVES[grid])
            return self.node("Cast", chosen(held) if chosen else held, to=ir.DataType.FLOAT)
        if isinstance(grid, Int):
            if chosen is None:
                return self.integers(codes, grid, f"{part}_codes", ir.DataType.FLOAT)
            held = chosen(self.integers(codes, grid, f"{part}_codes", kernel_type(grid)))
            return self.node("Cast", held, to=ir.DataType.FLOAT)
        bits = min(b for b in (4, 8, 16) if b >= grid.bits) if self.pool.whole_codes else grid.bits
        index = self._unpack(codes.astype(np.int32), bits, f"{part}_codes")
        if chosen is not None:
            small = self.node("Cast", index, to=kernel_type(Int(grid.bits, signed=False)))
            index = self.node("Cast", chosen(small), to=ir.DataType.INT32)
        if stored.table is None:
            assert not isinstance(grid, Fitted)
            table = self.shared(grid_table(grid).values, ir.DataType.FLOAT)
            return self.node("Gather", table, index, axis=0)
        tables = np.asarray(stored.table, np.float32)
        if len(tables) > 1:
            starts = self._spread(self._table_starts(tables, stored.tiles), stored.shape, stored.tile)
            index = self.node("Add", index, starts)
        table = self.constant(f"{part}_values", tables.reshape(-1), ir.DataType.FLOAT)
        return self.node("Gather", table, index, axis=0)

    def integers(self, codes: Array, grid: Int, part: str, to: ir.DataType) -> ir.Value:
        """Integer codes as numbers of type `to`; they take `grid.bits` bits each in the file."""
        kind = _STORED.get((grid.bits, grid.signed))
        if kind is not None:
            held = self.constant(part, codes, kind)
            return held if kind is to else self.node("Cast", held, to=to)
        first = grid.minimum
        index = self._unpack(codes.astype(np.int32) - first, grid.bits, part)
        if first:
            index = self.node("Add", index, self.shared(np.int32(first), ir.DataType.INT32))
        return self.node("Cast", index, to=to)

    def looked_up(self, codes: Array, table: Array, part: str, to: ir.DataType) -> ir.Value:
        """What codes stand for in a table of numbers of type `to`; they take as many bits as the table needs."""
        index = self._unpack(codes.astype(np.int32), max(1, (len(table) - 1).bit_length()), part)
        return self.node("Gather", self.shared(table.astype(to.numpy()), to), index, axis=0)

    def _table_starts(self, tables: Array, counts: tuple[int, ...]) -> ir.Value:
        """Where the table of each tile starts among all tables: computed, so it takes no bytes."""
        whole = ir.DataType.INT32
        limits = (np.int32(0), np.int32(tables.size), np.int32(tables.shape[1]))
        bounds = [self.shared(limit, whole) for limit in limits]
        return self.reshape(self.node("Range", *bounds), counts)

    def _unpack(self, codes: Array, bits: int, part: str) -> ir.Value:
        """Codes from 0 as int32, in their shape, from planes of bits."""
        whole, offset = ir.DataType.INT32, 0
        sum_: ir.Value | None = None
        if bits == 16:
            return self.node("Cast", self.constant(part, codes, ir.DataType.UINT16), to=whole)
        for width, dtype in _PLANES:
            while bits - offset >= width:
                plane = (codes >> offset) & ((1 << width) - 1)
                suffix = part if width == bits else f"{part}_{offset}"
                number = (
                    self._sliced(plane, width, suffix)
                    if width < 4
                    else self.node("Cast", self.constant(suffix, plane, dtype), to=whole)
                )
                if offset:
                    number = self.node("Mul", number, self.shared(np.int32(1 << offset), whole))
                sum_ = number if sum_ is None else self.node("Add", sum_, number)
                offset += width
        assert sum_ is not None
        return sum_

    def _sliced(self, plane: Array, width: int, part: str) -> ir.Value:
        """A plane of 1 or 2 bits, int32 in its shape, from bytes that hold 8 or 4 codes, the first lowest.

        In int32, by division: OpenVINO (2026) folds BitShift of bytes wrongly in front of its int8 kernels.
        """
        each, whole = 8 // width, ir.DataType.INT32
        flat = np.zeros(-(-plane.size // each) * each, np.uint8)
        flat[: plane.size] = plane.reshape(-1)
        shifts = np.arange(0, 8, width, dtype=np.uint8)
        packed = (flat.reshape(-1, each) << shifts).sum(axis=1, keepdims=True).astype(np.uint8)
        byte = self.node("Cast", self.constant(part, packed, ir.DataType.UINT8), to=whole)
        moved = self.node("Div", byte, self.shared(np.int32(1) << shifts.astype(np.int32), whole))
        spread = self.node("Mod", moved, self.shared(np.int32(1 << width), whole))
        if flat.size != plane.size:
            spread = self._slice(self.reshape(spread, (-1,)), (plane.size,), (flat.size,))
        return self.reshape(spread, plane.shape)

    def _spread(self, numbers: ir.Value, shape: tuple[int, ...], tile: tuple[int, ...]) -> ir.Value:
        """One number for each tile as something that broadcasts against the tensor."""
        counts = tile_counts(shape, tile)
        if all(length == 1 or count == 1 for length, count in zip(tile, counts, strict=True)):
            return numbers
        # (c0, c1) → (c0, 1, c1, 1) → (c0, t0, c1, t1) → (c0 t0, c1 t1) → cut to the shape
        split = [n for count in counts for n in (count, 1)]
        wide = [n for pair in zip(counts, tile, strict=True) for n in pair]
        full = tuple(count * length for count, length in zip(counts, tile, strict=True))
        repeated = self.node("Expand", self.reshape(numbers, split), self.shape(wide))
        return self._slice(self.reshape(repeated, full), shape, full)

    def _slice(self, value: ir.Value, shape: tuple[int, ...], full: tuple[int, ...]) -> ir.Value:
        axes = [axis for axis, (dim, size) in enumerate(zip(shape, full, strict=True)) if dim != size]
        if not axes:
            return value
        ends = [shape[axis] for axis in axes]
        return self.node("Slice", value, self.shape([0] * len(axes)), self.shape(ends), self.shape(axes))

    def reshape(self, value: ir.Value, shape: tuple[int, ...] | list[int]) -> ir.Value:
        return self.node("Reshape", value, self.shape(shape))

    def shape(self, numbers: tuple[int, ...] | list[int]) -> ir.Value:
        return self.shared(np.array(numbers, np.int64), ir.DataType.INT64)

    def constant(self, part: str, array: Array | np.generic, dtype: ir.DataType) -> ir.Value:
        name = f"{self.name}{part}"
        if (made := next((value for value in self.initializers if value.name == name), None)) is not None:
            return made  # of a table that several nodes look up
        held = np.asarray(array).astype(dtype.numpy())
        tensor = ir.Tensor(held, dtype=dtype, name=name)
        value = ir.Value(name=tensor.name, shape=ir.Shape(held.shape), type=ir.TensorType(dtype), const_value=tensor)
        self.initializers.append(value)
        return value

    def shared(self, array: Array | np.generic, dtype: ir.DataType) -> ir.Value:
        """A constant that may stand in the program already."""
        held = np.asarray(array)
        key = (dtype.name, held.shape, held.tobytes())
        known = self.pool.constants
        if key not in known:
            value = self.constant("", held, dtype)
            value.name = f"lowbit~{len(known)}"
            known[key] = value
        return known[key]

    def node(self, op: str, *inputs: ir.Value, **attributes: Any) -> ir.Value:
        name = f"{self.name}~{len(self.nodes)}"
        output = ir.Value(name=name)
        attributes = {key: int(v) if isinstance(v, ir.DataType) else v for key, v in attributes.items()}
        self.nodes.append(ir.node(op, list(inputs), attributes, outputs=[output], name=name))
        return output
