"""What stands around the steps in the C: the header, the function that runs them, a main, the loops of kernels.c."""

import re
from collections.abc import Iterator, Sequence
from importlib.resources import files

import numpy as np

from lowbit.integer.plan import Plan
from lowbit.integer.program import Program
from lowbit.integer.sequences import HALVES, tanh_table
from lowbit.integer.tensors import Ints, Tensor

FILES = ("kernels", "channels", "elementwise", "sequences", "cmsis")
_SECTION = re.compile(r"/\* section (\w+)(?:: ([\w ]+))? \*/\n")
_CONSTANTS = {f"HALVES_{power}": f"{factor}" for power, factor in enumerate(HALVES)}


def kernels(used: set[tuple[str, tuple[int, ...]]]) -> str:
    """The sections of FILES of these names and what they need, in the files' order.

    Where a section says X_t, B_t and Y_t, it is written once for each given combination of bits: of the codes of its
    inputs and, last, of its output. @ in names becomes the `suffix` of the combination.
    """
    text = "\n".join((files("lowbit.integer") / f"{name}.c").read_text(encoding="utf-8") for name in FILES)
    parts = _SECTION.split(text)[1:]
    sections = {
        name: (needs or "", body) for name, needs, body in zip(parts[::3], parts[1::3], parts[2::3], strict=True)
    }
    wanted: dict[str, set[tuple[int, ...]]] = {name: {bits for n, bits in used if n == name} for name in sections}
    for name in reversed(sections):
        for need in sections[name][0].split():
            wanted[need] |= wanted[name]
    written = []
    for name, (_, body) in sections.items():
        for bits in sorted(wanted[name]) if "@" in body else sorted(wanted[name])[:1]:
            written.append(_of_bits(body, bits))
    return "".join(written)


def _of_bits(body: str, bits: tuple[int, ...]) -> str:
    wide = max(bits, default=8) > 8 and bits[0] > 8
    kinds = {8: "int8_t", 16: "int16_t"}
    words = dict(zip("XBY" if len(bits) > 2 else "XY", (kinds[b] for b in bits), strict=False))
    tokens = {f"{letter}_t": kind for letter, kind in words.items()} | _CONSTANTS
    tokens |= (
        {"W_t": "int16_t", "ACC_t": "int64_t", "PRODUCT_t": "int64_t", "LIFT": "0"}
        if wide
        else {"W_t": "uint8_t", "ACC_t": "int32_t", "PRODUCT_t": "int16_t", "LIFT": "128"}
    )
    tokens |= {"LOWEST": "-32768" if wide else "-128"}
    if "TANH_ENTRIES" in body:
        tokens["TANH_ENTRIES"] = numbers(tanh_table())
    return re.sub(r"\b\w+\b", lambda found: tokens.get(found[0], found[0]), body.replace("@", suffix(bits)))


def suffix(bits: tuple[int, ...]) -> str:
    """Of a function's name: nothing for 8-bit codes alone, else the bits of all, as in _16_8."""
    return "".join(f"_{b}" for b in bits) if max(bits, default=8) > 8 else ""


def numbers(array: Ints) -> str:
    """Decimal numbers in lines of at most 120 characters."""
    lines, line = [], "   "
    for number in array.reshape(-1).tolist():
        word = f" {number},"
        if len(line) + len(word) > 120:
            lines.append(line)
            line = "   "
        line += word
    return "\n".join([*lines, line])


def _ports(program: Program) -> Iterator[tuple[str, str, Tensor]]:
    """(word, 'const ' or '', tensor) of each input and output."""
    for ports, word, const in ((program.inputs, "input", "const "), (program.outputs, "output", "")):
        for number, port in enumerate(ports):
            yield word if len(ports) == 1 else f"{word}{number}", const, port


def _parameters(program: Program) -> str:
    return (
        ", ".join(f"{const}{port.dtype}_t *{word}" for word, const, port in _ports(program))
        + ", void *arena, size_t arena_bytes"
    )


def header(program: Program, name: str, placed: Plan) -> str:
    upper = name.upper()
    lines = [
        f"/* {name}: a network in integers; written by lowbit. */",
        f"#ifndef {upper}_H",
        f"#define {upper}_H",
        "",
        "#include <stddef.h>",
        "#include <stdint.h>",
        "",
        f"#define {upper}_ARENA_BYTES {placed.bytes}",
    ]
    for word, _, port in _ports(program):
        shape = "x".join(map(str, port.shape[port.shape[0] == 1 :]))
        lines += [
            "",
            f"/* {word} '{comment(port.name)}': {shape} codes, last axis fastest; value = (code - zero) * scale */",
            f"#define {upper}_{word.upper()}_BYTES {port.bytes}",
            f"#define {upper}_{word.upper()}_SCALE {np.float32(port.scale)!s}f",
            f"#define {upper}_{word.upper()}_ZERO {port.zero}",
            f"#define {upper}_{word.upper()}_AT {placed.slots[port.name].offset} /* its own place in the arena */",
        ]
    lines += [
        "",
        "#ifdef __cplusplus",
        'extern "C" {',
        "#endif",
        "",
        "/* One sample. Returns 0; 1: the arena is too small; 2: it is not aligned to 4 bytes, and nothing is written;",
        "   3: a library refused (--kernels).",
        "   Inputs and outputs may lie anywhere, also in the arena at the places above. No state between calls. */",
        f"int {name}_run({_parameters(program)});",
        "",
        "#ifdef __cplusplus",
        "}",
        "#endif",
        "",
        "#endif",
        "",
    ]
    return "\n".join(lines)


def run_function(program: Program, name: str, steps: Sequence[str]) -> Iterator[str]:
    yield f"int {name}_run({_parameters(program)})\n{{"
    yield "    int8_t *const bytes = (int8_t *)arena;"
    if any("(i = 0;" in step for step in steps):
        yield "    int i;"
    yield f"    if (arena_bytes < {name.upper()}_ARENA_BYTES)\n        return 1;"
    yield "    if ((uintptr_t)arena % 4)\n        return 2;"
    yield "    (void)bytes;"
    yield from steps
    yield "    return 0;\n}"


def main_function(program: Program, name: str) -> Iterator[str]:
    upper, ports = name.upper(), list(_ports(program))
    yield ""
    yield "/* Input codes from standard input, sample after sample; output codes to standard output. */"
    yield "int main(void)\n{"
    yield f"    static int32_t arena[({upper}_ARENA_BYTES + 3) / 4];"
    yield from (
        f"    static {port.dtype}_t {word}[{upper}_{word.upper()}_BYTES / {port.dtype.itemsize}];"
        for word, _, port in ports
    )
    reads = [f"fread({word}, 1, sizeof {word}, stdin) == sizeof {word}" for word, const, _ in ports if const]
    yield f"    while ({' && '.join(reads)}) {{"
    words = ", ".join(word for word, _, _ in ports)
    yield f"        if ({name}_run({words}, arena, sizeof arena))\n            return 1;"
    for word, const, _ in ports:
        if not const:
            yield f"        if (fwrite({word}, 1, sizeof {word}, stdout) != sizeof {word})\n            return 1;"
    yield "    }\n    return ferror(stdin) != 0;\n}"


def comment(text: str) -> str:
    """A name as it may stand in a comment."""
    return re.sub(r"[^ -~]|\*/|/\*|\\", "?", text)
