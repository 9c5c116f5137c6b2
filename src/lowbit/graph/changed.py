"""What a pass did to a program, in words for the ledger."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass


@dataclass(frozen=True)
class Changed:
    """What a pass did, and what it left and why.

    done    one line for each change, naming the node
    kept    one line for each candidate left as it was, with the reason
    exact   the outputs are the same but for float rounding; False: the same on the data seen, or approximately
    True as a condition where anything was done; iterating gives all lines.
    """

    done: tuple[str, ...] = ()
    kept: tuple[str, ...] = ()
    exact: bool = True

    def __bool__(self) -> bool:
        return bool(self.done)

    def __iter__(self) -> Iterator[str]:
        return iter(self.done + self.kept)

    def __add__(self, other: Changed) -> Changed:
        return Changed(self.done + other.done, self.kept + other.kept, self.exact and other.exact)
