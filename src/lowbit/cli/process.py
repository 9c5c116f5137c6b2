"""What the command line does to its own process, which a library must not: garbage collection, memory, exit.

Whole `lowbit quantize --recipe int8-fast` of SqueezeNet: 5.1 s without these three, 4.0 s with them (least of
several runs).
"""

import ctypes
import gc
import os
import sys
from typing import NoReturn

# Numbers of glibc's mallopt.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_LARGEST = 2**31 - 1


def collect_garbage_rarely() -> None:
    """Once in 100,000 new objects, not in 700: importing torch and the rest makes half a million, all to stay.

    Looking at them took 0.5 s.
    """
    gc.set_threshold(100_000, 50, 100)


def keep_freed_memory() -> None:
    """Let glibc hand out freed memory again instead of giving it back to the kernel.

    Each large tensor is else mapped, filled with zeros page by page, and unmapped: a third of the time of observing.
    Other C libraries are left as they are.
    """
    libc = ctypes.CDLL(None) if os.name == "posix" else None
    if libc is not None and hasattr(libc, "gnu_get_libc_version"):
        libc.mallopt(_M_MMAP_THRESHOLD, _LARGEST)
        libc.mallopt(_M_TRIM_THRESHOLD, _LARGEST)


def leave(status: int) -> NoReturn:
    """End at once: taking down torch, numba and the rest object by object took 0.6 to 1.0 s."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)
