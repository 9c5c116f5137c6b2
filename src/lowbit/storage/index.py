"""The index of a container: which files it holds, what was cut out of them, and how each cut is coded.

Everything here is checked before anything is allocated for it: sizes against `max_bytes`, cuts against their file's
size, payloads against the container's, references against what came before.
"""

import lzma
import zlib
from dataclasses import dataclass

from lowbit.errors import InputError
from lowbit.storage.codecs import Codec
from lowbit.storage.configs import read_config, write_config
from lowbit.storage.wire import Reader, varint

ONNX, SAFETENSORS = 1, 2
LZMA_FILTERS = [{"id": lzma.FILTER_LZMA2, "preset": 9, "dict_size": 1 << 24, "lc": 3, "lp": 0, "pb": 0}]
MAX_INDEX_BYTES = 1 << 26
MAX_FILES = 1 << 16


@dataclass(frozen=True)
class Cut:
    """A stretch of a file that is kept in a unit instead of among the file's remaining bytes.

    start, length   in the file
    unit            number of the unit that holds it
    offset          where it begins in the unit's bytes
    factor          None, or the bits of a float32: the unit's bytes are float32 numbers, and the stretch holds each
                    times this one, rounded to float32 (the scales of biases are such products)
    """

    start: int
    length: int
    unit: int
    offset: int
    factor: int | None = None


@dataclass
class Unit:
    """Bytes that are coded together: one tensor, a part of a large one, or several small ones of a kind.

    size      of the decoded bytes;  crc is their CRC-32
    payload   (start, stop) in the container's data
    """

    codec: Codec
    size: int
    crc: int
    payload: tuple[int, int]


@dataclass
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


@dataclass
class Index:
    """All that is known of a container without its payloads."""

    kind: int
    files: list[File]
    units: list[Unit]

    def write(self) -> bytes:
        """kind, files, units, as docs/container.md lays them out."""
        out = [bytes([self.kind]), varint(len(self.files))]
        sizes = [0] * len(self.units)  # bytes of each unit that cuts so far have filled
        opened = 0
        for file in self.files:
            name = file.name.encode()
            out += [varint(len(name)), name, varint(file.size), file.sha256, varint(len(file.cuts))]
            position = 0
            for cut in file.cuts:
                out += [varint(cut.start - position), varint(cut.length)]
                position = cut.start + cut.length
                back = 3 * (opened - 1 - cut.unit)
                if cut.unit == opened:
                    out.append(varint(0))
                    opened += 1
                elif cut.factor is not None:
                    out += [varint(3 + back), varint(cut.offset), cut.factor.to_bytes(4, "little")]
                elif cut.offset == sizes[cut.unit]:
                    out.append(varint(1 + back))
                else:
                    out += [varint(2 + back), varint(cut.offset)]
                sizes[cut.unit] = max(sizes[cut.unit], cut.offset + cut.length)
        known: list[Codec] = []
        for unit in self.units:
            start, stop = unit.payload
            out += [write_config(unit.codec, known), varint(stop - start), unit.crc.to_bytes(4, "little")]
        return b"".join(out)

    @staticmethod
    def read(data: bytes, data_bytes: int, max_bytes: int) -> "Index":
        """The inverse of write. data_bytes: payloads there are; max_bytes: the most that all files may take."""
        source = Reader(data, "the index of a container")
        kind = source.byte()
        if kind not in (ONNX, SAFETENSORS):
            raise InputError(
                f"the container holds a file of kind {kind}, which this version does not know; upgrade lowbit."
            )
        sizes: list[int] = []
        files = [_read_file(source, sizes, max_bytes) for _ in range(source.varint(MAX_FILES))]
        if not files or files[0].name or sum(file.size for file in files) > max_bytes:
            total = sum(file.size for file in files)
            raise InputError(
                f"the container says that it unpacks to {total} bytes in {len(files)} files; at most {max_bytes} are "
                "allowed. If you trust it, allow more with max_bytes."
            )
        units: list[Unit] = []
        known: list[Codec] = []
        position = 0
        for size in sizes:
            codec = read_config(source, known)
            length = source.varint(data_bytes - position)
            crc = int.from_bytes(source.take(4), "little")
            if size % codec.width:
                raise InputError(f"the index of a container is damaged: {size} bytes of {codec.width}-byte elements.")
            units.append(Unit(codec, size, crc, (position, position + length)))
            position += length
        source.finish()
        if position != data_bytes:
            raise InputError(f"a container is damaged: its payloads take {position} of {data_bytes} bytes.")
        return Index(kind, files, units)


def _read_file(source: Reader, sizes: list[int], max_bytes: int) -> File:
    """One file and its cuts; `sizes` of the units grow with them."""
    name = bytes(source.take(source.varint(4096))).decode("utf-8", "replace")
    size = source.varint(max_bytes)
    sha256 = bytes(source.take(32))
    cuts: list[Cut] = []
    position = 0
    for _ in range(source.varint(source.left)):
        start = position + source.varint(size - position)
        length = source.varint(size - start)
        place = source.varint()
        back, form = (place - 1) // 3, (place - 1) % 3
        factor = None
        if not length or (place and back >= len(sizes)):
            raise InputError("the index of a container is damaged: a tensor lies nowhere.")
        if not place:
            unit, offset = len(sizes), 0
            sizes.append(length)
        else:
            unit = len(sizes) - 1 - back
            offset = sizes[unit] if form == 0 else source.varint(sizes[unit])
            if form == 0:
                sizes[unit] += length
            elif offset + length > sizes[unit] or (form == 2 and length % 4):
                raise InputError("the index of a container is damaged: a tensor repeats bytes that are not there.")
            if form == 2:
                factor = int.from_bytes(source.take(4), "little")
        cuts.append(Cut(start, length, unit, offset, factor))
        position = start + length
    return File(name, size, sha256, cuts)


def write_blob(data: bytes) -> bytes:
    """`data` in the shortest of three forms: byte 0 (as it is), 1 (deflate) or 2 (LZMA2); size; CRC-32; the form."""
    deflate = zlib.compressobj(9, zlib.DEFLATED, -15)
    forms = [
        data,
        deflate.compress(data) + deflate.flush(),
        lzma.compress(data, format=lzma.FORMAT_RAW, filters=LZMA_FILTERS),
    ]
    best = min(range(3), key=lambda form: len(forms[form]))
    return bytes([best]) + varint(len(data)) + zlib.crc32(data).to_bytes(4, "little") + forms[best]


def read_blob(blob: bytes, most: int, what: str) -> bytes:
    """The inverse of write_blob; never more than `most` bytes are made of it."""
    source = Reader(blob, what)
    form, size = source.byte(), source.varint(most)
    crc = int.from_bytes(source.take(4), "little")
    rest = bytes(source.take(source.left))
    try:
        if form == 0:
            data = rest
        elif form == 1:
            data = zlib.decompressobj(-15).decompress(rest, size + 1)
        elif form == 2:
            data = lzma.LZMADecompressor(format=lzma.FORMAT_RAW, filters=LZMA_FILTERS).decompress(rest, size + 1)
        else:
            raise InputError(f"{what} is compressed in form {form}, which this version does not know; upgrade lowbit.")
    except (zlib.error, lzma.LZMAError, EOFError) as error:
        raise InputError(f"{what} is damaged: {error}.") from None
    if len(data) != size or zlib.crc32(data) != crc:
        raise InputError(f"{what} is damaged: its checksum does not fit.")
    return data
