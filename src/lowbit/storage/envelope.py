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
    """Takes payloads as they come, then the program and the index; at most `most` bytes in all.

    The header stands in front and is written last: its place is as long as the longest that it can be.
    """

    def __init__(self, file: IO[bytes], most: int) -> None:
        self.file = file
        self.header_bytes = -(-len(_header(most, most, most)) // 8) * 8
        self.file.write(bytes(8 + self.header_bytes))
        self.data_bytes = 0

    def add(self, payload: bytes) -> None:
        """Append to the data."""
        self.file.write(payload)
        self.data_bytes += len(payload)

    def finish(self, program: bytes, index: bytes) -> None:
        """Write the other two parts, then the header that says where everything is."""
        text = _header(self.data_bytes, len(program), len(index)).ljust(self.header_bytes)
        assert len(text) == self.header_bytes
        self.file.write(program)
        self.file.write(index)
        self.file.seek(0)
        self.file.write(len(text).to_bytes(8, "little") + text)


def _header(*lengths: int) -> bytes:
    """The header of parts of these lengths."""
    header: dict[str, Any] = {"__metadata__": {"lowbit": str(VERSION)}}
    position = 0
    for part, length in zip(PARTS, lengths, strict=True):
        header[part] = {"dtype": "U8", "shape": [length], "data_offsets": [position, position + length]}
        position += length
    return json.dumps(header, separators=(",", ":")).encode()


@contextmanager
def writing(path: Path, most: int) -> Iterator[EnvelopeWriter]:
    """A container of at most `most` bytes that becomes `path` when all of it has been written."""
    with replacing(path) as aside, aside.open("wb") as file:
        yield EnvelopeWriter(file, most)
