"""Notes that exporters leave in a file: which line of whose source an operator came from. No engine reads them.

torch writes a stack trace or a module path on every node: 2 to 20 % of a network of a megabyte. What a user writes on
the model, the graph, its inputs and outputs (a licence, class names, lowbit's ledger) is no note.
"""

from pathlib import Path

import onnx_ir as ir

PREFIX = "pkg."  # of the keys that exporters write on models, graphs and inputs


def drop_notes(program: ir.Model) -> None:
    """Remove, in place, what is noted on nodes and on values inside; elsewhere only an exporter's keys."""
    _drop_exported(program)
    for graph in program.graphs():
        _drop_exported(graph)
        outer = {*graph.inputs, *graph.outputs}
        for node in graph:
            _clear(node)
            for value in node.outputs:
                if value not in outer:
                    _clear(value)
        for value in graph.initializers.values():
            if value not in outer:
                _clear(value)
        for value in outer:
            _drop_exported(value)


def sizes(file: Path) -> tuple[int, int]:
    """Bytes of a network on disk, external data included, and how many of them are notes; a container has none."""
    if file.suffix == ".lowbit":
        return file.stat().st_size, 0
    program = ir.load(file)
    tensors = [value.const_value for graph in program.graphs() for value in graph.initializers.values()]
    beside = {Path(tensor.path) for tensor in tensors if isinstance(tensor, ir.ExternalTensor)}
    whole = ir.to_proto(program).ByteSize()
    drop_notes(program)
    return sum(path.stat().st_size for path in (file, *beside)), whole - ir.to_proto(program).ByteSize()


def _clear(noted: ir.Value | ir.Node) -> None:
    noted.metadata_props.clear()
    noted.doc_string = None


def _drop_exported(noted: ir.Model | ir.Graph | ir.Value) -> None:
    for key in [key for key in noted.metadata_props if key.startswith(PREFIX)]:
        del noted.metadata_props[key]
