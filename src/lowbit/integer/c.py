"""The integer program as C99: one .c and one .h, no library, no malloc, no float, no state but the arena.

The loops are those of kernels.c, of which a network gets what it uses; tables are const, so they stay in flash.
"""

import keyword
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from lowbit.errors import InputError
from lowbit.integer.c_cmsis import buffer_bytes, include, suits
from lowbit.integer.c_cmsis import step as cmsis_step
from lowbit.integer.c_files import comment, header, kernels, main_function, run_function
from lowbit.integer.c_sequences import SEQUENCE_STEPS
from lowbit.integer.c_writer import RESERVED, Writer, ends_of
from lowbit.integer.float32 import fixed_point, in_float32
from lowbit.integer.plan import plan, scratch_bytes, scratch_name
from lowbit.integer.program import Add, AveragePool, Conv, Copy, Layer, MaxPool, Multiply, Program, Table
from lowbit.integer.tensors import Window
from lowbit.integer.weights import BLOCK, LANES, REACH, SHORT, TOGETHER, in_lanes, per_output, row_of, stored

Library = Literal["none", "cmsis-nn"]


@dataclass(frozen=True)
class Source:
    """The two files, and the arena that they ask for."""

    name: str
    header: str
    code: str
    arena_bytes: int


def write_c(program: Program, name: str, main: bool = False, library: Library = "none") -> Source:
    """The network as `name`.c and `name`.h.

    library  whose kernels convolve: "cmsis-nn", or none but its own loops
    main     with a `main` that reads input codes from standard input, sample after sample, and writes output codes
    InputError where the name is no C identifier.
    """
    if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name) or name in RESERVED or keyword.iskeyword(name):
        raise InputError(f"'{name}' is no name for C functions. Call the file by letters, digits and '_': net.c.")
    if library != "none" and program.rounding == "onnxruntime":
        raise InputError("CMSIS-NN rounds once or twice. Export with --rounding once or --rounding twice.")
    own = {layer.name: buffer_bytes(layer) for layer in program.layers if library != "none" and suits(layer)}
    placed = plan(program, own)
    writer = Writer(program, placed)
    steps = [line for layer in program.layers for line in _step(writer, layer, layer.name in own)]
    most_taps = max((t.weight[0].size for t in program.layers if isinstance(t, Conv) and t.depthwise), default=0)
    code = "\n".join(
        [
            f"/* {name}: {len(program.layers)} layers in integers; written by lowbit. */",
            f'#include "{name}.h"',
            *(["", "#include <stdio.h>"] if main else []),
            *(include(program.rounding) if own else []),
            "",
            "enum {",
            f"    BLOCK = {BLOCK}, LANES = {LANES}, TOGETHER = {TOGETHER}, SHORT = {SHORT}, REACH = {REACH},",
            f"    MOST_TAPS = {most_taps}",
            "};",
            "",
            kernels(writer.used),
            *writer.tables,
            *run_function(program, name, steps),
            *(main_function(program, name) if main else []),
            "",
        ]
    )
    return Source(name, header(program, name, placed), code, placed.bytes)


def _step(writer: Writer, layer: Any, by_library: bool) -> Iterator[str]:
    shapes = " and ".join("x".join(map(str, t.shape[1:])) for t in layer.inputs)
    yield f"    /* {comment(layer.name)}: {shapes} to {'x'.join(map(str, layer.output.shape[1:]))} */"
    yield from (cmsis_step if by_library else _STEPS[type(layer)])(writer, layer)


def _call(
    writer: Writer, function: str, layer: Add | Multiply | AveragePool, fields: Mapping[str, Any], given: str
) -> str:
    """A call of the function, or of its form that rounds twice."""
    name = f"{function}_twice" if writer.program.rounding == "twice" else function
    bits = (
        *(t.bits for t in (layer.inputs if isinstance(layer, AveragePool) else (layer.a, layer.b))),
        layer.output.bits,
    )
    called = writer.function(name, *bits)
    return f"    {called}({writer.struct(name, layer.name, {**fields, **ends_of(layer)})}, {given});"


