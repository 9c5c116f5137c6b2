"""A ReLU that keeps nothing for the backward pass, where a quantizer behind it stops the same gradients.

What a ReLU made 0 lies on the lower end of unsigned codes, and the quantizer lets no gradient pass there. So a training
step holds one tensor less for each ReLU, and computes the same bits.
"""

import torch
from torch import Tensor, fx, nn

from lowbit.network.network import Network
from lowbit.network.quantizers import FakeQuant
from lowbit.network.straight_through import straight_through


class Rectifier(nn.Module):
    """ReLU; its own gradient is left to the quantizer that alone reads it, where that stops at 0."""

    def __init__(self, reader: FakeQuant) -> None:
        super().__init__()
        self.reader = (reader,)  # a tuple hides it from state_dict

    def forward(self, x: Tensor) -> Tensor:
        if torch.compiler.is_compiling() or not self.reader[0].stops_at_zero():  # a compiler computes a ReLU again
            return torch.relu(x)
        return straight_through(x, torch.relu(x.detach()))


def put_rectifiers(network: Network) -> None:
    """In the place of ReLUs that a quantizer reads, and nothing else; the quantizer reads only such."""
    module = network.module
    for quantizer in set(network.activations().values()):
        readers = [
            n for n in module.graph.nodes if n.op == "call_module" and module.get_submodule(n.target) is quantizer
        ]
        sources = [reader.args[0] for reader in readers]
        quantizer.behind_relu = all(n.target is torch.relu and len(n.users) == 1 for n in sources)
        for node in sources if quantizer.behind_relu else []:
            node.op, node.target = "call_module", f"rectifier_{node.name}"
            node.meta["exact"] = torch.relu
            module.add_submodule(node.target, Rectifier(quantizer))
    module.recompile()


def plain(node: fx.Node) -> fx.Node:
    """A node with a gradient of its own: of a Rectifier a ReLU beside it."""
    if node.meta.get("exact") is not torch.relu:
        return node
    with node.graph.inserting_after(node):
        return node.graph.call_function(torch.relu, node.args)
