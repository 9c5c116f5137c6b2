"""What stands around the steps in the C: the header, the function that runs them, a main, the loops of kernels.c."""

import re
from collections.abc import Iterator, Sequence
from importlib.resources import files

import numpy as np

from lowbit.integer.plan import Plan
from lowbit.integer.program import Program, Tensor

_SECTION = re.compile(r"/\* section (\w+)(?:: ([\w ]+))? \*/\n")


def kernels(used: set[str]) -> str:
    """The sections of kernels.c of these names and what they need, in the file's order."""
    text = (files("lowbit.integer") / "kernels.c").read_text(encoding="utf-8")
    parts = _SECTION.split(text)[1:]
    sections = {
        name: (needs or "", body) for name, needs, body in zip(parts[::3], parts[1::3], parts[2::3], strict=True)
    }
    wanted = set(used)
    for name in reversed(sections):
        if name in wanted:
            wanted |= set(sections[name][0].split())
    return "".join(body for name, (_, body) in sections.items() if name in wanted)


def _ports(program: Program) -> Iterator[tuple[str, str, Tensor]]:
    """(word, 'const ' or '', tensor) of each input and output."""
    for ports, word, const in ((program.inputs, "input", "const "), (program.outputs, "output", "")):
        for number, port in enumerate(ports):
            yield word if len(ports) == 1 else f"{word}{number}", const, port


def _parameters(program: Program) -> str:
    return (
        ", ".join(f"{const}int8_t *{word}" for word, const, _ in _ports(program)) + ", void *arena, size_t arena_bytes"
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
        shape = "x".join(map(str, port.shape[1:]))
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
        "/* One sample. Returns 0; 1: the arena is too small; 2: it is not aligned to 4 bytes, and nothing is written.",
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
    yield from (f"    static int8_t {word}[{upper}_{word.upper()}_BYTES];" for word, _, _ in ports)
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
