"""Walking a network node by node: all batches, exact and quantized, come to a node before any goes on.

Whoever walks sees each node before it is computed, can compute it at once, look at values and replace them. Values that
nobody will read any more are freed.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, fx


class Walk(fx.Interpreter):
    """One batch on its way through a module; `env` holds the values of the nodes so far.

    exact        values pass by their quantizers unchanged
    parameters   what an exact walk reads in the place of the module's own, by name: steps have edited those
    """

    def __init__(
        self,
        module: fx.GraphModule,
        batch: Sequence[Tensor],
        *,
        exact: bool = False,
        parameters: Mapping[str, Tensor] = MappingProxyType({}),
    ) -> None:
        super().__init__(module)
        self.args_iter, self.exact, self.parameters = iter(batch), exact, parameters

    def run_node(self, n: fx.Node) -> Any:
        if self.exact and "exact" in n.meta:  # a module that rounds, and the function that it stands for
            arguments, attributes = self.fetch_args_kwargs_from_env(n)
            return n.meta["exact"](*arguments, **attributes)
        if self.exact and n.op == "get_attr" and n.target in self.parameters:
            return self.parameters[str(n.target)]
        source = n.args[0] if self.exact and "quantized_value" in n.meta else None
        return self.env[source] if isinstance(source, fx.Node) else super().run_node(n)

    def compute(self, node: fx.Node) -> Any:
        """The node's value, computed unless it was, and so what it is made of."""
        if node not in self.env:
            for source in node.all_input_nodes:
                self.compute(source)
            with torch.no_grad():
                self.env[node] = self.run_node(node)
        return self.env[node]

    def renew(self, node: fx.Node) -> None:
        """Compute a constant again, and what it is made of: a weight was replaced, or its quantizer's codes."""
        for source in node.all_input_nodes:
            self.renew(source)
        self.env.pop(node, None)
        self.compute(node)

    def free(self, node: fx.Node) -> None:
        """Let go of what nobody reads behind this node."""
        for done in self.user_to_last_uses.get(node, []):
            del self.env[done]


def in_step(*walks: Walk, nodes: Iterable[fx.Node] | None = None) -> Iterator[fx.Node]:
    """Each node of the walks' module in turn, or of a part of it, before they compute it; the last is the output."""
    for node in walks[0].graph.nodes if nodes is None else nodes:
        yield node
        for walk in walks:
            walk.compute(node)
            walk.free(node)
