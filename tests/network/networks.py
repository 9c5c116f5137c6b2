"""Small networks of the families that users bring, with random weights, for build() to read as torch exports them."""

import torch
from torch import Tensor, nn


def conv_norm(inputs: int, outputs: int, kernel: int = 3, stride: int = 1, groups: int = 1) -> nn.Sequential:
    conv = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False)
    norm = nn.BatchNorm2d(outputs)
    norm.running_mean.normal_(0, 0.1)
    norm.running_var.uniform_(0.5, 1.5)
    return nn.Sequential(conv, norm)


class Residual(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.body = nn.Sequential(conv_norm(inputs, outputs, 3, stride), nn.ReLU(), conv_norm(outputs, outputs))
        self.skip = nn.Identity() if stride == 1 else conv_norm(inputs, outputs, 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.body(x) + self.skip(x))


def resnet() -> nn.Module:
    return nn.Sequential(
        conv_norm(3, 16, 7, 2), nn.ReLU(), nn.MaxPool2d(3, 2, 1),
        Residual(16, 16, 1), Residual(16, 32, 2), Residual(32, 64, 2),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10),
    )  # fmt: skip


class SqueezeExcite(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.gate = nn.Sequential(
            nn.AdaptiveAvgPool2d(1), nn.Conv2d(channels, 8, 1), nn.ReLU(), nn.Conv2d(8, channels, 1), nn.Hardsigmoid()
        )

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gate(x)


class Inverted(nn.Module):
    """MobileNet's block: expand, depthwise, (squeeze and excite), project."""

    def __init__(self, inputs: int, outputs: int, stride: int, act: type[nn.Module], excite: bool) -> None:
        super().__init__()
        wide = inputs * 4
        parts = [conv_norm(inputs, wide, 1), act(), conv_norm(wide, wide, 5 if excite else 3, stride, wide), act()]
        parts += [SqueezeExcite(wide)] if excite else []
        self.body = nn.Sequential(*parts, conv_norm(wide, outputs, 1))
        self.skips = stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        return x + self.body(x) if self.skips else self.body(x)


def mobilenet(act: type[nn.Module], excite: bool) -> nn.Module:
    return nn.Sequential(
        conv_norm(3, 16, 3, 2), act(),
        Inverted(16, 16, 1, act, excite), Inverted(16, 24, 2, act, excite), Inverted(24, 24, 1, act, excite),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(0.2), nn.Linear(24, 10),
    )  # fmt: skip


class UNet(nn.Module):
    """Transposed convolutions up on one level, bilinear and nearest resizing on the others."""

    def __init__(self) -> None:
        super().__init__()
        self.down = nn.ModuleList([conv_norm(3, 8), conv_norm(8, 16), conv_norm(16, 32), conv_norm(32, 64)])
        self.up = nn.ConvTranspose2d(64, 32, 2, 2)
        self.smooth = nn.Upsample(scale_factor=2, mode="bilinear", align_corners=False)
        self.near = nn.Upsample(scale_factor=2, mode="nearest")
        self.join = nn.ModuleList([conv_norm(64, 32), conv_norm(48, 16), conv_norm(24, 8)])
        self.head = nn.Conv2d(8, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        levels = []
        for i, block in enumerate(self.down):
            x = nn.functional.leaky_relu(block(x if i == 0 else nn.functional.max_pool2d(x, 2)), 0.1)
            levels.append(x)
        x = torch.relu(self.join[0](torch.cat([self.up(levels[3]), levels[2]], 1)))
        x = torch.relu(self.join[1](torch.cat([self.smooth(x), levels[1]], 1)))
        x = torch.relu(self.join[2](torch.cat([self.near(x), levels[0]], 1)))
        return self.head(x)


class TokenClassifier(nn.Module):
    """Embedding, a recurrent network in both directions, mean over time, a linear layer."""

    def __init__(self, kind: type[nn.RNNBase]) -> None:
        super().__init__()
        self.embed = nn.Embedding(50, 16)
        self.rnn = kind(16, 24, num_layers=2, bidirectional=True, batch_first=True)
        self.head = nn.Linear(48, 5)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.rnn(self.embed(ids))[0].mean(1))


class Normalized(nn.Module):
    """Group, instance and layer normalization, GELU, transposed 1-d convolution: parts of speech networks."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv1d(4, 16, 5, 2, 2), nn.GroupNorm(4, 16), nn.GELU(), nn.Conv1d(16, 16, 3, padding=2, dilation=2),
            nn.InstanceNorm1d(16, affine=True), nn.SiLU(), nn.ConvTranspose1d(16, 4, 4, 2, 1), nn.Softplus(),
        )  # fmt: skip
        self.norm = nn.LayerNorm(4)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.body(x).transpose(1, 2)).cumsum(1)
