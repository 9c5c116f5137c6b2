"""The integer program as C99: one .c and one .h, no library, no malloc, no float, no state but the arena.

The loops are those of kernels.c, of which a network gets what it uses; tables are const, so they stay in flash.
"""

import keyword
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from lowbit.errors import InputError, UnsupportedError
from lowbit.integer.c_files import comment, header, kernels, main_function, run_function
from lowbit.integer.plan import Plan, plan, scratch_name
from lowbit.integer.program import (
    Add,
    AveragePool,
    Conv,
    Copy,
    Ints,
    Layer,
    MaxPool,
    Multiply,
    Program,
    Rescale,
    Table,
    Tensor,
)
from lowbit.integer.reference import spatial, window_out
from lowbit.integer.weights import row_of, stored

BLOCK = 64  # accumulators on the stack
_RESERVED = frozenset(
    {
        *("auto", "break", "case", "char", "const", "continue", "default", "do", "double", "else", "enum", "extern"),
        *("float", "for", "goto", "if", "inline", "int", "long", "register", "restrict", "return", "short", "signed"),
        *("sizeof", "static", "struct", "switch", "typedef", "union", "unsigned", "void", "volatile", "while", "main"),
    }
)


@dataclass(frozen=True)
class Source:
    """The two files, and the arena that they ask for."""

    name: str
    header: str
    code: str
    arena_bytes: int


def write_c(program: Program, name: str, main: bool = False) -> Source:
    """The network as `name`.c and `name`.h.

    main   with a `main` that reads input codes from standard input, sample after sample, and writes output codes
    InputError where the name is no C identifier.
    """
    if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name) or name in _RESERVED or keyword.iskeyword(name):
        raise InputError(f"'{name}' is no name for C functions. Call the file by letters, digits and '_': net.c.")
    if wide := [t.name for t in program.tensors() if t.bits > 8]:
        raise UnsupportedError(f"'{wide[0]}' has 16-bit codes, which are not written as C yet. Use 8 bits.")
    placed = plan(program)
    writer = _Writer(program, placed)
    steps = [line for layer in program.layers for line in writer.step(layer)]
    code = "\n".join(
        [
            f"/* {name}: {len(program.layers)} layers in integers; written by lowbit. */",
            f'#include "{name}.h"',
            *(["", "#include <stdio.h>"] if main else []),
            "",
            f"enum {{ BLOCK = {BLOCK} }};",
            "",
            kernels(writer.used),
            *writer.tables,
            *run_function(program, name, steps),
            *(main_function(program, name) if main else []),
            "",
        ]
    )
    return Source(name, header(program, name, placed), code, placed.bytes)


class _Writer:
    """Tables and steps of the layers; `used` collects the sections of kernels.c that they call."""

    def __init__(self, program: Program, placed: Plan) -> None:
        self.program, self.placed = program, placed
        self.used: set[str] = set()
        self.tables: list[str] = []
        self.names: set[str] = set(_RESERVED)

    def step(self, layer: Layer) -> Iterator[str]:
        shapes = " and ".join("x".join(map(str, t.shape[1:])) for t in layer.inputs)
        yield f"    /* {comment(layer.name)}: {shapes} to {'x'.join(map(str, layer.output.shape[1:]))} */"
        yield from _STEPS[type(layer)](self, layer)

    def place(self, tensor: Tensor) -> str:
        """An expression for where a tensor lies."""
        for ports, word in ((self.program.inputs, "input"), (self.program.outputs, "output")):
            if tensor.name in [port.name for port in ports]:
                return word if len(ports) == 1 else f"{word}{[port.name for port in ports].index(tensor.name)}"
        return self.at(tensor.name)

    def at(self, name: str) -> str:
        return f"bytes + {self.placed.slots[name].offset}"

    def table(self, kind: str, name: str, array: Ints) -> str:
        """A constant array; its name."""
        unique = self.identifier(name)
        self.tables.append(f"static const {kind} {unique}[{array.size}] = {{\n{_numbers(array)}\n}};\n")
        return unique

    def struct(self, kind: str, name: str, fields: Mapping[str, Any]) -> str:
        """A constant struct; its address."""
        unique = self.identifier(name)
        lines = ",\n".join(f"    .{key} = {_value(value)}" for key, value in fields.items())
        self.tables.append(f"static const struct {kind} {unique} = {{\n{lines}\n}};\n")
        return f"&{unique}"

    def call(self, function: str, layer: "Add | Multiply | AveragePool", fields: Mapping[str, Any], given: str) -> str:
        """A call of the function, or of its form that rounds twice."""
        name = function if self.program.rounding == "once" else f"{function}_twice"
        self.used.add(name)
        return f"    {name}({self.struct(name, layer.name, {**fields, **_ends(layer)})}, {given});"

    def identifier(self, name: str) -> str:
        word = re.sub(r"\W", "_", name, flags=re.ASCII)
        word = f"t{word}" if not word or word[0].isdigit() else word
        unique, number = word, 2
        while unique in self.names:
            unique, number = f"{word}_{number}", number + 1
        self.names.add(unique)
        return unique


