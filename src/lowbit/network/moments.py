"""What each weight is multiplied with: inputs of layers, exactly and as they come out of layers rounded before.

Batches go through the network together, node by node, so whoever reads a layer's inputs can still change its weight.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from lowbit.network.operators_spatial import conv_pads, pad_sides

LARGEST = 8192  # inputs of a layer whose moments are kept: 8192² float64 numbers are 512 MiB
ROWS_AN_INPUT = 128  # positions that are summed, about: more of one sample look like their neighbours
Inputs = Sequence[tuple[Tensor, ...]]


@dataclass(frozen=True)
class Moments:
    """Of the inputs of one weight, for each group of its operator.

    rough  (groups, inputs, inputs) float64 Σ x̃ x̃ᵀ, of the inputs as they come
    cross  (groups, inputs, inputs) float64 Σ x x̃ᵀ, with those of the exact network
    rows   how many x were summed
    """

    rough: Tensor
    cross: Tensor
    rows: int


def moments_in_turn(
    module: fx.GraphModule,
    exact: Mapping[str, Tensor],
    rough: Mapping[str, Tensor],
    keys: Iterable[str],
    batches: Inputs,
) -> Iterator[tuple[str, Moments]]:
    """(key, moments) for every weight of a convolution or matrix product, in the order of the network.

    exact, rough   key → tensor that the module computes with, in place of its own; what `rough` holds for the key may
                   be replaced before the next is asked for

    Left out are weights of other operators, of more than LARGEST inputs, and those that several nodes read.
    """
    readers = {node: key for key in keys for node in _readers(module, key) if _inputs(node, exact[key]) <= LARGEST}
    runs = [[_Run(module, parameters, batch) for batch in batches] for parameters in (exact, rough)]
    for node in module.graph.nodes:
        with torch.no_grad():
            if node in readers:
                pairs = [(a.env[node.args[0]], b.env[node.args[0]]) for a, b in zip(*runs, strict=True)]
                yield readers[node], _moments(node, exact[readers[node]], pairs)
                for run in runs[1]:
                    run.env[node.args[1]] = rough[readers[node]]  # it was fetched before it was replaced
            for run in (*runs[0], *runs[1]):
                run.forward(node)


def widths(module: fx.GraphModule, parameters: Mapping[str, Tensor], batch: tuple[Tensor, ...]) -> Iterator[int]:
    """How many numbers, parameters aside, are alive after each node, while one batch goes through the network."""
    run = _Run(module, parameters, batch)
    with torch.no_grad():
        for node in module.graph.nodes:
            run.forward(node)
            alive = (x for source, x in run.env.items() if source.op != "get_attr" and isinstance(x, Tensor))
            yield sum(x.numel() for x in alive)


def weight_rows(groups: int, weight: Tensor, output_axis: int) -> Tensor:
    """(groups, outputs, inputs): a weight in the order of its moments."""
    return weight.movedim(output_axis, 0).reshape(groups, -1, weight.numel() // weight.shape[output_axis])


def weight_of_rows(rows: Tensor, shape: torch.Size, output_axis: int) -> Tensor:
    """The inverse of `weight_rows`."""
    moved = [shape[output_axis], *(n for axis, n in enumerate(shape) if axis != output_axis)]
    return rows.reshape(moved).movedim(0, output_axis).contiguous()


def multiplied(node: fx.Node, x: Tensor, weight: Tensor) -> list[Tensor]:
    """For each group of the node: rows (positions, inputs) that are multiplied with its weights."""
    if node.meta["op"] != "Conv":
        x = x.T if node.kwargs.get("transA") else x
        return [x.reshape(-1, x.shape[-1])]
    how: dict[str, Any] = dict(node.kwargs)
    kernel = weight.shape[2:]
    strides, dilations = how.get("strides") or (1,) * len(kernel), how.get("dilations") or (1,) * len(kernel)
    pads = conv_pads(x.shape[2:], kernel, strides, dilations, how.get("auto_pad", "NOTSET"), how.get("pads"))
    x = pad_sides(x, *pads)
    for axis, (k, s, d) in enumerate(zip(kernel, strides, dilations, strict=True), start=2):
        x = x.unfold(axis, d * (k - 1) + 1, s)[..., ::d]
    parts = x.chunk(how.get("group", 1), dim=1)
    return [p.movedim(1, len(kernel) + 1).reshape(-1, weight[0].numel()) for p in parts]


def _moments(node: fx.Node, weight: Tensor, pairs: list[tuple[Tensor, Tensor]]) -> Moments:
    sums: list[list[Tensor]] = []
    count, every = 0, 1
    for exact, rough in pairs:
        parts = [multiplied(node, x, weight) for x in (exact, rough)]
        if not count:  # an odd stride: positions of a row of pixels take turns
            every = len(parts[0][0]) * len(pairs) // (ROWS_AN_INPUT * parts[0][0].shape[1]) | 1
        columns = [(a[::every], b[::every]) for a, b in zip(*parts, strict=True)]
        found = [[(b.T @ b).double(), (a.T @ b).double()] for a, b in columns]
        count += len(columns[0][0])
        sums = [[x + y for x, y in zip(*two, strict=True)] for two in zip(sums, found, strict=True)] if sums else found
    rough_sums, cross_sums = (torch.stack(column) for column in zip(*sums, strict=True))
    return Moments(rough_sums, cross_sums, count)


def _readers(module: fx.GraphModule, key: str) -> list[fx.Node]:
    """The one node that multiplies with this weight, if it is a convolution or a product."""
    users = [user for node in module.graph.nodes if node.op == "get_attr" and node.target == key for user in node.users]
    if len(users) != 1 or users[0].meta.get("op") not in ("Conv", "MatMul", "Gemm"):
        return []
    weight = users[0].args[1]
    return users if isinstance(weight, fx.Node) and weight.target == key else []


def _inputs(node: fx.Node, weight: Tensor) -> int:
    """How many numbers each output of the node sums."""
    axis = 0 if node.meta["op"] == "Conv" or node.kwargs.get("transB") else -1
    return weight.numel() // weight.shape[axis]


class _Run(fx.Interpreter):
    """One batch on its way through a module, with other parameters than the module's own."""

    def __init__(self, module: fx.GraphModule, parameters: Mapping[str, Tensor], batch: tuple[Tensor, ...]) -> None:
        super().__init__(module)
        self.parameters = parameters
        self.args_iter = iter(batch)

    def fetch_attr(self, target: str) -> Any:
        return self.parameters[target] if target in self.parameters else super().fetch_attr(target)

    def forward(self, node: fx.Node) -> None:
        """The next node; what nobody will read any more is let go."""
        self.env[node] = self.run_node(node)
        for done in self.user_to_last_uses.get(node, []):
            del self.env[done]
