"""The ledger: what became of every tensor of a network, as a page, as JSON, and summed up."""

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from lowbit.errors import InputError
from lowbit.metadata import from_text
from lowbit.report.words import bytes_text, times_text

if TYPE_CHECKING:
    import onnx_ir as ir

    from lowbit.model import Model

Row = Mapping[str, Any]
MOST = 0.5  # of the weight bytes: above, a verdict says that they stayed float
REASONS_SHOWN = 2
SMALL = 1024  # bytes; smaller stored tensors are summed up in one line unless all are asked for


@dataclass(frozen=True)
class Ledger:
    """Rows of {tensor, role, layer, format, bits, range, solver, bytes, status, reason}.

    own is True where lowbit wrote the file, with its recipe; else the rows are read off the stored tensors
    """

    rows: tuple[Row, ...]
    recipe: str
    version: str
    calibration: str
    own: bool

    @classmethod
    def of(cls, model: "Model") -> "Ledger":
        """The ledger that travels in the file; of a file without one, its stored tensors."""
        metadata = model.metadata
        text = metadata.get("lowbit.ledger")
        if text is None:
            return cls(tuple(_stored_rows(model.program)), "", "", "", False)
        try:
            rows = from_text(text)
            if not isinstance(rows, list) or not all(isinstance(row, dict) and "tensor" in row for row in rows):
                raise ValueError("it is not a list of tensors")
        except (ValueError, RecursionError) as problem:
            raise InputError(f"'{model.source}': its ledger cannot be read: {problem}.") from None
        recipe, version, calibration = (
            metadata.get(f"lowbit.{key}", "") for key in ("recipe", "version", "calibration")
        )
        return cls(tuple(rows), recipe, version, calibration, True)

    def counts(self) -> dict[str, Any]:
        """How many tensors and bytes are quantized and how many are float, and why."""
        stored = [row for row in self.rows if row.get("bytes")]
        quantized = [row for row in stored if row.get("status") == "quantized"]
        left = [row for row in self.rows if row.get("status") == "float" and row.get("reason")]
        return {
            "weights_quantized": sum(row.get("role") in ("weight", "constant") for row in quantized),
            "biases_quantized": sum(row.get("role") == "bias" for row in quantized),
            "activations_quantized": sum(
                row.get("role") == "activation" and row.get("status") == "quantized" for row in self.rows
            ),
            "bytes_quantized": sum(row["bytes"] for row in quantized),
            "bytes_float": sum(row["bytes"] for row in stored if row.get("status") == "float"),
            "float_reasons": dict(Counter(str(row["reason"]) for row in left).most_common()),
        }

    def float_text(self) -> str:
        """What a verdict must add where most weight bytes stayed float; empty where they did not, or nobody says."""
        left: Counter[str] = Counter()
        for row in self.rows:
            if row.get("status") == "float" and row.get("bytes"):
                left[str(row.get("reason"))] += int(row["bytes"])
        quantized = sum(
            row["bytes"] * 32 / row["bits"]
            for row in self.rows
            if row.get("status") == "quantized" and row.get("bytes") and row.get("bits")
        )
        share = left.total() / max(1, left.total() + quantized)
        if not self.own or share <= MOST:
            return ""
        reasons = "; ".join(reason for reason, _ in left.most_common(REASONS_SHOWN))
        return f"{100 * share:.0f} % of the weight bytes stayed float: {reasons}"

    def to_dict(self, file: Path) -> dict[str, Any]:
        """Plain values for JSON."""
        return {
            "file": str(file),
            "bytes_on_disk": file.stat().st_size,
            "lowbit_version": self.version or None,
            "recipe": self.recipe or None,
            "calibration": _read(self.calibration),
            "bytes_by_kind": self.bytes_by_kind(),
            **self.counts(),
            "tensors": list(self.rows),
        }

    def bytes_by_kind(self) -> dict[str, int]:
        """Bytes of the stored tensors by role and format, the largest first."""
        found: Counter[str] = Counter()
        for row in self.rows:
            if row.get("bytes"):
                found[f"{row.get('role', 'value')} {row.get('format', '')}".strip()] += int(row["bytes"])
        return dict(found.most_common())

    def view(self, file: Path, every: bool = False) -> RenderableType:
        """The page of `lowbit show`."""
        size = file.stat().st_size
        head = f"{file.name}, {bytes_text(size)}" + (f", written by lowbit {self.version}" if self.own else "")
        parts: list[RenderableType] = [Text(head, style="bold")]
        if calibration := _read(self.calibration):
            parts.append(
                Text("calibrated on " + ", ".join(f"{key} {value}" for key, value in calibration.items() if value))
            )
        parts += ["", self._stored_table(every)]
        activations = [row for row in self.rows if row.get("role") == "activation"]
        if activations:
            parts += ["", _activation_table(activations)]
        parts += ["", self._totals(size)]
        if told := self.float_text():
            parts.append(f"\n{told}.")
        if not self.own:
            parts.append("\nNot written by lowbit: no ledger. 'lowbit quantize' makes it smaller.")
        return Group(*parts)

    def summary(self, output: Path, before: tuple[int, int], after: int, seconds: float) -> str:
        """What `lowbit quantize` says at its end.

        before   bytes of the network that was quantized, and how many of them are an exporter's notes
        """
        counts, (size, notes) = self.counts(), before
        smaller = times_text((size - notes) / after, "smaller", "larger", "same size")
        without = f" less {bytes_text(notes)} of the exporter's notes" if notes else ""
        lines = [
            f"wrote {output} in {seconds:.1f} s: {bytes_text(after)}, was {bytes_text(size)}{without} ({smaller})",
            f"in integers: {counts['weights_quantized']} weights, {counts['biases_quantized']} biases, "
            f"{counts['activations_quantized']} activations",
        ]
        if told := self.float_text():
            lines.append(told)
        for reason, count in counts["float_reasons"].items():
            lines.append(f"in float: {count} tensor{'s' * (count != 1)}: {reason}")
        return "\n".join(lines)

    def _stored_table(self, every: bool) -> Table:
        stored = [row for row in self.rows if row.get("bytes")]
        shown = [row for row in stored if every or row["bytes"] >= SMALL or row.get("role") == "weight"]
        table = _table("stored tensor", "is a", "format", "bits", "bytes", "SQNR", "layer", "how, or why not")
        for row in shown:
            noise = row.get("sqnr_db")
            table.add_row(
                str(row["tensor"]),
                str(row.get("role", "")),
                str(row.get("format", "")),
                _bits(row.get("bits")),
                f"{row['bytes']:,}",
                "" if noise is None else f"{noise:.1f} dB",
                str(row.get("layer", "")),
                str(row.get("reason") or " ".join(filter(None, (row.get("range"), row.get("solver"))))),
                style="" if row.get("status") == "quantized" else "dim",
            )
        if hidden := len(stored) - len(shown):
            small = sum(row["bytes"] for row in stored) - sum(row["bytes"] for row in shown)
            table.add_row(f"{hidden} smaller ones (--all)", "", "", "", f"{small:,}", "", "", "", style="dim")
        return table

    def _totals(self, size: int) -> Table:
        table = _table("bytes of", "", "share")
        kinds = self.bytes_by_kind()
        rest = size - sum(kinds.values())
        for kind, count in [*kinds.items(), ("graph, scales and the ledger itself", rest)]:
            if count > 0:
                table.add_row(kind, f"{count:,}", f"{100 * count / size:.1f} %")
        return table