def _conv(writer: _Writer, layer: Conv) -> Iterator[str]:
    rows, weights = layer.weight.reshape(len(layer.weight), -1), stored(layer)
    # What is not depthwise reads codes lifted by 128: the bias takes it off again.
    bias = layer.bias if layer.depthwise else layer.bias - 128 * rows.astype(np.int64).sum(1)
    fields = {
        "at": _window(spatial(layer.input), spatial(layer.output), layer.weight.shape[1:4], layer),
        "weight": writer.table("uint8_t" if layer.packed else "int8_t", f"{layer.name}_weight", weights),
        "bias": writer.table("int32_t", f"{layer.name}_bias", bias),
        "multiplier": writer.table("int32_t", f"{layer.name}_multiplier", layer.rescale.multiplier),
        "shift": writer.table("uint8_t", f"{layer.name}_shift", layer.rescale.shift),
        "groups": layer.groups,
        "row": rows.shape[1] if layer.depthwise else row_of(layer),
        "in_zero": layer.input.zero,
        "left": layer.rescale.left,
    }
    struct, x, y = (
        writer.struct("conv", layer.name, fields | _ends(layer)),
        *map(writer.place, (layer.input, layer.output)),
    )
    writer.used.add(f"rescale_{writer.program.rounding}")
    if not layer.depthwise:
        multiply = "multiply_packed" if layer.packed else "multiply_rows"
        writer.used |= {"convolve", multiply}
        yield f"    convolve({struct}, {multiply}, {x}, {y}, (uint8_t *)({writer.at(scratch_name(layer.name))}));"
    elif layer.packed:
        writer.used.add("depthwise_packed")
        yield f"    depthwise_packed({struct}, {x}, {y}, {writer.at(scratch_name(layer.name))});"
    else:
        writer.used.add("depthwise")
        yield f"    depthwise({struct}, {fields['weight']}, {x}, {y});"


def _operands(writer: _Writer, layer: Add | Multiply) -> str:
    second = (
        writer.place(layer.b) if layer.constant is None else writer.table("int8_t", f"{layer.name}_b", layer.constant)
    )
    return f"{writer.place(layer.a)}, {second}, {writer.place(layer.output)}"


def _add(writer: _Writer, layer: Add) -> Iterator[str]:
    fields: dict[str, Any] = {"count": layer.a.size, "period": layer.b.size, "zeros": (layer.a.zero, layer.b.zero)}
    if writer.program.rounding == "twice":
        factors = [_exponent(factor) for factor in layer.factors()]
        fields |= {"multipliers": [m for m, _ in factors], "exponents": [e for _, e in factors], "sign": layer.sign}
    else:
        fields |= {"multipliers": layer.multipliers, "shift": layer.shift}
    yield writer.call("add", layer, fields, _operands(writer, layer))


def _exponent(factor: Rescale) -> tuple[int, int]:
    """(multiplier, exponent) as `twice` takes them."""
    return int(factor.multiplier[0]), factor.left - int(factor.shift[0])


