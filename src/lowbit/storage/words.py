"""Words of 64 bits read and written at any byte, for the entropy coders' kernels. Indices are not checked: see each.

Byte by byte, so little-endian on any machine; the compiler makes one load or store of the eight.
"""

from typing import Any

import numpy as np

from lowbit.machine_code import kernel


@kernel
def load64(data: Any, offset: Any) -> Any:
    """The 8 bytes from `offset` as one little-endian word; 0 <= offset <= len(data) - 8."""
    word = np.uint64(0)
    for i in range(8):
        word |= np.uint64(data[np.uint64(offset + i)]) << np.uint64(8 * i)
    return np.int64(word)


@kernel
def store64(data: Any, offset: Any, word: Any) -> None:
    """The 8 bytes from `offset` become `word`; 0 <= offset <= len(data) - 8."""
    for i in range(8):
        data[np.uint64(offset + i)] = np.uint8(np.uint64(word) >> np.uint64(8 * i) & np.uint64(255))
