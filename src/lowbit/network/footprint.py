"""How much memory samples take on their way through a network: measured on one, so that batches can follow from it."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, fx

from lowbit.network.in_step import Walk, in_step


@dataclass(frozen=True)
class Footprint:
    """Bytes of activations for each byte of input.

    made    all that the nodes make together: a backward pass needs about as much
    alive   the most that is needed at once on the way forward
    """

    made: float
    alive: float


def footprint(module: fx.GraphModule, inputs: Sequence[Tensor]) -> Footprint:
    """Of one pass with these inputs. Parameters are not counted, behind a quantizer neither; views only once."""
    walk, made, alive = Walk(module, inputs), 0, 0
    parameters: set[int] = set()
    for node in in_step(walk):
        sources = {_storage(walk.env[source]) for source in node.all_input_nodes if _is_tensor(walk.env[source])}
        result = walk.compute(node)
        if node.op == "get_attr" and _is_tensor(result):
            parameters.add(_storage(result))
        if node.op not in ("get_attr", "output") and _is_tensor(result):
            made += result.nbytes if _storage(result) not in sources else 0
            held = {_storage(x): x.nbytes for n, x in walk.env.items() if n.op != "get_attr" and _is_tensor(x)}
            alive = max(alive, sum(size for place, size in held.items() if place not in parameters))
    given = max(1, sum(x.nbytes for x in inputs))
    return Footprint(made / given, alive / given)


def _is_tensor(x: Any) -> bool:
    return isinstance(x, Tensor)


def _storage(x: Tensor) -> int:
    return x.untyped_storage().data_ptr()
