"""`kernel`: an inner loop as machine code. numba compiles it at its first call and keeps the code on disk.

Nobody needs a compiler, and only the first call ever waits. Where no folder may be written to (a read-only install, no
home), the code is compiled once a process.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, TypeVar, overload

import numba

Function = TypeVar("Function", bound=Callable[..., Any])
ANY_ORDER = {"reassoc", "contract", "nsz"}  # as `fastmath`: a sum may be added up in vectors; NaN and infinity stay


@overload
def kernel(function: Function) -> Function: ...
@overload
def kernel(*, fastmath: set[str]) -> Callable[[Function], Function]: ...
def kernel(function: Any = None, *, fastmath: Any = False) -> Any:
    """A decorator: the function as machine code that releases the interpreter's lock; x / 0 is infinite, as in numpy.

    Indices are not checked. fastmath is numba's: what the compiler may do to sums of floats.
    """
    if function is None:
        return partial(kernel, fastmath=fastmath)
    options = {"nogil": True, "error_model": "numpy", "fastmath": fastmath}
    try:
        return numba.njit(cache=True, **options)(function)
    except RuntimeError:  # numba found no folder that it may write its cache to
        return numba.njit(**options)(function)