def _conv(writer: Writer, layer: Conv) -> Iterator[str]:
    weights = stored(layer)
    wide, lanes = layer.input.bits > 8, in_lanes(layer)
    # What is read as it is has its zero taken off in the loop; rows read 8-bit codes lifted by 128 instead.
    lifted = 0 if wide else layer.input.zero if lanes else 0 if layer.depthwise else -128
    bias = layer.bias_without(lifted)
    exact = writer.program.rounding == "onnxruntime" and in_float32(layer)
    rescale = layer.rescale
    multiplier, shift, left = rescale.multiplier, rescale.shift, rescale.left
    if exact:
        left, up = fixed_point(layer)
        multiplier, shift = multiplier >> np.maximum(-up, 0), np.maximum(up, 0)
    columns = {"bias": ("int32_t", bias), "multiplier": ("int32_t", multiplier), "shift": ("uint8_t", shift)}
    fields = {
        "at": _places(layer),
        "weight": writer.table("uint8_t" if layer.packed else "int8_t", f"{layer.name}_weight", weights),
        **{
            key: writer.table(kind, f"{layer.name}_{key}", per_output(layer, array))
            for key, (kind, array) in columns.items()
        },
        "groups": layer.groups,
        "row": row_of(layer),
        "in_zero": layer.input.zero,
        "left": left,
    }
    struct, x, y = (
        writer.struct("conv", layer.name, fields | ends_of(layer)),
        *map(writer.place, (layer.input, layer.output)),
    )
    bits = layer.input.bits, layer.output.bits
    rule = "once" if writer.program.rounding == "onnxruntime" and not exact else writer.program.rounding
    writer.function("rescale_wide" if wide else f"rescale_{rule}", *bits)
    scratch = writer.at(scratch_name(layer.name)) if scratch_bytes(layer) else ""
    if lanes:
        yield f"    {writer.function('lanes', *bits)}({struct}, {x}, {y});"
    elif not layer.depthwise:
        multiply = writer.function("multiply_packed" if layer.packed else "multiply_rows", *bits)
        window = f"({'int16_t' if wide else 'uint8_t'} *)(void *)({scratch})"
        yield f"    {writer.function('convolve', *bits)}({struct}, {multiply}, {x}, {y}, {window});"
    elif layer.packed:
        yield f"    {writer.function('depthwise_packed', *bits)}({struct}, {x}, {y}, {scratch});"
    else:
        yield f"    {writer.function('depthwise', *bits)}({struct}, {fields['weight']}, {x}, {y});"


def _places(layer: Conv) -> dict[str, Any]:
    """The window of a convolution; one that reads each position alone takes them as one line."""
    window = layer.window
    if window.size[:3] == window.out[:3] and window.taps == (1, 1, 1):
        size, out = ((1, 1, int(np.prod(shape[:3])), shape[3]) for shape in (window.size, window.out))
        window = window._replace(size=size, out=out)
    return _window(window)


def _operands(writer: Writer, layer: Add | Multiply) -> str:
    second = (
        writer.place(layer.b)
        if layer.constant is None
        else writer.table(f"{layer.b.dtype}_t", f"{layer.name}_b", layer.constant)
    )
    return f"{writer.place(layer.a)}, {second}, {writer.place(layer.output)}"


def _add(writer: Writer, layer: Add) -> Iterator[str]:
    fields: dict[str, Any] = {"count": layer.a.size, "period": layer.b.size, "zeros": (layer.a.zero, layer.b.zero)}
    if writer.program.rounding == "twice":
        factors = [factor.numbers for factor in layer.factors()]
        exponents = [left - shift for _, shift, left in factors]
        fields |= {"multipliers": [m for m, _, _ in factors], "exponents": exponents, "sign": layer.sign}
    else:
        fields |= {"multipliers": layer.multipliers, "shift": layer.shift}
    yield _call(writer, "add", layer, fields, _operands(writer, layer))


