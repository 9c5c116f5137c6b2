"""Codes of 1 to 16 bits side by side, with no gaps: the first code in the least significant bits of the first byte.

For 4 bits this is the order in which ONNX keeps INT4 and UINT4.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from lowbit.errors import InputError
from lowbit.storage.kernel import kernel

MAX_BITS = 16


def pack(codes: NDArray[Any], bits: int) -> NDArray[np.uint8]:
    """(n,) codes in 0 … 2**bits - 1 as (ceil(n * bits / 8),) bytes; unused bits of the last byte are 0."""
    _check_width(bits)
    codes = np.ascontiguousarray(codes).reshape(-1)
    if codes.size and (int(codes.min()) < 0 or int(codes.max()) >> bits):
        raise InputError(
            f"codes of {bits} bits go from 0 to {2**bits - 1}; these go from {codes.min()} to {codes.max()}."
        )
    packed = np.zeros(packed_bytes(codes.size, bits), np.uint8)
    _pack(codes.astype(np.uint8 if bits <= 8 else np.uint16, copy=False), bits, packed)
    return packed


def unpack(packed: NDArray[np.uint8], bits: int, count: int) -> NDArray[Any]:
    """The `count` codes that `pack` put into `packed`: uint8 up to 8 bits, else uint16."""
    _check_width(bits)
    if packed.dtype != np.uint8 or packed.size != packed_bytes(count, bits):
        raise InputError(
            f"{count} codes of {bits} bits take {packed_bytes(count, bits)} bytes; {packed.size} were given."
        )
    codes = np.empty(count, np.uint8 if bits <= 8 else np.uint16)
    _unpack(np.ascontiguousarray(packed), bits, codes)
    return codes


def packed_bytes(count: int, bits: int) -> int:
    """Bytes that `count` codes of `bits` bits take."""
    return (count * bits + 7) // 8


def _check_width(bits: int) -> None:
    if not 1 <= bits <= MAX_BITS:
        raise InputError(f"codes can be packed in 1 to {MAX_BITS} bits, not {bits}.")


@kernel
def _pack(codes: Any, bits: int, packed: Any) -> None:
    """len(packed) == ceil(len(codes) * bits / 8)."""
    held: Any = 0
    length = 0
    at = 0
    for i in range(codes.size):
        held |= np.int64(codes[i]) << length
        length += bits
        while length >= 8:
            packed[at] = held & 255
            at += 1
            held >>= 8
            length -= 8
    if length > 0:
        packed[at] = held & 255


@kernel
def _unpack(packed: Any, bits: int, codes: Any) -> None:
    """len(packed) == ceil(len(codes) * bits / 8)."""
    held: Any = 0
    length = 0
    at = 0
    mask = (1 << bits) - 1
    for i in range(codes.size):
        while length < bits:
            held |= np.int64(packed[at]) << length
            at += 1
            length += 8
        codes[i] = held & mask
        held >>= bits
        length -= bits
