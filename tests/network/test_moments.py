"""Second moments of what weights are multiplied with: rows times weights give the layer's output back."""

import pytest
import torch
from torch import Tensor, nn

import lowbit as lb
from lowbit.graph.layer import by_group, of_groups
from lowbit.network.build import build
from lowbit.network.footprint import footprint
from lowbit.network.moments import moments_in_turn, multiplied

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


def one_layer(name: str) -> tuple[torch.fx.GraphModule, torch.fx.Node, str, Tensor]:
    torch.manual_seed(0)
    layer, shape = LAYERS[name]
    x = torch.randn(3, *shape)
    module = build(lb.load(layer.eval(), x).program).eval()
    node = next(n for n in module.graph.nodes if n.meta.get("op") in ("Conv", "MatMul", "Gemm"))
    return module, node, str(node.args[1].target), x


@pytest.mark.parametrize("name", LAYERS)
def test_rows_times_weights_are_the_layers_output(name: str) -> None:
    module, node, key, x = one_layer(name)
    weight = module.get_parameter(key).detach()
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
    module, node, key, x = one_layer(name)
    parameters = dict(module.named_parameters())
    ((_, whole),) = moments_in_turn(module, parameters, parameters, [key], [(x,)])
    ((_, parts),) = moments_in_turn(module, parameters, parameters, [key], [(x[:1],), (x[1:],)])
    torch.testing.assert_close(whole.quantized, parts.quantized, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(whole.quantized, whole.cross)
    for group, rows in enumerate(multiplied(node, x)):
        torch.testing.assert_close(whole.quantized[group].float(), (rows.T @ rows).detach())


def test_a_weight_that_is_changed_in_its_turn_changes_what_the_next_sees() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 6, bias=False), nn.ReLU(), nn.Linear(6, 3, bias=False)).eval()
    x = torch.randn(20, 4)
    module = build(lb.load(net, x).program).eval()
    exact = {key: p.detach() for key, p in module.named_parameters()}
    quantized, seen = dict(exact), {}
    for key, moments in moments_in_turn(module, exact, quantized, list(exact), [(x[:8],), (x[8:],)]):
        seen[key] = moments
        quantized[key] = torch.round(exact[key])
    first, second = seen.values()
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
    module = build(lb.load(Twice().eval(), ids).program)
    parameters = dict(module.named_parameters())
    assert list(moments_in_turn(module, parameters, parameters, parameters, [(ids,)])) == []


@pytest.mark.parametrize("x", [torch.zeros(0, 4), torch.full((3, 4), -torch.inf)])
def test_weights_that_meet_nothing_or_infinities_are_left_out(x: Tensor) -> None:
    module = build(lb.load(nn.Linear(4, 3).eval(), torch.ones(2, 4)).program).eval()
    parameters = dict(module.named_parameters())
    assert list(moments_in_turn(module, parameters, parameters, parameters, [(x,)])) == []


def test_a_footprint_counts_activations_and_not_parameters() -> None:
    module = build(
        lb.load(nn.Sequential(nn.Linear(4, 50), nn.ReLU(), nn.Linear(50, 2)).eval(), torch.randn(3, 4)).program
    )
    found = footprint(module, (torch.randn(3, 4),))
    assert found.alive * 4 == 2 * 50  # 352 parameters; the product and its relu are alive together
    assert found.made * 4 == 4 + 50 + 50 + 2  # the input too