def _activation_table(rows: list[Row]) -> Table:
    table = _table("value", "format", "from", "to", "range", "layer", "why float")
    for row in rows:
        bounds = [f"{row[end]:.4g}" if isinstance(row.get(end), (int, float)) else "" for end in ("lo", "hi")]
        table.add_row(
            str(row["tensor"]),
            str(row.get("format", "")),
            *bounds,
            str(row.get("range") or ""),
            str(row.get("layer", "")),
            str(row.get("reason") or ""),
            style="" if row.get("status") == "quantized" else "dim",
        )
    return table


def _table(*headings: str) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
    for heading in headings:
        right = heading in ("bits", "bytes", "SQNR", "from", "to", "", "share")
        table.add_column(heading, justify="right" if right else "left", overflow="fold")
    return table


def _stored_rows(program: "ir.Model") -> list[Row]:
    """A row for each stored tensor of any ONNX file."""
    rows: list[Row] = []
    for name, value in program.graph.initializers.items():
        tensor = value.const_value
        if tensor is None:
            continue
        users = [use.node for use in value.uses()]
        readers = sorted({node.op_type for node in users})
        dequantized = "DequantizeLinear" in readers and not tensor.dtype.is_floating_point()
        rows.append(
            {
                "tensor": name,
                "role": "weight" if len(tensor.shape) > 1 else "value",
                "layer": users[0].name if users else "",
                "format": f"{tensor.dtype.name.lower()} {list(tensor.shape)}",
                "bits": tensor.dtype.bitwidth,
                "bytes": tensor.nbytes,
                "status": "quantized" if dequantized else "float" if tensor.dtype.is_floating_point() else "kept",
                "reason": f"read by {', '.join(readers)}" if readers else "not read",
            }
        )
    return rows


def _read(text: str) -> dict[str, Any]:
    try:
        found = json.loads(text or "{}")
    except (ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def _bits(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, (int, float)) else ""
