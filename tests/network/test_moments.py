"""Second moments of what weights are multiplied with: rows times weights give the layer's output back."""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

import lowbit as lb
from lowbit.graph.layer import by_group, layers_of, of_groups
from lowbit.network.build import build
from lowbit.network.calibrate import both_walks
from lowbit.network.footprint import footprint
from lowbit.network.moments import moments_in_step, multiplied
from lowbit.network.network import Network
from lowbit.network.sites import Placement, Site
from lowbit.numerics import Format, Int, quantize
from lowbit.recipe import TensorSpec
from lowbit.solve import Moments

LAYERS = {
    "a convolution": (nn.Conv2d(4, 6, 3), (4, 9, 8)),
    "strides, pads, dilation": (nn.Conv2d(4, 6, (3, 2), stride=(2, 1), padding=(1, 2), dilation=(1, 2)), (4, 9, 8)),
    "groups": (nn.Conv2d(4, 8, 3, groups=2, padding=1), (4, 7, 7)),
    "depthwise": (nn.Conv2d(4, 4, 3, groups=4), (4, 7, 7)),
    "one axis": (nn.Conv1d(4, 6, 5, stride=2), (4, 17)),
    "three axes": (nn.Conv3d(2, 4, 2), (2, 4, 5, 4)),
    "a product": (nn.Linear(6, 5), (6,)),
    "a product over tokens": (nn.Linear(6, 5), (3, 6)),
}


def network_of(module: nn.Module, x: Tensor) -> Network:
    """A network with a quantizer on every weight, which holds nothing yet."""
    program = lb.load(module.eval(), x).program
    layers = [layer for node in program.graph for layer in layers_of(node)]
    sites = {
        str(v.name): Site(str(v.name), "weight", TensorSpec("int8"), "", str(v.name))
        for v in (la.value for la in layers)
    }
    return Network(program, Placement(sites, {}))


def seen(network: Network, *parts: Tensor) -> Iterator[tuple[str, Moments]]:
    """(weight, moments) in turn, from batches of the one input."""
    name = str(network.program.graph.inputs[0].name)
    with network.mode("quantize"):
        runs = both_walks(network, [{name: part.numpy()} for part in parts])
        yield from moments_in_step(*runs, network.constants())


def one_layer(name: str) -> tuple[Network, torch.fx.Node, Tensor]:
    torch.manual_seed(0)
    layer, shape = LAYERS[name]
    x = torch.randn(3, *shape)
    network = network_of(layer, x)
    node = next(n for n in network.module.graph.nodes if n.meta.get("op") in ("Conv", "MatMul", "Gemm"))
    return network, node, x


@pytest.mark.parametrize("name", LAYERS)
def test_rows_times_weights_are_the_layers_output(name: str) -> None:
    network, node, x = one_layer(name)
    weight = network.parameter(node.meta["layer"].value.name).detach()
    parts, axis = multiplied(node, x), node.meta["layer"].output_axis
    grouped = by_group(weight, len(parts), axis)
    ours = torch.cat([p @ r.T for p, r in zip(parts, grouped.flatten(2), strict=True)], dim=1)
    layer = LAYERS[name][0]
    theirs = layer(x) - layer.bias.reshape(
        -1, *[1] * (x.dim() - 2) if isinstance(layer, nn.modules.conv._ConvNd) else ()
    )
    theirs = theirs.movedim(1, -1) if node.meta["op"] == "Conv" else theirs
    torch.testing.assert_close(ours, theirs.reshape(ours.shape), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(of_groups(grouped, weight.shape, axis), weight)
    assert torch.equal(multiplied(node, x, 3), parts[:, ::3])


@pytest.mark.parametrize("name", ["groups", "a product over tokens"])
def test_moments_add_up_over_batches(name: str) -> None:
    network, node, x = one_layer(name)
    ((_, whole),) = seen(network, x)
    ((_, parts),) = seen(network, x[:1], x[1:])
    torch.testing.assert_close(whole.quantized, parts.quantized, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(whole.quantized, whole.cross)
    for group, rows in enumerate(multiplied(node, x)):
        torch.testing.assert_close(whole.quantized[group].float(), (rows.T @ rows).detach())


def test_a_weight_that_is_changed_in_its_turn_changes_what_the_next_sees() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 6, bias=False), nn.ReLU(), nn.Linear(6, 3, bias=False)).eval()
    x = torch.randn(20, 4)
    network, found = network_of(net, x), []
    for name, moments in seen(network, x[:8], x[8:]):
        found.append(moments)
        _, quantizer = network.constants()[name]
        quantizer.store(quantize(network.parameter(name).detach(), Format(Int(8)), (-127.0, 127.0)))  # step 1
    first, second = found
    assert torch.equal(first.quantized, first.cross)
    before = net[0].weight.detach()
    a, b = (x @ before.T).relu(), (x @ torch.round(before).T).relu()
    torch.testing.assert_close(second.quantized[0].float(), b.T @ b, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(second.cross[0].float(), a.T @ b, rtol=1e-4, atol=1e-4)


def test_weights_that_are_not_multiplied_once_are_left_out() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.shared, self.table = nn.Parameter(torch.randn(4, 4)), nn.Embedding(5, 4)

        def forward(self, ids: Tensor) -> Tensor:
            return self.table(ids) @ self.shared @ self.shared

    ids = torch.arange(3).reshape(1, 3)
    assert list(seen(network_of(Twice(), ids), ids)) == []


@pytest.mark.parametrize("x", [torch.zeros(0, 4), torch.full((3, 4), -torch.inf)])
def test_weights_that_meet_nothing_or_infinities_are_left_out(x: Tensor) -> None:
    assert list(seen(network_of(nn.Linear(4, 3), torch.ones(2, 4)), x)) == []


def test_a_footprint_counts_activations_and_not_parameters() -> None:
    module = build(
        lb.load(nn.Sequential(nn.Linear(4, 50), nn.ReLU(), nn.Linear(50, 2)).eval(), torch.randn(3, 4)).program
    )
    found = footprint(module, (torch.randn(3, 4),))
    assert found.alive * 4 == 2 * 50  # 352 parameters; the product and its relu are alive together
    assert found.made * 4 == 4 + 50 + 50 + 2  # the input too
