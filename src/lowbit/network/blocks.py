"""Blocks: parts of a network of at most a few layers, between values that everything flows through where there are any.

A block begins in front of a quantizer or a layer: it reads what the block before computes, and quantizes it itself.
"""

from collections.abc import Container, Iterable, Iterator
from dataclasses import dataclass

from torch import fx

from lowbit.network.quantizers import FakeQuant

MOST_LAYERS = 8


@dataclass(frozen=True)
class Block:
    """Nodes that follow from the network's inputs, in order; constants that they read are not listed.

    reads   the inputs and the values of earlier blocks that it reads
    makes   the values that later blocks or the network's output read
    layers  how many of the nodes multiply with a weight
    """

    nodes: list[fx.Node]
    reads: list[fx.Node]
    makes: list[fx.Node]
    layers: int


def find_blocks(module: fx.GraphModule, most: int = MOST_LAYERS) -> list[Block]:
    """The network cut into blocks, in order.

    A block ends where only one value goes on, as late as `most` layers allow. Where that is too far, it ends behind
    `most` layers, whatever goes on.
    """
    moving = list(_moving(module))
    place = {node: i for i, node in enumerate(moving)}
    last = [max((place.get(u, len(moving)) for u in node.users), default=i) for i, node in enumerate(moving)]
    inputs = [n for n in module.graph.nodes if n.op == "placeholder"]
    ends = [i for i, node in enumerate(moving) if i and _may_begin(module, node)] + [len(moving)]
    crossing = {
        end: sum(last[i] >= end and "on_host" not in moving[i].meta for i in range(end))
        + sum(any(place.get(u, -1) >= end for u in n.users) for n in inputs)
        for end in ends
    }
    crossing[len(moving)] = 1  # the network's outputs go nowhere
    layers = [0]
    for node in moving:
        layers.append(layers[-1] + ("layer" in node.meta))
    blocks, start = [], 0
    while start < len(moving):
        end = _end(start, ends, crossing, layers, most)
        blocks.append(_block(moving[start:end], {*inputs, *moving}, layers[end] - layers[start]))
        start = end
    return blocks


def _moving(module: fx.GraphModule) -> Iterator[fx.Node]:
    """All nodes but the output that follow from the inputs."""
    known = set()
    for node in module.graph.nodes:
        if node.op == "placeholder":
            known.add(node)
        elif node.op != "output" and any(source in known for source in node.all_input_nodes):
            known.add(node)
            yield node


def _may_begin(module: fx.GraphModule, node: fx.Node) -> bool:
    """Whether a block may begin with it: the quantizer of an activation, or a layer that reads an unquantized one."""
    if "layer" in node.meta:
        return "quantized_value" not in node.all_input_nodes[0].meta
    return "quantized_value" in node.meta and isinstance(module.get_submodule(str(node.target)), FakeQuant)


def _end(start: int, ends: Iterable[int], crossing: dict[int, int], layers: list[int], most: int) -> int:
    """Where the block from `start` on ends."""
    left = {end: layers[end] - layers[start] for end in ends if end > start}
    whole = max(left)
    left = {end: count for end, count in left.items() if count and layers[whole] > layers[end]} | {whole: left[whole]}
    near = [end for end, count in left.items() if count <= most]
    alone = [end for end in left if crossing[end] <= 1]
    if any(end in alone for end in near):
        return max(end for end in near if end in alone)
    if left[alone[0]] <= 2 * most:
        return alone[0]
    return max(near, default=min(left))


def _block(nodes: list[fx.Node], known: Container[fx.Node], layers: int) -> Block:
    inside = set(nodes)
    reads = dict.fromkeys(n for node in nodes for n in node.all_input_nodes if n not in inside and n in known)
    makes = [node for node in nodes if any(user not in inside for user in node.users)]
    return Block(nodes, list(reads), makes, layers)
