"""The ledger: what became of every tensor of a network, as a page, as JSON, and summed up."""

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Group, RenderableType
from rich.text import Text

from lowbit.errors import InputError
from lowbit.metadata import from_text
from lowbit.report.table import table
from lowbit.report.words import bytes_text, written_text

if TYPE_CHECKING:
    import onnx_ir as ir

    from lowbit.model import Model

Row = Mapping[str, Any]
MOST = 0.5  # of the weight bytes: above, a verdict says that they stayed float
REASONS_SHOWN = 2
NAMES_SHOWN = 8
SMALL = 1024  # bytes; smaller stored tensors are summed up in one line unless all are asked for


@dataclass(frozen=True)
class Ledger:
    """Rows of {tensor, role, layer, format, bits, range, solver, bytes, status, reason}.

    own is True where lowbit wrote the file, with its recipe; else the rows are read off the stored tensors
    left_out: steps that could not do their work, and why
    """

    rows: tuple[Row, ...]
    own: bool = False
    recipe: str = ""
    version: str = ""
    calibration: Mapping[str, Any] | None = None
    left_out: tuple[str, ...] = ()

    @classmethod
    def of(cls, model: "Model") -> "Ledger":
        """The ledger that travels in the file; of a file without one, its stored tensors."""
        metadata = model.metadata
        if (text := metadata.get("lowbit.ledger")) is None:
            return cls(tuple(_stored_rows(model.program)))
        try:
            rows = from_text(text)
            if not isinstance(rows, list) or not all(isinstance(row, dict) and "tensor" in row for row in rows):
                raise ValueError("it is not a list of tensors")
            calibration = json.loads(metadata.get("lowbit.calibration", "{}"))
            if not isinstance(calibration, dict):
                raise ValueError("its calibration is no table")
            notes = [str(note) for note in json.loads(metadata.get("lowbit.passes", "[]"))]
        except (ValueError, RecursionError) as problem:
            raise InputError(f"'{model.source}': its ledger cannot be read: {problem}.") from None
        left_out = tuple(note for note in notes if note.startswith("left out: "))
        recipe, version = metadata.get("lowbit.recipe", ""), metadata.get("lowbit.version", "")
        return cls(tuple(rows), True, recipe, version, calibration, left_out)

    def stored(self, *status: str) -> list[Row]:
        """Rows of tensors that take bytes in the file, of all or of these statuses."""
        return [row for row in self.rows if row.get("bytes") and (not status or row.get("status") in status)]

    def counts(self) -> dict[str, Any]:
        """How many tensors and bytes are quantized and how many are float, and why."""
        quantized = self.stored("quantized")
        roles = Counter(row.get("role") for row in quantized)
        reasons = [row["reason"] for row in self.rows if row.get("status") == "float" and row.get("reason")]
        return {
            "weights_quantized": roles["weight"] + roles["constant"],
            "biases_quantized": roles["bias"],
            "activations_quantized": sum(row.get("status") == "quantized" for row in self._activations()),
            "bytes_quantized": sum(row["bytes"] for row in quantized),
            "bytes_float": sum(row["bytes"] for row in self.stored("float")),
            "float_reasons": dict(Counter(map(str, reasons)).most_common()),
        }

    def float_text(self) -> str:
        """What a verdict must add where most weight bytes stayed float; empty where they did not, or nobody says."""
        left: Counter[str] = Counter()
        for row in self.stored("float"):
            left[str(row.get("reason"))] += int(row["bytes"])
        quantized = sum(row["bytes"] * 32 / row["bits"] for row in self.stored("quantized") if row.get("bits"))
        share = left.total() / max(1, left.total() + quantized)
        if not self.own or share <= MOST:
            return ""
        reasons = "; ".join(reason for reason, _ in left.most_common(REASONS_SHOWN))
        return f"{100 * share:.0f} % of the weight bytes stayed float: {reasons}"

    def dynamic_text(self) -> str:
        """How many layers measure the range of what they read at each input, and their names."""
        layers = list(dict.fromkeys(str(row["layer"]) for row in self.rows if row.get("dynamic")))
        names = ", ".join(layers[:NAMES_SHOWN]) + ", …" * (len(layers) > NAMES_SHOWN)
        return f"measured at each input: {len(layers)} layer{'s' * (len(layers) != 1)}: {names}" if layers else ""

    def to_dict(self, file: Path) -> dict[str, Any]:
        """Plain values for JSON."""
        return {
            "file": str(file),
            "bytes_on_disk": file.stat().st_size,
            "lowbit_version": self.version or None,
            "recipe": self.recipe or None,
            "calibration": self.calibration or {},
            "bytes_by_kind": self.bytes_by_kind(),
            **self.counts(),
            "left_out": list(self.left_out),
            "tensors": list(self.rows),
        }

    def bytes_by_kind(self) -> dict[str, int]:
        """Bytes of the stored tensors by role and format, the largest first."""
        found: Counter[str] = Counter()
        for row in self.stored():
            found[f"{row.get('role', 'value')} {row.get('format', '')}".strip()] += int(row["bytes"])
        return dict(found.most_common())

    def view(self, file: Path, every: bool = False) -> RenderableType:
        """The page of `lowbit show`."""
        size = file.stat().st_size
        head = f"{file.name}, {bytes_text(size)}" + (f", written by lowbit {self.version}" if self.own else "")
        parts: list[RenderableType] = [Text(head, style="bold")]
        if told := ", ".join(f"{key} {value}" for key, value in (self.calibration or {}).items() if value):
            parts.append(Text(f"calibrated on {told}"))
        headings = ("stored tensor", "is a", "format", ">bits", ">bytes", ">SQNR", "layer", "how, or why not")
        parts += ["", table(headings, self._stored_cells(every))]
        if activations := [_activation_cells(row) for row in self._activations()]:
            parts += ["", table(("value", "format", ">from", ">to", "range", "layer", "why float"), activations)]
        kinds = self.bytes_by_kind()
        kinds["graph, scales and the ledger itself"] = size - sum(kinds.values())
        shares = [(kind, f"{n:,}", f"{100 * n / size:.1f} %") for kind, n in kinds.items() if n > 0]
        parts += ["", table(("bytes of", ">", ">share"), shares)]
        for told in filter(None, (self.float_text(), *self.left_out)):
            parts.append(f"\n{told}.")
        if not self.own:
            parts.append("\nNot written by lowbit: no ledger. 'lowbit quantize' makes it smaller.")
        return Group(*parts)

    def summary(self, output: Path, before: tuple[int, int], after: int, seconds: float) -> str:
        """What `lowbit quantize` says at its end.

        before   bytes of the network that was quantized, and how many of them are an exporter's notes
        """
        counts = self.counts()
        integers = f"{counts['weights_quantized']} weights, {counts['biases_quantized']} biases"
        lines = [
            written_text(output, seconds, after, *before),
            f"in integers: {integers}, {counts['activations_quantized']} activations",
            self.dynamic_text(),
            self.float_text(),
        ]
        for reason, count in counts["float_reasons"].items():
            lines.append(f"in float: {count} tensor{'s' * (count != 1)}: {reason}")
        lines += self.left_out
        return "\n".join(filter(None, lines))

    def _activations(self) -> list[Row]:
        return [row for row in self.rows if row.get("role") == "activation"]

    def _stored_cells(self, every: bool) -> list[tuple[object, ...]]:
        """A row of the page for each stored tensor; those of a few bytes in one row unless `every`."""
        cells: list[tuple[object, ...]] = []
        small: list[int] = []
        for row in self.stored():
            if not every and row["bytes"] < SMALL and row.get("role") != "weight":
                small.append(row["bytes"])
                continue
            words = (row.get("range"), row.get("solver"), "· dynamic activations" * row.get("dynamic", False))
            noise, how = row.get("sqnr_db"), " ".join(filter(None, words))
            sizes = (_number(row.get("bits")), f"{row['bytes']:,}", None if noise is None else f"{noise:.1f} dB")
            name = (row["tensor"], row.get("role"), row.get("format"))
            cells.append((*name, *sizes, row.get("layer"), row.get("reason") or how, _style(row)))
        if small:
            cells.append((f"{len(small)} smaller ones (--all)", "", "", "", f"{sum(small):,}", "", "", "", "dim"))
        return cells


