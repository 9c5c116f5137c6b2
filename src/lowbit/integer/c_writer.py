"""What the steps of the C are written with: where tensors lie, constant tables and structs, functions of kernels.c."""

import re
from collections.abc import Mapping
from typing import Any

from lowbit.integer.c_files import numbers, suffix
from lowbit.integer.plan import Plan
from lowbit.integer.program import Program
from lowbit.integer.tensors import Ints, Tensor

RESERVED = frozenset(
    {
        *("auto", "break", "case", "char", "const", "continue", "default", "do", "double", "else", "enum", "extern"),
        *("float", "for", "goto", "if", "inline", "int", "long", "register", "restrict", "return", "short", "signed"),
        *("sizeof", "static", "struct", "switch", "typedef", "union", "unsigned", "void", "volatile", "while", "main"),
    }
)


class Writer:
    """Tables and calls; `used` collects the sections of kernels.c that are called, each with the bits of its codes."""

    def __init__(self, program: Program, placed: Plan) -> None:
        self.program, self.placed = program, placed
        self.used: set[tuple[str, tuple[int, ...]]] = set()
        self.tables: list[str] = []
        self.names: set[str] = set(RESERVED)

    def place(self, tensor: Tensor) -> str:
        """An expression for where a tensor lies."""
        for ports, word in ((self.program.inputs, "input"), (self.program.outputs, "output")):
            if tensor.name in [port.name for port in ports]:
                return word if len(ports) == 1 else f"{word}{[port.name for port in ports].index(tensor.name)}"
        return self.at(tensor.name) if tensor.bits <= 8 else f"(int16_t *)(void *)({self.at(tensor.name)})"

    def at(self, name: str) -> str:
        return f"bytes + {self.placed.slots[name].offset}"

    def table(self, kind: str, name: str, array: Ints) -> str:
        """A constant array; its name."""
        unique = self.identifier(name)
        self.tables.append(f"static const {kind} {unique}[{array.size}] = {{\n{numbers(array)}\n}};\n")
        return unique

    def struct(self, kind: str, name: str, fields: Mapping[str, Any]) -> str:
        """A constant struct; its address."""
        unique = self.identifier(f"{name}_layer")  # never the name of a parameter or a function
        lines = ",\n".join(f"    .{key} = {_value(value)}" for key, value in fields.items())
        self.tables.append(f"static const struct {kind} {unique} = {{\n{lines}\n}};\n")
        return f"&{unique}"

    def function(self, section: str, *bits: int) -> str:
        """The name of a function of kernels.c for codes of these bits: of its inputs, then of its output."""
        self.used.add((section, bits))
        return section + suffix(bits)

    def identifier(self, name: str) -> str:
        word = re.sub(r"\W", "_", name, flags=re.ASCII)
        word = f"t{word}" if not word or word[0].isdigit() else word
        unique, number = word, 2
        while unique in self.names:
            unique, number = f"{word}_{number}", number + 1
        self.names.add(unique)
        return unique


def _value(value: Any) -> str:
    if isinstance(value, Mapping):
        return "{ " + ", ".join(f".{key} = {_value(inner)}" for key, inner in value.items()) + " }"
    if isinstance(value, (tuple, list)):
        return "{ " + ", ".join(str(int(number)) for number in value) + " }"
    return str(value)


def ends_of(layer: Any) -> dict[str, int]:
    """Zero, least and largest code of what a layer makes."""
    return {"zero": layer.output.zero, "low": layer.low, "high": layer.high}
