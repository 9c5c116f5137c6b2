"""What an integer program takes on a device: constants in flash, values in the arena, products, layer by layer."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from lowbit.integer.bounds import layer_bounds
from lowbit.integer.plan import Plan, plan
from lowbit.integer.program import Add, Conv, Copy, Layer, Multiply, Program, Table
from lowbit.integer.sequences import Normalize, Recurrent
from lowbit.integer.weights import per_output, stored

_COLUMNS = 48  # of the drawing: the arena from its first byte to its last


@dataclass(frozen=True)
class Memory:
    """A row for each layer, and the arena's plan."""

    rows: list[dict[str, Any]]
    placed: Plan

    @staticmethod
    def of(program: Program) -> "Memory":
        placed = plan(program)
        rows = []
        for step, layer in enumerate(program.layers, 1):
            row: dict[str, Any] = {"layer": layer.name, "kind": type(layer).__name__, "shape": layer.output.shape[1:]}
            row |= {"products": getattr(layer, "products", 0), "flash": constants(layer)}
            row |= {"ram": placed.alive(step), "step": step}
            if bounds := [bound for bound, _ in layer_bounds(layer)]:
                row["accumulator_bits"] = max(bound.bits for bound in bounds)
                row["avx2_saturates"] = any(bound.saturates for bound in bounds)
            rows.append(row)
        return Memory(rows, placed)

    def to_dict(self) -> dict[str, Any]:
        return {
            "flash_bytes": sum(row["flash"] for row in self.rows),
            "arena_bytes": self.placed.bytes,
            "products": sum(row["products"] for row in self.rows),
            "layers": [{**row, "shape": list(row["shape"])} for row in self.rows],
        }

    def lines(self) -> Iterator[str]:
        """A table of text, the arena drawn beside each layer: █ where a value lies, ▒ what the layer writes."""
        wide = max(len(row["layer"]) for row in self.rows)
        yield f"{'layer':{wide}}  {'output':>12} {'products':>11} {'flash':>8} {'ram':>8} {'bits':>4}  arena"
        peak = self.placed.peak()
        for row in self.rows:
            shape = "×".join(map(str, row["shape"]))
            mark = " ← peak" if row["step"] == peak else ""
            bits = f"{row.get('accumulator_bits', ''):>4}"
            numbers = f"{row['products']:>11,} {row['flash']:>8,} {row['ram']:>8,} {bits}"
            yield f"{row['layer']:{wide}}  {shape:>12} {numbers}  {self._drawn(row['step'], row['layer'])}{mark}"
        total = self.to_dict()
        yield (
            f"flash: {total['flash_bytes']:,} bytes of constants, beside the code · arena: {total['arena_bytes']:,} "
            f"bytes, inputs and outputs included · {total['products']:,} products"
        )
        if saturating := [row["layer"] for row in self.rows if row.get("avx2_saturates")]:
            yield (
                f"on x86 without VNNI, 16-bit sums of two products can saturate in onnxruntime in {len(saturating)} "
                f"layers: {', '.join(saturating[:8])}{' …' * (len(saturating) > 8)}. Target onnxruntime-avx2 cannot."
            )

    def _drawn(self, step: int, layer: str) -> str:
        cells = ["·"] * _COLUMNS
        for slot in self.placed.slots.values():
            if slot.first <= step <= slot.last and slot.bytes:
                begin = slot.offset * _COLUMNS // self.placed.bytes
                end = -(-(slot.offset + slot.bytes) * _COLUMNS // self.placed.bytes)
                cells[begin:end] = ["▒" if slot.name == layer else "█"] * (end - begin)
        return "".join(cells)


def constants(layer: Layer) -> int:
    """Bytes of a layer's constants in the C: weights, biases, multipliers, shifts, tables."""
    if isinstance(layer, Conv):
        beside = layer.bias.itemsize + layer.rescale.multiplier.itemsize + 1
        return int(stored(layer).nbytes) + len(per_output(layer, layer.bias)) * beside
    if isinstance(layer, Table):
        return int(layer.table.nbytes)
    if isinstance(layer, Normalize):
        return int(layer.weight.nbytes + layer.bias.nbytes)
    if isinstance(layer, Recurrent):  # beside the tanh table, which all share
        return int(layer.weight.nbytes + layer.recurrent.nbytes) + 2 * 9 * len(layer.weight)
    if isinstance(layer, (Add, Multiply)):
        return 0 if layer.constant is None else int(np.asarray(layer.constant).nbytes)
    if isinstance(layer, Copy):
        return sum(3 * 4 * len(piece.counts) for piece in layer.pieces)
    return 0