def _activation_cells(row: Row) -> tuple[object, ...]:
    bounds = (_number(row.get("lo")), _number(row.get("hi")))
    told = (row.get("range"), row.get("layer"), row.get("reason"))
    return (row["tensor"], row.get("format"), *bounds, *told, _style(row))


def _style(row: Row) -> str:
    return "" if row.get("status") == "quantized" else "dim"


def _number(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, (int, float)) else ""


def _stored_rows(program: "ir.Model") -> list[Row]:
    """A row for each stored tensor of any ONNX file."""
    rows: list[Row] = []
    for name, value in program.graph.initializers.items():
        if (tensor := value.const_value) is None:
            continue
        readers = sorted({use.node.op_type for use in value.uses()})
        real = tensor.dtype.is_floating_point()
        dequantized = "DequantizeLinear" in readers and not real
        rows.append(
            {
                "tensor": name,
                "role": "weight" if len(tensor.shape) > 1 else "value",
                "layer": next((use.node.name for use in value.uses()), ""),
                "format": f"{tensor.dtype.name.lower()} {list(tensor.shape)}",
                "bits": tensor.dtype.bitwidth,
                "bytes": tensor.nbytes,
                "status": "quantized" if dequantized else "float" if real else "kept",
                "reason": f"read by {', '.join(readers)}" if readers else "not read",
            }
        )
    return rows
