"""Inner loops as machine code: numba compiles them at their first call and keeps the code on disk.

Nobody needs a compiler, and only the first call ever waits. Where no folder may be written to (a read-only install, no
home), the code is compiled once a process.
"""

from collections.abc import Callable
from typing import Any, TypeVar, cast

import numba

Function = TypeVar("Function", bound=Callable[..., Any])


def machine_code(**options: Any) -> Callable[[Function], Function]:
    """A decorator: the function as machine code that releases the interpreter's lock. `options` are numba's."""

    def compiled(function: Function) -> Function:
        try:
            return cast(Function, numba.njit(nogil=True, cache=True, **options)(function))
        except RuntimeError:  # numba found no folder that it may write its cache to
            return cast(Function, numba.njit(nogil=True, **options)(function))

    return compiled
