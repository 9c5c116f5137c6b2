"""Imports go down only. What a folder may import is the table below: what is not in it must not be imported."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

SOURCE = Path(__file__).parents[1] / "src" / "lowbit"

# folder (or file) → what of lowbit it may import besides errors and itself; each only what stands above it
MAY_IMPORT: dict[str, set[str]] = {
    "errors": set(),
    "machine_code": set(),
    "metadata": set(),
    "classes": set(),
    "processes": set(),
    "numerics": {"machine_code"},
    "ranges": {"machine_code", "numerics"},
    "graph": set(),
    "storage": {"machine_code"},
    "engines": set(),
    "model": {"graph", "engines", "storage"},
    "data": {"storage"},
    "targets": {"numerics"},
    "solve": {"numerics", "ranges", "graph"},
    "recipe": {"numerics", "ranges", "graph", "targets", "solve"},
    "presets": {"numerics", "targets", "recipe"},
    "network": {"numerics", "ranges", "graph", "targets", "recipe", "solve", "processes"},
    "deploy": {"numerics", "ranges", "graph", "engines", "network"},
    "integer": {"machine_code", "graph", "engines"},
    "repair": {"numerics", "ranges", "graph", "engines", "targets", "network", "solve", "recipe", "classes"},
    "training": {"storage", "processes", "classes"},
    "report": {"storage", "metadata"},  # what it draws it takes as it is given
    "flows": {
        *(
            "numerics",
            "ranges",
            "graph",
            "storage",
            "engines",
            "model",
            "data",
            "targets",
            "recipe",
            "presets",
            "solve",
        ),
        *("network", "deploy", "integer", "repair", "training", "report", "metadata", "processes", "classes"),
    },
    "cli": {
        "graph",
        "numerics",
        "ranges",
        "storage",
        "model",
        "data",
        "integer",
        "report",
        "flows",
        "processes",
    },
}


def test_the_table_itself_goes_down_only():
    order = list(MAY_IMPORT)
    for folder, below in MAY_IMPORT.items():
        assert all(order.index(other) < order.index(folder) for other in below), folder


def test_every_part_of_the_package_is_in_the_table():
    parts = {path.stem for path in SOURCE.iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()}
    assert parts - {"__init__", "__main__"} == set(MAY_IMPORT)


def test_no_folder_imports_what_stands_below_it_in_the_table():
    wrong = []
    for path in sorted(SOURCE.rglob("*.py")):
        folder = path.relative_to(SOURCE).parts[0].removesuffix(".py")
        if folder in ("__init__", "__main__"):
            continue
        allowed = MAY_IMPORT[folder] | {folder, "errors"}
        wrong += [f"{path.relative_to(SOURCE)} imports {m}" for m in imports(path) if part_of(m) not in allowed | {""}]
    assert not wrong


def test_every_part_may_import_only_what_it_needs():
    used: dict[str, set[str]] = {folder: set() for folder in MAY_IMPORT}
    for path in SOURCE.rglob("*.py"):
        folder = path.relative_to(SOURCE).parts[0].removesuffix(".py")
        used.setdefault(folder, set()).update(map(part_of, imports(path)))
    unused = {folder: sorted(allowed - used[folder]) for folder, allowed in MAY_IMPORT.items()}
    assert not {folder: parts for folder, parts in unused.items() if parts}


def test_no_part_reaches_another_through_the_package_itself():
    """`import lowbit` is for its version and its folder; `lowbit.quantize` would be an import that no table sees."""
    wrong = []
    for path in sorted(SOURCE.rglob("*.py")):
        text = path.read_text(encoding="utf-8")
        nodes = ast.walk(ast.parse(text)) if "import lowbit\n" in text else ()
        taken = [n for n in nodes if isinstance(n, ast.Attribute) and isinstance(n.value, ast.Name)]
        found = {n.attr for n in taken if n.value.id == "lowbit"} - {"__version__", "__file__"}
        wrong += [f"{path.relative_to(SOURCE)}: lowbit.{name}" for name in found]
    assert not wrong


def test_the_deprecated_quantization_of_torch_is_imported_nowhere():
    root = SOURCE.parents[1]
    files = [p for folder in ("src", "tests", "examples", "benchmarks") for p in (root / folder).rglob("*.py")]
    gone = ("torch.ao", "torch.quantization")
    assert not [f"{path}: {m}" for path in files for m in imports(path) if m.startswith(gone)]


def test_importing_lowbit_loads_neither_torch_nor_onnxruntime():
    heavy = (
        "import sys, lowbit; lowbit.__all__; print([m for m in ('torch', 'onnxruntime', 'numba') if m in sys.modules])"
    )
    told = subprocess.run([sys.executable, "-c", heavy], check=True, capture_output=True, text=True, timeout=60).stdout
    assert told == "[]\n"


def imports(path: Path) -> Iterator[str]:
    """Modules that a file imports when it runs: what only the type checker sees does not count."""
    waiting: list[ast.AST] = [ast.parse(path.read_text(encoding="utf-8"))]
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            waiting += node.orelse
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        else:
            waiting += ast.iter_child_nodes(node)


def part_of(module: str) -> str:
    """'lowbit.numerics.grids.Int' → 'numerics'; '' where it is not of lowbit, or is lowbit's version."""
    name, _, rest = module.partition(".")
    return rest.partition(".")[0] if name == "lowbit" and not rest.startswith("__") else ""
