"""Numbers as one reads them (bytes, decibels, how many times), and as JSON takes them."""

from dataclasses import asdict, is_dataclass
from math import inf, isfinite
from pathlib import Path
from typing import Any


def bytes_text(count: int) -> str:
    """1,152,582 B; from ten million on 11.5 MB (a megabyte is a million bytes)."""
    if count < 10_000_000:
        return f"{count:,} B"
    return f"{count / 1e6:,.1f} MB" if count < 10_000_000_000 else f"{count / 1e9:,.1f} GB"


def db_text(value: float) -> str:
    """A signal-to-noise ratio; values that are equal have an infinite one."""
    return "equal" if value == inf else f"{value:.1f} dB"


def times_text(ratio: float, more: str = "smaller", less: str = "larger", same: str = "same size") -> str:
    """3.9× smaller, or 1.2× larger for a ratio under one."""
    if 1 / 1.05 < ratio < 1.05:
        return same
    return f"{ratio:.1f}× {more}" if ratio >= 1 else f"{1 / ratio:.1f}× {less}"


def share_text(share: float | None) -> str:
    """A share of 1 in percent, to two digits."""
    value = 100 * (share or 0.0)
    return "" if share is None else f"{value:.0f} %" if value >= 9.5 else f"{value:.2g} %"


def joules_text(picojoules: float) -> str:
    """Energy: 56.7 µJ."""
    return f"{picojoules / 1e9:.3g} mJ" if picojoules >= 1e9 else f"{picojoules / 1e6:.3g} µJ"


def written_text(output: Path, seconds: float, after: int, before: int, note_bytes: int = 0) -> str:
    """That a file was written, and how much smaller it is; an exporter's notes are not counted as saved."""
    without = f" less {bytes_text(note_bytes)} of the exporter's notes" if note_bytes else ""
    sizes = f"{bytes_text(after)}, was {bytes_text(before)}{without} ({times_text((before - note_bytes) / after)})"
    return f"wrote {output} in {seconds:.{1 if seconds >= 1 else 2}f} s: {sizes}"


def plain(value: Any) -> Any:
    """Values for JSON: dataclasses become dicts, tuples lists, and numbers that JSON lacks (infinity, NaN) None."""
    if is_dataclass(value) and not isinstance(value, type):
        value = asdict(value)
    if isinstance(value, dict):
        return {key: plain(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(inner) for inner in value]
    return None if isinstance(value, float) and not isfinite(value) else value
