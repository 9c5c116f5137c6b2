"""Text that travels in a model file, made small: a ledger has a row for every tensor, as much as a small network.

A line for each row: its kind, then its values, a tab between them. The first lines are the number of kinds and the
names of the values of each. What is empty is left out and numbers keep four digits. Deflated, in base 85, that is two
thirds of the same rows as JSON, deflated, in base 64.
"""

import base64
import json
import zlib
from collections.abc import Mapping, Sequence
from typing import Any

from lowbit.errors import InputError

_MARK = "table:"
_OLDER_MARK = "zlib:"  # rows as JSON, base 64
_LARGEST_TEXT = 1 << 28  # bytes; a file that claims more is hostile or broken


def to_text(rows: Sequence[Mapping[str, Any]]) -> str:
    """Rows of JSON values as compressed ASCII; None, "" and digits beyond the fourth are not kept."""
    kinds: dict[tuple[str, ...], int] = {}
    lines = []
    for row in rows:
        kept = {key: _short(value) for key, value in row.items() if value is not None and value != ""}
        lines.append([kinds.setdefault(tuple(kept), len(kinds)), *kept.values()])
    table = [[len(kinds)], *kinds, *lines]
    text = "\n".join("\t".join(map(_word, line)) for line in table)
    pack = zlib.compressobj(9, wbits=-15)
    return _MARK + base64.b85encode(pack.compress(text.encode()) + pack.flush()).decode("ascii")


def from_text(text: str) -> Any:
    """The rows that `to_text` was given, or the value of plain JSON; InputError for anything else."""
    try:
        if text.startswith(_MARK):
            return _rows(_inflate(base64.b85decode(text[len(_MARK) :]), -15))
        if text.startswith(_OLDER_MARK):
            text = _inflate(base64.b64decode(text[len(_OLDER_MARK) :], validate=True), 15)
        return json.loads(text)
    except (ValueError, TypeError, LookupError, zlib.error) as error:
        raise InputError(f"metadata of the file is damaged: {error}.") from None


def _rows(text: str) -> list[dict[str, Any]]:
    (count,), *table = ([_value(word) for word in line.split("\t")] for line in text.split("\n"))
    kinds, lines = table[:count], table[count:]
    return [dict(zip(kinds[kind], values, strict=True)) for kind, *values in lines]


def _word(value: Any) -> str:
    """JSON, but a string stands as it is where it can be told from JSON: quotes are a fifth of a small table."""
    return value if isinstance(value, str) and value.isprintable() and _value(value) is value else json.dumps(value)


def _value(word: str) -> Any:
    try:
        return json.loads(word)
    except ValueError:
        return word


def _short(value: Any) -> Any:
    if not isinstance(value, float):
        return value
    rounded = float(f"{value:.4g}")
    return int(rounded) if rounded.is_integer() and abs(rounded) < 1e4 else rounded


def _inflate(packed: bytes, window: int) -> str:
    return zlib.decompressobj(window).decompress(packed, _LARGEST_TEXT).decode()
