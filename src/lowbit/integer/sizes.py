"""An integer program has fixed sizes: those of one sample. A dimension without a name is 'input_place'."""

from collections.abc import Iterator, Mapping

import numpy as np
import onnx_ir as ir

from lowbit.errors import ShapeError
from lowbit.graph.fix_inputs import fix_inputs
from lowbit.graph.fold import infer_shapes
from lowbit.graph.layer import RECURRENT, number


def fix_sizes(program: ir.Model, sizes: dict[str, int]) -> None:
    """One sample at a time: the first axis of every input becomes 1; ShapeError where another has no size."""
    for port in program.graph.inputs:
        if port.shape is not None:
            port.shape = ir.Shape([d if isinstance(d, int) else _name(port, i) for i, d in enumerate(port.shape)])
    infer_shapes(program)
    along = {str(dim.value) for dim in _steps(program) if not isinstance(dim, int)} - sizes.keys()
    for port in program.graph.inputs:
        dims = list(port.shape or ())
        named = [(place, str(d.value)) for place, d in enumerate(dims) if not isinstance(d, int)]
        others = [name for place, name in named if name not in sizes and (place or name in along)]
        if others or not dims:
            wanted = ",".join(f"{name}=…" for name in others)
            raise ShapeError(
                f"input '{port.name}' has the shape {port.shape}: an integer program needs every size but the batch's. "
                f"{f'Fix it: --shape {wanted}' if dims else 'Quantize a file that says the axes of this input'}."
            )
        sizes |= {name: 1 for place, name in named if not place and name not in sizes}
        first, *rest = (d if isinstance(d, int) else sizes[str(d.value)] for d in dims)
        if first != 1 and (len(rest) != 2 or rest[0] != 1):  # a recurrent layer's: steps or layers, a batch of 1
            raise ShapeError(f"input '{port.name}' has a fixed batch of {first}; an integer program takes one sample.")
    fix_inputs(program, sizes)


def sizes_of(program: ir.Model, batch: Mapping[str, np.ndarray]) -> dict[str, int]:
    """What a batch says of the dimensions that have no fixed size."""
    found: dict[str, int] = {}
    for port in program.graph.inputs:
        sizes = enumerate(zip(port.shape or (), batch[str(port.name)].shape, strict=False))
        found |= {_name(port, place): size for place, (dim, size) in sizes if not isinstance(dim, int)}
    return found


def _name(port: ir.Value, place: int) -> str:
    dim = port.shape[place] if port.shape is not None else None
    return f"{port.name}_{place}" if not isinstance(dim, ir.SymbolicDim) or dim.value is None else dim.value


def _steps(program: ir.Model) -> Iterator[int | ir.SymbolicDim]:
    """How many steps recurrent layers make, as their inputs say: never one for each sample of a batch."""
    for node in program.graph:
        shape = node.inputs[0].shape if node.op_type in RECURRENT and node.inputs[0] is not None else None
        if shape is not None:
            yield shape[int(number(node, "layout"))]
