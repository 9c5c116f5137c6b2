"""Probing: a quantizer passes its input on as it lies in memory, so that the backward pass runs in the same order."""

import torch
import torch.nn.functional as F

from lowbit.network.quantizers import FakeQuant
from lowbit.numerics import parse_format
from lowbit.ranges import MinMax
from lowbit.recipe import TensorSpec

LAST = torch.channels_last


def test_a_probe_of_one_sample_keeps_channels_last():
    quantizer = FakeQuant(TensorSpec(parse_format("uint8"), MinMax()), ("x",))
    quantizer.mode = "probe"
    x = torch.ones(1, 8, 5, 5).contiguous(memory_format=LAST).requires_grad_()
    probed = quantizer(x)
    assert probed.stride() == x.stride()  # view_as gives (8, 1, 40, 8)
    behind = F.conv2d(probed, torch.ones(4, 8, 1, 1))
    assert behind.is_contiguous(memory_format=LAST)


def test_a_probe_is_a_link_of_its_own():
    quantizer = FakeQuant(TensorSpec(parse_format("uint8"), MinMax()), ("x",))
    quantizer.mode = "probe"
    x = torch.ones(1, 2, 3, 3, requires_grad=True)
    (3 * quantizer(x) + 5 * x).sum().backward(inputs=[x, *(found := quantizer.take_probes())])
    assert len(found) == 1
    assert x.grad is not None
    assert float(x.grad.mean()) == 8
    assert found[0].grad is not None
    assert float(found[0].grad.mean()) == 3