def _multiply(writer: _Writer, layer: Multiply) -> Iterator[str]:
    fields: dict[str, Any] = {"count": layer.a.size, "period": layer.b.size, "zeros": (layer.a.zero, layer.b.zero)}
    multiplier, exponent = _exponent(layer.rescale)
    fields |= {"multiplier": multiplier}
    if writer.program.rounding == "twice":
        fields |= {"exponent": exponent}
    else:
        fields |= {"shift": int(layer.rescale.shift[0]), "left": layer.rescale.left}
    yield writer.call("multiply", layer, fields, _operands(writer, layer))


def _average(writer: _Writer, layer: AveragePool) -> Iterator[str]:
    given = f"{writer.place(layer.input)}, {writer.place(layer.output)}"
    if writer.program.rounding == "twice" and layer.whole:
        multiplier, exponent = _exponent(layer.factor())
        fields = {"places": layer.input.size // layer.output.size, "channels": layer.output.size}
        fields |= {"in_zero": layer.input.zero, "multiplier": multiplier, "exponent": exponent}
        yield writer.call("mean", layer, fields, given)
        return
    writer.used.add("average")
    at = _window(spatial(layer.input), window_out(layer), layer.kernel, layer)
    numbers = {"in_zero": layer.input.zero, "counted": int(layer.count_padding), "multiplier": layer.multiplier}
    struct = writer.struct("average", layer.name, {"at": at} | numbers | {"shift": layer.shift} | _ends(layer))
    yield f"    average({struct}, {given});"


def _largest(writer: _Writer, layer: MaxPool) -> Iterator[str]:
    writer.used.add("largest")
    fields = _window(spatial(layer.input), spatial(layer.output), layer.kernel, layer)
    struct = writer.struct("window", layer.name, fields)
    yield f"    largest({struct}, {writer.place(layer.input)}, {writer.place(layer.output)});"


def _look_up(writer: _Writer, layer: Table) -> Iterator[str]:
    writer.used.add("look_up")
    table = writer.table("int8_t", f"{layer.name}_table", layer.table)
    yield f"    look_up({table}, {writer.place(layer.input)}, {writer.place(layer.output)}, {layer.input.size});"


def _copy(writer: _Writer, layer: Copy) -> Iterator[str]:
    output = writer.place(layer.output)
    if layer.fill is not None:
        yield f"    for (i = 0; i < {layer.output.size}; i++)\n        ({output})[i] = {layer.fill};"
    for number, piece in enumerate(layer.pieces):
        writer.used.add("copy")
        numbers = np.array([*piece.counts, *piece.read_steps, *piece.write_steps])
        table, loops = writer.table("int", f"{layer.name}_loops{number}", numbers), len(piece.counts)
        source = f"{writer.place(layer.sources[piece.source])} + {piece.read_from}"
        steps = f"{table}, {table} + {loops}, {table} + {2 * loops}"
        yield f"    copy({loops}, {steps}, {source}, {output} + {piece.write_to});"


def _window(size: Sequence[int], out: Sequence[int], taps: Sequence[int], layer: Any) -> dict[str, Any]:
    fields: dict[str, Any] = {"in": size, "out": out, "taps": taps, "strides": layer.strides, "pads": layer.pads}
    return fields | {"dilations": getattr(layer, "dilations", (1, 1, 1))}


def _ends(layer: Conv | Add | Multiply | AveragePool) -> dict[str, int]:
    return {"zero": layer.output.zero, "low": layer.low, "high": layer.high}


_STEPS: Mapping[type[Layer], Callable[[_Writer, Any], Iterator[str]]] = {
    Conv: _conv,
    Add: _add,
    Multiply: _multiply,
    AveragePool: _average,
    MaxPool: _largest,
    Table: _look_up,
    Copy: _copy,
}


def _numbers(array: Ints) -> str:
    """Decimal numbers in lines of at most 120 characters."""
    lines, line = [], "   "
    for number in array.reshape(-1).tolist():
        word = f" {number},"
        if len(line) + len(word) > 120:
            lines.append(line)
            line = "   "
        line += word
    return "\n".join([*lines, line])


def _value(value: Any) -> str:
    if isinstance(value, Mapping):
        return "{ " + ", ".join(f".{key} = {_value(inner)}" for key, inner in value.items()) + " }"
    if isinstance(value, (tuple, list)):
        return "{ " + ", ".join(str(int(number)) for number in value) + " }"
    return str(value)
