"""The outermost layer of a container: a safetensors file of three byte arrays, data, program and index, in that order.

Any safetensors reader can list them; this one refuses whatever a container would not say.
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from lowbit.errors import InputError
from lowbit.storage.atomic import replacing

VERSION = 1
HEADER_BYTES = 256
"""What a writer reserves for the header; a reader accepts up to MAX_HEADER_BYTES."""
MAX_HEADER_BYTES = 4096
PARTS = ("data", "program", "index")


@dataclass(frozen=True)
class Envelope:
    """Where the three parts of a container lie: name → (start, stop) in the file."""

    parts: dict[str, tuple[int, int]]

    @staticmethod
    def read(file: IO[bytes], size: int, name: str) -> "Envelope":
        """Read and check the header of a container of `size` bytes."""
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or not 2 <= length <= min(size - 8, MAX_HEADER_BYTES):
            raise InputError(f"'{name}' is not a .lowbit container, or it was cut short.")
        try:
            header = json.loads(file.read(length), object_pairs_hook=_without_repeats)
            version = header.pop("__metadata__")["lowbit"]
            spans = {part: tuple(header.pop(part)["data_offsets"]) for part in PARTS}
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
            raise InputError(f"'{name}' is not a .lowbit container, or its header is damaged.") from None
        if version != str(VERSION):
            raise InputError(
                f"'{name}' is a container of version {version!r:.20}; this lowbit reads {VERSION}. Upgrade it."
            )
        position = 0
        for part in PARTS:
            start, stop = spans[part] if len(spans[part]) == 2 else (None, None)
            if type(start) is not int or type(stop) is not int or start != position or stop < start or header:
                raise InputError(f"'{name}' is damaged: its header places '{part}' where it cannot be.")
            position = stop
        if 8 + length + position != size:
            raise InputError(f"'{name}' is {size} bytes long where its header says {8 + length + position}: cut short?")
        return Envelope({part: (8 + length + start, 8 + length + stop) for part, (start, stop) in spans.items()})


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len({key for key, _ in pairs}) != len(pairs):
        raise ValueError("a key occurs twice")
    return dict(pairs)


class EnvelopeWriter:
    """Takes payloads as they come, then the program and the index."""

    def __init__(self, file: IO[bytes]) -> None:
        self.file = file
        self.file.write(bytes(8 + HEADER_BYTES))
        self.data_bytes = 0

    def add(self, payload: bytes) -> None:
        """Append to the data."""
        self.file.write(payload)
        self.data_bytes += len(payload)

    def finish(self, program: bytes, index: bytes) -> None:
        """Write the other two parts, then the header that says where everything is."""
        header: dict[str, Any] = {"__metadata__": {"lowbit": str(VERSION)}}
        position = 0
        for part, length in zip(PARTS, (self.data_bytes, len(program), len(index)), strict=True):
            header[part] = {"dtype": "U8", "shape": [length], "data_offsets": [position, position + length]}
            position += length
        text = json.dumps(header, separators=(",", ":")).encode().ljust(HEADER_BYTES)
        self.file.write(program)
        self.file.write(index)
        self.file.seek(0)
        self.file.write(len(text).to_bytes(8, "little") + text)


@contextmanager
def writing(path: Path) -> Iterator[EnvelopeWriter]:
    """A container that becomes `path` when all of it has been written."""
    with replacing(path) as aside, aside.open("wb") as file:
        yield EnvelopeWriter(file)
