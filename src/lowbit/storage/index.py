"""The index of a container: how each unit is coded, which files there are, and what was cut out of them.

Everything here is checked before anything is allocated for it: sizes against `max_bytes`, cuts against their file's
size and their unit's, payloads against the container's.
"""

import lzma
import zlib
from dataclasses import dataclass

from lowbit.errors import InputError
from lowbit.storage.codecs import WIDTHS, Codec, describe, read_codec
from lowbit.storage.wire import Reader, numbers

LARGEST_UNIT = 1 << 24
"""Longer contents are coded in parts, so that memory stays bounded whatever the size of a tensor."""
LZMA_FILTERS = [{"id": lzma.FILTER_LZMA2, "preset": 9, "dict_size": 1 << 24, "lc": 3, "lp": 0, "pb": 0}]


@dataclass(frozen=True)
class Cut:
    """A stretch of a file that is kept in a unit instead of among the file's remaining bytes.

    start, length   in the file
    unit, offset    number of the unit that holds it, and where it begins in the unit's bytes
    factor          0, or the bits of a float32: the unit's bytes are float32 numbers, and the stretch holds each times
                    this one, rounded to float32 (the scales of biases are such products)
    """

    start: int
    length: int
    unit: int
    offset: int
    factor: int = 0


@dataclass(frozen=True)
class Unit:
    """Bytes that are coded together: one tensor, a part of a large one, or several small ones of a kind.

    size            of the decoded bytes;  crc is their CRC-32
    payload_bytes   they take in the container's data, where the units follow each other
    """

    codec: Codec
    size: int
    payload_bytes: int
    crc: int


@dataclass(frozen=True)
class File:
    """One file: its name ("" for the model itself), size, SHA-256, and its cuts in order."""

    name: str
    size: int
    sha256: bytes
    cuts: list[Cut]

    @property
    def rest_size(self) -> int:
        """Bytes of the file that were not cut out."""
        return self.size - sum(cut.length for cut in self.cuts)


@dataclass(frozen=True)
class Index:
    """All that is known of a container without its payloads."""

    units: list[Unit]
    files: list[File]

    def write(self) -> bytes:
        """Units and files, as docs/container.md lays them out."""
        out = [numbers([len(self.units)])]
        for unit in self.units:
            out += [numbers([unit.codec.width, unit.size, unit.payload_bytes]), unit.crc.to_bytes(4, "little")]
            out.append(describe(unit.codec))
        out.append(numbers([len(self.files)]))
        for file in self.files:
            name = file.name.encode()
            ends = [0, *(cut.start + cut.length for cut in file.cuts)]
            skips = [cut.start - end for cut, end in zip(file.cuts, ends, strict=False)]
            rows = [
                (skip, cut.length, cut.unit, cut.offset, cut.factor) for skip, cut in zip(skips, file.cuts, strict=True)
            ]
            out += [numbers([len(name)]), name, file.sha256, numbers([file.size, len(rows)])]
            out += map(numbers, zip(*rows, strict=True))  # by columns: LZMA finds more
        return b"".join(out)

    @staticmethod
    def read(source: Reader, data_bytes: int, max_bytes: int) -> "Index":
        """The inverse of write. data_bytes: payloads there are; max_bytes: the most that all files may take."""
        most = min(max_bytes, LARGEST_UNIT)
        units = [_read_unit(source, data_bytes, most) for _ in range(source.number(source.left))]
        if sum(unit.payload_bytes for unit in units) != data_bytes:
            raise InputError(f"a container is damaged: its payloads do not take its {data_bytes} bytes of data.")
        files = [_read_file(source, units) for _ in range(source.number(source.left))]
        total = sum(file.size for file in files)
        if not files or files[0].name or total > max_bytes:
            raise InputError(
                f"the container says that it unpacks to {total} bytes in {len(files)} files; at most {max_bytes} are "
                "allowed. If you trust it, allow more with max_bytes."
            )
        return Index(units, files)


def _read_unit(source: Reader, data_bytes: int, most: int) -> Unit:
    width, size, payload_bytes = source.number(8), source.number(most), source.number(data_bytes)
    crc = int.from_bytes(source.take(4), "little")
    if width not in WIDTHS or size % width:
        raise InputError(f"the index of a container is damaged: {size} bytes of {width}-byte elements.")
    return Unit(read_codec(source, width), size, payload_bytes, crc)


def _read_file(source: Reader, units: list[Unit]) -> File:
    name = bytes(source.take(source.number())).decode("utf-8", "replace")
    sha256, size, count = bytes(source.take(32)), source.number(), source.number(source.left)
    cuts = []
    position = 0
    for skip, length, unit, offset, factor in zip(*(source.column(count) for _ in range(5)), strict=True):
        start, position = position + skip, position + skip + length
        if position > size or not length or unit >= len(units) or offset + length > units[unit].size:
            raise InputError("the index of a container is damaged: a tensor lies nowhere.")
        if factor and (factor >> 32 or length % 4):
            raise InputError("the index of a container is damaged: a product is not of float32 numbers.")
        cuts.append(Cut(start, length, unit, offset, factor))
    return File(name, size, sha256, cuts)


def squeeze(data: bytes) -> bytes:
    """`data` under LZMA2 behind its size and its CRC-32."""
    squeezed = lzma.compress(data, format=lzma.FORMAT_RAW, filters=LZMA_FILTERS)
    return numbers([len(data)]) + zlib.crc32(data).to_bytes(4, "little") + squeezed


def expand(squeezed: bytes, most: int, what: str) -> bytes:
    """The inverse of squeeze; never more than `most` bytes are made of it."""
    source = Reader(squeezed, what)
    size, crc = source.number(most), int.from_bytes(source.take(4), "little")
    try:
        decompressor = lzma.LZMADecompressor(format=lzma.FORMAT_RAW, filters=LZMA_FILTERS)
        data = decompressor.decompress(source.take(source.left), size + 1)
    except (lzma.LZMAError, EOFError) as error:
        raise InputError(f"{what} is damaged: {error}.") from None
    if len(data) != size or zlib.crc32(data) != crc:
        raise InputError(f"{what} is damaged: its checksum does not fit.")
    return data