def _multiply(writer: Writer, layer: Multiply) -> Iterator[str]:
    fields: dict[str, Any] = {"count": layer.a.size, "period": layer.b.size, "zeros": (layer.a.zero, layer.b.zero)}
    multiplier, shift, left = layer.rescale.numbers
    fields |= {"multiplier": multiplier}
    fields |= {"exponent": left - shift} if writer.program.rounding == "twice" else {"shift": shift, "left": left}
    wide = max(layer.a.bits, layer.b.bits, layer.output.bits) > 8
    yield _call(writer, "multiply_wide" if wide else "multiply", layer, fields, _operands(writer, layer))


def _average(writer: Writer, layer: AveragePool) -> Iterator[str]:
    given = f"{writer.place(layer.input)}, {writer.place(layer.output)}"
    if writer.program.rounding == "twice" and layer.whole:
        multiplier, shift, left = layer.factor().numbers
        fields = {"places": layer.input.size // layer.output.size, "channels": layer.output.size}
        fields |= {"in_zero": layer.input.zero, "multiplier": multiplier, "exponent": left - shift}
        yield _call(writer, "mean", layer, fields, given)
        return
    at = _window(layer.window)
    numbers = {"in_zero": layer.input.zero, "counted": int(layer.count_padding), "multiplier": layer.multiplier}
    struct = writer.struct("average", layer.name, {"at": at} | numbers | {"shift": layer.shift} | ends_of(layer))
    yield f"    {writer.function('average', layer.input.bits, layer.output.bits)}({struct}, {given});"


def _largest(writer: Writer, layer: MaxPool) -> Iterator[str]:
    struct = writer.struct("window", layer.name, _window(layer.window))
    bits = layer.input.bits, layer.output.bits
    given = f"{writer.place(layer.input)}, {writer.place(layer.output)}"
    yield f"    {writer.function('largest', *bits)}({struct}, {given});"


def _look_up(writer: Writer, layer: Table) -> Iterator[str]:
    bits = layer.input.bits, layer.output.bits
    table = writer.table(f"{layer.output.dtype}_t", f"{layer.name}_table", layer.table)
    function = writer.function("look_up" if layer.input.bits <= 8 else "interpolate", *bits)
    yield f"    {function}({table}, {writer.place(layer.input)}, {writer.place(layer.output)}, {layer.input.size});"


def _copy(writer: Writer, layer: Copy) -> Iterator[str]:
    output = writer.place(layer.output)
    if layer.fill is not None:
        yield f"    for (i = 0; i < {layer.output.size}; i++)\n        ({output})[i] = {layer.fill};"
    for number, piece in enumerate(layer.pieces):
        numbers = np.array([*piece.counts, *piece.read_steps, *piece.write_steps])
        table, loops = writer.table("int", f"{layer.name}_loops{number}", numbers), len(piece.counts)
        source = f"{writer.place(layer.sources[piece.source])} + {piece.read_from}"
        function = writer.function("copy", layer.output.bits, layer.output.bits)
        steps = f"{table}, {table} + {loops}, {table} + {2 * loops}"
        yield f"    {function}({loops}, {steps}, {source}, {output} + {piece.write_to});"


def _window(window: Window) -> dict[str, Any]:
    """As kernels.c names it."""
    given = window._asdict()
    return {"in": given.pop("size"), **given}


_STEPS: Mapping[type[Layer], Callable[[Writer, Any], Iterator[str]]] = {
    Conv: _conv,
    Add: _add,
    Multiply: _multiply,
    AveragePool: _average,
    MaxPool: _largest,
    Table: _look_up,
    Copy: _copy,
    **SEQUENCE_STEPS,
}
