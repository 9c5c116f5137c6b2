"""Text that travels in a model file, made small: a ledger has a row for every tensor, as much as a small network."""

import base64
import json
import zlib
from typing import Any

from lowbit.errors import InputError

_MARK = "zlib:"
_LARGEST_TEXT = 1 << 28  # bytes; a file that claims more is hostile or broken


def to_text(value: Any) -> str:
    """A JSON value as compressed ASCII."""
    packed = zlib.compress(json.dumps(value, separators=(",", ":")).encode(), 9)
    return _MARK + base64.b64encode(packed).decode("ascii")


def from_text(text: str) -> Any:
    """The value that `to_text` was given, or that is plain JSON; InputError for anything else."""
    try:
        if text.startswith(_MARK):
            unpack = zlib.decompressobj()
            text = unpack.decompress(base64.b64decode(text[len(_MARK) :], validate=True), _LARGEST_TEXT).decode()
        return json.loads(text)
    except (ValueError, zlib.error) as error:
        raise InputError(f"metadata of the file is damaged: {error}.") from None
