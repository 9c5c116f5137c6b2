"""`kernel`: an inner loop as machine code. numba compiles it at its first call and keeps the code on disk.

Nobody needs a compiler, and only the first call ever waits. Where no folder may be written to (a read-only install, no
home), the code is compiled once a process.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache, partial
from pathlib import Path
from typing import Any, TypeVar, overload

import numba
from filelock import FileLock, Timeout
from numba.core.compiler_lock import global_compiler_lock

Function = TypeVar("Function", bound=Callable[..., Any])
ANY_ORDER = {"reassoc", "contract", "nsz"}  # as `fastmath`: a sum may be added up in vectors; NaN and infinity stay
_PATIENCE = 60  # seconds; longer than a kernel compiles: whoever holds the lock has been stopped


@overload
def kernel(function: Function) -> Function: ...
@overload
def kernel(*, name: str = ..., fastmath: set[str] = ...) -> Callable[[Function], Function]: ...
def kernel(function: Any = None, *, name: str = "", fastmath: Any = False) -> Any:
    """A decorator: the function as machine code that releases the interpreter's lock; x / 0 is infinite, as in numpy.

    Indices are not checked. name: of a function that another makes, with what it was made of: numba tells functions
    apart by name, on disk and when it links. fastmath is numba's: what the compiler may do to sums of floats.

    Raises ValueError for a function that another makes, if it has no name of its own.
    """
    if function is None:
        return partial(kernel, name=name, fastmath=fastmath)
    if name:
        function.__qualname__ = name
    elif function.__closure__:
        raise ValueError(f"{function.__qualname__} is made anew with each call around it: give it a name of its own")
    options = {"nogil": True, "error_model": "numpy", "fastmath": fastmath}
    try:
        made = numba.njit(cache=True, **options)(function)
    except RuntimeError:  # numba found no folder that it may write its cache to
        return numba.njit(**options)(function)
    if made is not function:  # as it is where NUMBA_DISABLE_JIT is set
        made.compile = partial(_compile_alone, made, made.compile)
    return made


def _compile_alone(made: Any, compile: Callable[[Any], Any], signature: Any) -> Any:
    """Loads or compiles and saves, while no other process does; else compiles for this process, beside the disk.

    numba numbers the files of a kernel's signatures by what its index says. Two processes that compile at once would
    take the same number, and one of them leave its code under the other's signature, for good.
    """
    with global_compiler_lock, _locked(made.stats.cache_path) as alone:  # in this order: kernels compile what they call
        if alone:
            return compile(signature)
        made._cache.disable()
        try:
            return compile(signature)
        finally:
            made._cache.enable()


@contextmanager
def _locked(folder: str) -> Iterator[bool]:
    """Whether the lock of a folder is held inside: not where who holds it was stopped, or files have no locks."""
    lock = _lock(folder)
    try:
        lock.acquire(timeout=_PATIENCE)
    except (Timeout, OSError, NotImplementedError):
        yield False
        return
    try:
        yield True
    finally:
        lock.release()


@cache
def _lock(folder: str) -> FileLock:
    return FileLock(Path(folder) / "lowbit.lock")
