"""Numbers as one reads them: bytes, decibels, how many times."""

from math import inf


def bytes_text(count: int) -> str:
    """1,152,582 B; from ten million on 11.5 MB (a megabyte is a million bytes)."""
    if count < 10_000_000:
        return f"{count:,} B"
    return f"{count / 1e6:,.1f} MB" if count < 10_000_000_000 else f"{count / 1e9:,.1f} GB"


def db_text(value: float) -> str:
    """A signal-to-noise ratio; values that are equal have an infinite one."""
    return "equal" if value == inf else f"{value:.1f} dB"


def times_text(ratio: float, more: str, less: str, same: str) -> str:
    """3.9× smaller, or 1.2× larger for a ratio under one."""
    if 1 / 1.05 < ratio < 1.05:
        return same
    return f"{ratio:.1f}× {more}" if ratio >= 1 else f"{1 / ratio:.1f}× {less}"
