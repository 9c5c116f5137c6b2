"""Numbers in bytes and bits: variable-length integers, Exp-Golomb codes, and readers that never run past their end.

A varint is little-endian base 128, the top bit of a byte saying that another follows (as in protobuf and WebAssembly).
Bits fill each byte from its least significant end.
"""

from lowbit.errors import InputError


def varint(value: int) -> bytes:
    """`value` >= 0 in base 128, least significant digit first."""
    digits = bytearray()
    while value > 0x7F:
        digits.append(value & 0x7F | 0x80)
        value >>= 7
    digits.append(value)
    return bytes(digits)


class Reader:
    """Reads bytes in order; asking for more than there is raises InputError naming `what` is being read."""

    def __init__(self, data: bytes | memoryview, what: str = "data") -> None:
        self.data = memoryview(data)
        self.position = 0
        self.what = what

    @property
    def left(self) -> int:
        """Bytes not read yet."""
        return len(self.data) - self.position

    def take(self, count: int) -> memoryview:
        """The next `count` bytes."""
        if count > self.left:
            raise InputError(f"{self.what} ends early: {count} more bytes were announced, {self.left} are left.")
        self.position += count
        return self.data[self.position - count : self.position]

    def byte(self) -> int:
        """The next byte as a number."""
        return self.take(1)[0]

    def varint(self, limit: int = 2**63 - 1) -> int:
        """The next varint, at most `limit`."""
        value = shift = 0
        while True:
            digit = self.byte()
            value |= (digit & 0x7F) << shift
            if digit < 0x80:
                break
            shift += 7
            if shift > 63:
                raise InputError(f"{self.what} is damaged: a number runs over ten bytes.")
        if value > limit:
            raise InputError(f"{self.what} is damaged: it says {value} where at most {limit} is possible.")
        return value

    def finish(self) -> None:
        """Raise unless everything has been read."""
        if self.left:
            raise InputError(f"{self.what} is damaged: {self.left} bytes are left over.")


class BitWriter:
    """Bits in the order written, the first in the least significant place of the first byte."""

    def __init__(self) -> None:
        self.value = 0
        self.length = 0

    def write(self, value: int, bits: int) -> None:
        """The low `bits` bits of `value`, least significant first."""
        self.value |= value << self.length
        self.length += bits

    def golomb(self, value: int, order: int) -> None:
        """`value` >= 0 in the Exp-Golomb code of `order`: zeros count the bits that follow the first one."""
        head = (value >> order) + 1
        zeros = head.bit_length() - 1
        self.write(1 << zeros, zeros + 1)
        self.write(head - (1 << zeros), zeros)
        self.write(value & ((1 << order) - 1), order)

    def bytes(self) -> bytes:
        """All bits so far; the last byte is filled with zeros."""
        return self.value.to_bytes((self.length + 7) // 8, "little")


class BitReader:
    """Reads what BitWriter wrote, from the next byte of `source` on."""

    def __init__(self, source: Reader) -> None:
        self.source = source
        self.value = 0
        self.length = 0

    def read(self, bits: int) -> int:
        """The next `bits` bits as a number."""
        while self.length < bits:
            self.value |= self.source.byte() << self.length
            self.length += 8
        value = self.value & ((1 << bits) - 1)
        self.value >>= bits
        self.length -= bits
        return value

    def golomb(self, order: int) -> int:
        """The next number of the Exp-Golomb code of `order`."""
        zeros = 0
        while not self.read(1):
            zeros += 1
            if zeros > 32:
                raise InputError(f"{self.source.what} is damaged: a table entry is longer than 32 bits.")
        head = (1 << zeros) + self.read(zeros)
        return (head - 1 << order) + self.read(order)


def golomb_bits(value: int, order: int) -> int:
    """Length of `value` in the Exp-Golomb code of `order`, in bits."""
    return 2 * ((value >> order) + 1).bit_length() - 1 + order


def zigzag(value: int) -> int:
    """0, -1, 1, -2, 2 … become 0, 1, 2, 3, 4 …"""
    return 2 * value if value >= 0 else -2 * value - 1


def unzigzag(value: int) -> int:
    """The inverse of zigzag."""
    return value >> 1 if value % 2 == 0 else -(value + 1 >> 1)
