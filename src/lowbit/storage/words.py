"""Words of 64 bits read and written at any byte, for the entropy coders' kernels. Indices are not checked: see each."""

import sys
from typing import Any

from llvmlite import ir  # type: ignore[import-untyped]
from numba import types
from numba.extending import intrinsic

from lowbit.errors import UnsupportedError

if sys.byteorder != "little":
    raise UnsupportedError("lowbit's coders read words of little-endian memory; this machine is big-endian.")


def _load64(typing_context: Any, array: Any, offset: Any) -> Any:
    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        data = context.make_array(signature.args[0])(context, builder, arguments[0]).data
        address = builder.gep(data, [arguments[1]])
        word = builder.bitcast(address, ir.IntType(64).as_pointer())
        return builder.load(word, align=1)

    return types.int64(array, types.int64), code


def _store64(typing_context: Any, array: Any, offset: Any, value: Any) -> Any:
    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        data = context.make_array(signature.args[0])(context, builder, arguments[0]).data
        address = builder.gep(data, [arguments[1]])
        word = builder.bitcast(address, ir.IntType(64).as_pointer())
        builder.store(arguments[2], word, align=1)
        return context.get_dummy_value()

    return types.void(array, types.int64, types.int64), code


load64 = intrinsic(_load64)
"""load64(bytes, offset): the 8 bytes from `offset` as one little-endian word; 0 <= offset <= len(bytes) - 8."""

store64 = intrinsic(_store64)
"""store64(bytes, offset, word): the 8 bytes from `offset` become `word`; 0 <= offset <= len(bytes) - 8."""
