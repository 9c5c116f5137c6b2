"""ResNet-18, ResNet-50 and MobileNet v2 with random weights: for latency, where only shapes count.

Batch norms are folded, as exporters and engines do it, so that every quantizer is given the same network.

Sources: He et al. 2016 (arXiv 1512.03385), its stride in the 3×3 convolution; Sandler et al. 2018 (arXiv 1801.04381).
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn


def convolution(into: int, out: int, kernel: int, stride: int = 1, groups: int = 1) -> nn.Module:
    """A convolution with the bias that its batch norm was folded into."""
    return nn.Conv2d(into, out, kernel, stride, kernel // 2, groups=groups)


class Residual(nn.Module):
    """y = relu(f(x) + shortcut(x)), or without the relu."""

    def __init__(self, body: nn.Module, shortcut: nn.Module, *, relu: bool) -> None:
        super().__init__()
        self.body, self.shortcut, self.relu = body, shortcut, relu

    def forward(self, x: Tensor) -> Tensor:
        y = self.body(x) + self.shortcut(x)
        return torch.relu(y) if self.relu else y


def basic(into: int, width: int, stride: int) -> nn.Module:
    body = nn.Sequential(convolution(into, width, 3, stride), nn.ReLU(), convolution(width, width, 3))
    return Residual(body, shortcut(into, width, stride), relu=True)


def bottleneck(into: int, width: int, stride: int) -> nn.Module:
    reduce, spatial = convolution(into, width, 1), convolution(width, width, 3, stride)
    body = nn.Sequential(reduce, nn.ReLU(), spatial, nn.ReLU(), convolution(width, 4 * width, 1))
    return Residual(body, shortcut(into, 4 * width, stride), relu=True)


def shortcut(into: int, out: int, stride: int) -> nn.Module:
    return nn.Identity() if into == out and stride == 1 else convolution(into, out, 1, stride)


def resnet(block: Callable[[int, int, int], nn.Module], depths: tuple[int, ...], expansion: int) -> nn.Module:
    layers: list[nn.Module] = [convolution(3, 64, 7, 2), nn.ReLU(), nn.MaxPool2d(3, 2, 1)]
    channels = 64
    for stage, depth in enumerate(depths):
        width = 64 * 2**stage
        for index in range(depth):
            layers.append(block(channels, width, 2 if stage and not index else 1))
            channels = width * expansion
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, 1000))


def inverted(into: int, out: int, stride: int, expansion: int) -> nn.Module:
    width = into * expansion
    expand = [convolution(into, width, 1), nn.ReLU6()] if expansion > 1 else []
    body = nn.Sequential(*expand, convolution(width, width, 3, stride, width), nn.ReLU6(), convolution(width, out, 1))
    return Residual(body, nn.Identity(), relu=False) if stride == 1 and into == out else body


def mobilenet_v2() -> nn.Module:
    layers: list[nn.Module] = [convolution(3, 32, 3, 2), nn.ReLU6()]
    channels = 32
    table = ((1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1))
    for expansion, width, depth, first_stride in table:
        for index in range(depth):
            layers.append(inverted(channels, width, 1 if index else first_stride, expansion))
            channels = width
    layers += [convolution(channels, 1280, 1), nn.ReLU6(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(1280, 1000)]
    return nn.Sequential(*layers)


SHAPES: dict[str, Callable[[], nn.Module]] = {
    "ResNet-18": lambda: resnet(basic, (2, 2, 2, 2), 1),
    "ResNet-50": lambda: resnet(bottleneck, (3, 4, 6, 3), 4),
    "MobileNet v2": mobilenet_v2,
}
