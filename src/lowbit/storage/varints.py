"""Protobuf varints as arrays of numbers: how ONNX files keep int8 and int64 tensors that are not in raw_data."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from lowbit.errors import InputError
from lowbit.storage.kernel import kernel


def parse(data: NDArray[np.uint8]) -> NDArray[np.int64] | None:
    """The numbers, modulo 2**64; None unless `data` is whole varints, each as short as it can be."""
    numbers = np.empty(data.size, np.int64)
    count = _parse(data, numbers)
    return None if count < 0 else numbers[:count].copy()


def write(numbers: NDArray[np.int64], size: int) -> NDArray[np.uint8]:
    """The `size` bytes of the varints of `numbers`; InputError if they take more or fewer."""
    data = np.empty(size, np.uint8)
    if not _write(numbers, data):
        raise InputError(f"a tensor of varints is damaged: its numbers do not fill {size} bytes.")
    return data


@kernel
def _parse(data: Any, numbers: Any) -> int:
    """How many numbers there are, or -1. Bounds: as many places in `numbers` as bytes in `data`."""
    count = 0
    value: Any = 0
    shift = 0
    for i in range(data.size):
        digit = np.int64(data[i])
        if shift == 63 and digit > 1:
            return -1
        value |= (digit & 127) << shift
        if digit >= 128:
            shift += 7
            if shift > 63:
                return -1
        else:
            if digit == 0 and shift > 0:
                return -1
            numbers[count] = value
            count += 1
            value = 0
            shift = 0
    return count if shift == 0 else -1


@kernel
def _write(numbers: Any, data: Any) -> bool:
    """Whether the numbers fill `data` exactly."""
    at = 0
    for i in range(numbers.size):
        rest = np.uint64(numbers[i])
        while True:
            if at == data.size:
                return False
            digit = rest & np.uint64(127)
            rest >>= np.uint64(7)
            if rest != np.uint64(0):
                digit |= np.uint64(128)
            data[at] = digit
            at += 1
            if rest == np.uint64(0):
                break
    return bool(at == data.size)
