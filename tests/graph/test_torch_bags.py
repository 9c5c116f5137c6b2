"""Embedding bags of torch become Gather and a reduction, which every engine loads, and are quantized by row."""

import numpy as np
import onnx_ir as ir
import pytest
import torch
from torch import Tensor, nn

import lowbit as lb

pytestmark = pytest.mark.slow  # torch's exporter takes seconds


class Bags(nn.Module):
    """All kinds in one module, since each export takes a second: of one length, and by offsets."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.bags = nn.ModuleList(nn.EmbeddingBag(300, 16, mode=mode, padding_idx=3) for mode in ("sum", "mean", "max"))

    def forward(self, ids: Tensor, flat: Tensor, offsets: Tensor, weights: Tensor) -> tuple[Tensor, ...]:
        even = [bag(ids) for bag in self.bags]
        uneven = [bag(flat, offsets) for bag in self.bags]
        return (*even, *uneven, self.bags[0](flat, offsets, weights))


def inputs(bags: int = 4, flat: int = 9) -> tuple[Tensor, ...]:
    draw = torch.Generator().manual_seed(bags)
    ids, line = torch.randint(0, 300, (bags, 5), generator=draw), torch.randint(0, 300, (flat,), generator=draw)
    ids[0, :2] = line[0] = 3
    offsets = torch.tensor([0, 2, 2, 7])  # the second bag is empty
    return ids, line, offsets, torch.rand(flat, generator=draw)


@pytest.fixture(scope="module")
def exported() -> lb.Model:
    axes = {"ids": {0: "bags"}, "flat": {0: "total"}, "offsets": {0: "uneven"}, "weights": {0: "total"}}
    return lb.load(Bags().eval(), inputs(), dynamic_axes=axes)


def test_bags_are_what_torch_computes_at_any_length(exported):
    assert not {"Loop", "Scan", "SequenceEmpty"} & {node.op_type for node in exported.program.graph}
    for given in (inputs(), inputs(6, 11)):
        exact = Bags().eval()(*given)
        found = exported.run(dict(zip(("ids", "flat", "offsets", "weights"), (x.numpy() for x in given), strict=True)))
        for y, z in zip(exact, found.values(), strict=True):
            np.testing.assert_allclose(z, y.detach().numpy(), atol=1e-6)


def test_bags_gather_codes(exported):
    quantized = lb.quantize(exported, None, "int4 channel:0")
    tables = [v.const_value for v in quantized.program.graph.initializers.values() if v.const_value.shape[:1] == (300,)]
    assert sorted(t.dtype.name for t in tables) == 3 * ["FLOAT"] + 3 * ["INT4"]  # scales and codes, each once
    assert all(t.shape == (300, 1) for t in tables if t.dtype is ir.DataType.FLOAT)
    network = lb.simulation(exported, None, "int4 channel:0")
    with network.mode("quantize"), torch.no_grad():
        simulated = network.module(*inputs())
    given = dict(zip(("ids", "flat", "offsets", "weights"), (x.numpy() for x in inputs()), strict=True))
    for name, y in quantized.run(given).items():
        np.testing.assert_allclose(y, simulated[name].numpy(), atol=1e-6)
