"""Codec configurations as bytes: a tag, the configuration, the children's; tables are written once and referred to.

A reference names an earlier codec of the same file, and only codecs without children can be named: no cycles, and
nothing that grows when it is expanded.
"""

from collections.abc import Sequence

from lowbit.errors import InputError
from lowbit.storage.ans import Ans
from lowbit.storage.codecs import CODECS, Codec
from lowbit.storage.huffman import Huffman
from lowbit.storage.wire import Reader, varint

REFERENCE = 0
MAX_DEPTH = 4
BY_TAG = {codec.tag: codec for codec in CODECS.values()}


def write_config(codec: Codec, known: list[Codec]) -> bytes:
    """`codec` as bytes, given the table codecs that were written before; its own are appended to `known`."""
    if isinstance(codec, (Ans, Huffman)):
        if codec in known:
            return bytes([REFERENCE]) + varint(known.index(codec))
        known.append(codec)
    return bytes([codec.tag]) + codec.config() + b"".join(write_config(child, known) for child in codec.children)


def read_config(source: Reader, known: list[Codec], width: int | None = None, depth: int = 0) -> Codec:
    """The inverse of write_config; `width` is that of the elements, where the parent knows it."""
    tag = source.byte()
    codec: Codec
    if depth > MAX_DEPTH:
        raise InputError(f"{source.what} is damaged: codecs inside codecs, {depth} deep (at most {MAX_DEPTH}).")
    if tag == REFERENCE:
        number = source.varint()
        if number >= len(known):
            raise InputError(f"{source.what} is damaged: it refers to table {number} of {len(known)}.")
        codec = known[number]
    elif tag in BY_TAG:
        codec = BY_TAG[tag].read(source, lambda width: read_config(source, known, width, depth + 1))
        if isinstance(codec, (Ans, Huffman)):
            known.append(codec)
    else:
        raise InputError(
            f"{source.what} needs codec {tag}, which this version of lowbit does not have; upgrade lowbit."
        )
    if width is not None and codec.width != width:
        raise InputError(f"{source.what} is damaged: a codec for {codec.width}-byte elements where they have {width}.")
    return codec


def config_bits(codec: Codec, known: Sequence[Codec]) -> int:
    """Length of `codec`'s configuration in bits, given the table codecs that were written before."""
    return 8 * len(write_config(codec, list(known)))
