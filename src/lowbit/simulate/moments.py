"""What each weight is multiplied with: the second moments of a layer's inputs, Σ x xᵀ, from one pass over samples."""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, fx

from lowbit.simulate.operators_spatial import conv_pads, pad_sides

LARGEST = 8192  # inputs of a layer whose moments are kept: 8192² float32 numbers are 256 MiB


def second_moments(
    module: fx.GraphModule, parameters: Mapping[str, Tensor], keys: Iterable[str], batches: Iterable[tuple[Tensor, ...]]
) -> dict[str, Tensor]:
    """Key of a weight → (groups, inputs, inputs), for weights of convolutions and matrix products.

    parameters   key → tensor that the module computes with, in place of its own
    keys         of the weights that are asked for
    batches      inputs of the network

    Left out are weights of other operators, of more than LARGEST inputs, and those that several nodes read.
    """
    readers = {node: key for key in keys for node in _readers(module, key) if _inputs(node, parameters[key]) <= LARGEST}
    found: dict[str, Tensor] = {}
    with torch.no_grad():
        for batch in batches:
            for node, x in _first_inputs(module, parameters, batch, readers):
                for group, rows in enumerate(multiplied(node, x, parameters[readers[node]])):
                    found.setdefault(readers[node], rows.new_zeros(_groups(node), rows.shape[1], rows.shape[1]))
                    found[readers[node]][group].addmm_(rows.T, rows)
    return found


def weight_rows(node_groups: int, weight: Tensor, output_axis: int) -> Tensor:
    """(groups, outputs, inputs): a weight in the order of its moments."""
    return weight.movedim(output_axis, 0).reshape(node_groups, -1, weight.numel() // weight.shape[output_axis])


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
    parts = x.chunk(_groups(node), dim=1)
    return [p.movedim(1, len(kernel) + 1).reshape(-1, weight[0].numel()) for p in parts]


def _groups(node: fx.Node) -> int:
    return int(node.kwargs.get("group", 1))  # type: ignore[arg-type]


def _readers(module: fx.GraphModule, key: str) -> list[fx.Node]:
    """The one node that multiplies with this weight, if it is a convolution or a product."""
    users = [user for node in module.graph.nodes if node.op == "get_attr" and node.target == key for user in node.users]
    if len(users) != 1 or users[0].meta.get("op") not in ("Conv", "MatMul", "Gemm"):
        return []
    (user,) = users
    weight = user.args[1]
    return users if isinstance(weight, fx.Node) and weight.target == key else []


def _inputs(node: fx.Node, weight: Tensor) -> int:
    """How many numbers each output of the node sums."""
    axis = 0 if node.meta["op"] == "Conv" or node.kwargs.get("transB") else -1
    return weight.numel() // weight.shape[axis]


class _Run(fx.Interpreter):
    """Runs a module with other parameters than its own."""

    def __init__(self, module: fx.GraphModule, parameters: Mapping[str, Tensor]) -> None:
        super().__init__(module)
        self.parameters = parameters

    def fetch_attr(self, target: str) -> Any:
        return self.parameters[target] if target in self.parameters else super().fetch_attr(target)


def _first_inputs(
    module: fx.GraphModule, parameters: Mapping[str, Tensor], batch: tuple[Tensor, ...], wanted: Mapping[fx.Node, str]
) -> Iterator[tuple[fx.Node, Tensor]]:
    """Run one batch; each wanted node with its first input, as it comes."""
    run = _Run(module, parameters)
    run.args_iter = iter(batch)
    for node in module.graph.nodes:
        if node in wanted:
            yield node, run.env[node.args[0]]
        run.env[node] = run.run_node(node)
        for done in run.user_to_last_uses.get(node, []):
            del run.env[done]
