"""How much memory samples take on their way through a network: measured on one, so that batches can follow from it."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx


@dataclass(frozen=True)
class Footprint:
    """Bytes of activations for each byte of input.

    made    all that the nodes make together: a backward pass needs about as much
    alive   the most that is needed at once on the way forward
    """

    made: float
    alive: float


def footprint(module: fx.GraphModule, inputs: Sequence[Tensor]) -> Footprint:
    """Of one pass with these inputs."""
    run = _Counting(module)
    with torch.no_grad():
        run.run(*inputs)
    given = max(1, sum(x.nbytes for x in inputs))
    return Footprint(run.made / given, run.alive / given)


class _Counting(fx.Interpreter):
    """Runs a module and adds up what its nodes make; parameters are not counted, views only once."""

    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__(module)
        self.made = self.alive = 0

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        if n.op not in ("get_attr", "output") and isinstance(result, Tensor):
            sources = (self.env.get(source) for source in n.all_input_nodes)
            if not any(isinstance(x, Tensor) and _storage(x) == _storage(result) for x in sources):
                self.made += result.nbytes
            held = {_storage(x): x.nbytes for node, x in self.env.items() if node.op != "get_attr" and _is_tensor(x)}
            self.alive = max(self.alive, sum(held.values()) + result.nbytes)
        return result


def _is_tensor(x: Any) -> bool:
    return isinstance(x, Tensor)


def _storage(x: Tensor) -> int:
    return x.untyped_storage().data_ptr()
