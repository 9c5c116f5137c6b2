"""Convolutions and poolings over one to three spatial axes.

ONNX pads each side of each axis by itself; torch pads both sides alike. Where a model's pads are even, torch's kernel
takes them, which is the common and fast way; otherwise the input is padded first.
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from lowbit.graph.pads import pads_of
from lowbit.network.operators_types import Ints, ints

Sizes = tuple[int, ...] | None

_CONVOLUTIONS = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
_TRANSPOSED = {1: F.conv_transpose1d, 2: F.conv_transpose2d, 3: F.conv_transpose3d}
_MAX_POOLS = {1: F.max_pool1d, 2: F.max_pool2d, 3: F.max_pool3d}
_AVERAGE_POOLS = {1: F.avg_pool1d, 2: F.avg_pool2d, 3: F.avg_pool3d}


def pad_sides(x: Tensor, before: Sequence[int], after: Sequence[int], value: float = 0.0) -> Tensor:
    """Pad, or crop where an amount is negative, the trailing axes."""
    return F.pad(x, [p for sides in zip(reversed(before), reversed(after), strict=True) for p in sides], value=value)


def _channels_last(x: Tensor) -> Tensor:
    """The same image with its channels adjacent in memory, which the results keep.

    On CPUs torch's convolutions then run 1.2 to 2 times as fast (squeezenet 1.9, batch 8), near onnxruntime's speed.
    """
    return x.contiguous(memory_format=torch.channels_last) if x.dim() == 4 and x.device.type == "cpu" else x


def conv(
    x: Tensor,
    w: Tensor,
    b: Tensor | None = None,
    *,
    auto_pad: str = "NOTSET",
    dilations: Sizes = None,
    group: int = 1,
    kernel_shape: Sizes = None,
    pads: Sizes = None,
    strides: Sizes = None,
) -> Tensor:
    n = w.dim() - 2
    stride, dilation = strides or (1,) * n, dilations or (1,) * n
    before, after = pads_of(x.shape[2:], w.shape[2:], stride, dilation, auto_pad, pads)
    if before != after:
        x, before = pad_sides(x, before, after), [0] * n
    return _CONVOLUTIONS[n](_channels_last(x), w, b, stride, before, dilation, group)


def conv_transpose(
    x: Tensor,
    w: Tensor,
    b: Tensor | None = None,
    *,
    auto_pad: str = "NOTSET",
    dilations: Sizes = None,
    group: int = 1,
    kernel_shape: Sizes = None,
    output_padding: Sizes = None,
    output_shape: Sizes = None,
    pads: Sizes = None,
    strides: Sizes = None,
) -> Tensor:
    n = w.dim() - 2
    stride, dilation, extra = strides or (1,) * n, dilations or (1,) * n, output_padding or (0,) * n
    full = [
        (i - 1) * s + d * (k - 1) + 1 for i, s, d, k in zip(x.shape[2:], stride, dilation, w.shape[2:], strict=True)
    ]
    if output_shape is None and auto_pad.startswith("SAME"):
        output_shape = tuple(i * s for i, s in zip(x.shape[2:], stride, strict=True))
    if output_shape is not None:
        surplus = [f + e - o for f, e, o in zip(full, extra, output_shape[-n:], strict=True)]
        halves = [s // 2 if auto_pad == "SAME_UPPER" else s - s // 2 for s in surplus]
        before, after = halves, [s - h for s, h in zip(surplus, halves, strict=True)]
    else:
        before, after = pads_of(
            x.shape[2:], w.shape[2:], stride, dilation, "NOTSET" if auto_pad == "NOTSET" else "VALID", pads
        )
    even = before == after and min(before, default=0) >= 0
    if even and all(e < max(s, d) for e, s, d in zip(extra, stride, dilation, strict=True)):
        return _TRANSPOSED[n](_channels_last(x), w, b, stride, before, extra, group, dilation)
    whole = _TRANSPOSED[n](_channels_last(x), w, None, stride, 0, 0, group, dilation)
    result = pad_sides(whole, [-p for p in before], [e - p for e, p in zip(extra, after, strict=True)])
    return result if b is None else result + b.reshape(-1, *(1,) * n)


def _windows(
    x: Tensor,
    kernel: Sequence[int],
    stride: Sequence[int],
    dilation: Sequence[int],
    before: list[int],
    after: list[int],
    ceil_mode: int,
) -> list[int]:
    """How far each axis must be padded after its end so that exactly the windows that ONNX counts fit.

    With ceil_mode a window may hang over the end, but not start beyond the input and the padding before it.
    """
    needed = []
    for length, k, s, d, p, q in zip(x.shape[2:], kernel, stride, dilation, before, after, strict=True):
        reach = d * (k - 1) + 1
        count = (length + p + q - reach) // s + 1
        if ceil_mode:
            count = -(-(length + p + q - reach) // s) + 1
            if (count - 1) * s >= length + p:
                count -= 1
        needed.append((count - 1) * s + reach - length - p)
    return needed


def max_pool(
    x: Tensor,
    *,
    kernel_shape: tuple[int, ...],
    auto_pad: str = "NOTSET",
    ceil_mode: int = 0,
    dilations: Sizes = None,
    pads: Sizes = None,
    storage_order: int = 0,
    strides: Sizes = None,
) -> Tensor:
    """Without the places of the maxima, which onnxruntime computes (`engine_node`)."""
    n, dtype = len(kernel_shape), x.dtype
    x = x if x.is_floating_point() else x.float()  # torch pools floats only; float32 holds 8-bit integers exactly
    stride, dilation = strides or (1,) * n, dilations or (1,) * n
    before, after = pads_of(x.shape[2:], kernel_shape, stride, dilation, auto_pad, pads)
    within = all(2 * p <= k for p, k in zip(before, kernel_shape, strict=True))
    if before != after or not within:
        after = _windows(x, kernel_shape, stride, dilation, before, after, ceil_mode)
        x, before, ceil_mode = pad_sides(x, before, after, -math.inf), [0] * n, 0
    return _MAX_POOLS[n](x, kernel_shape, stride, before, dilation, bool(ceil_mode)).to(dtype)


def average_pool(
    x: Tensor,
    *,
    kernel_shape: tuple[int, ...],
    auto_pad: str = "NOTSET",
    ceil_mode: int = 0,
    count_include_pad: int = 0,
    dilations: Sizes = None,
    pads: Sizes = None,
    strides: Sizes = None,
) -> Tensor:
    n = len(kernel_shape)
    stride, dilation = strides or (1,) * n, dilations or (1,) * n
    before, after = pads_of(x.shape[2:], kernel_shape, stride, dilation, auto_pad, pads)
    within = all(2 * p <= k for p, k in zip(before, kernel_shape, strict=True))
    if before == after and within and set(dilation) == {1}:
        return _AVERAGE_POOLS[n](x, kernel_shape, stride, before, bool(ceil_mode), bool(count_include_pad))
    fitted = _windows(x, kernel_shape, stride, dilation, before, after, ceil_mode)
    counted = torch.ones_like(x[:1, :1])
    if count_include_pad:
        counted = pad_sides(counted, before, after, 1.0)
        counted = pad_sides(counted, [0] * n, [f - a for f, a in zip(fitted, after, strict=True)])
    else:
        counted = pad_sides(counted, before, fitted)
    sums = _window_sums(pad_sides(x, before, fitted), kernel_shape, stride, dilation)
    return sums / _window_sums(counted, kernel_shape, stride, dilation)


def _window_sums(x: Tensor, kernel: Sequence[int], stride: Sequence[int], dilation: Sequence[int]) -> Tensor:
    planes = x.reshape(-1, 1, *x.shape[2:])
    sums = _CONVOLUTIONS[len(kernel)](planes, x.new_ones(1, 1, *kernel), None, stride, 0, dilation)
    return sums.reshape(*x.shape[:2], *sums.shape[2:])


def global_average_pool(x: Tensor) -> Tensor:
    return x.mean(tuple(range(2, x.dim())), keepdim=True)


def global_max_pool(x: Tensor) -> Tensor:
    return x.amax(tuple(range(2, x.dim())), keepdim=True)


def max_unpool(
    x: Tensor,
    indices: Tensor,
    output_shape: Ints | None = None,
    *,
    kernel_shape: tuple[int, ...],
    pads: Sizes = None,
    strides: Sizes = None,
) -> Tensor:
    n = len(kernel_shape)
    stride, cut = strides or (1,) * n, pads or (0,) * 2 * n
    lengths = [
        (i - 1) * s + k - cut[axis] - cut[axis + n]
        for axis, (i, s, k) in enumerate(zip(x.shape[2:], stride, kernel_shape, strict=True))
    ]
    tight = [*x.shape[:2], *lengths]
    wanted = tight if output_shape is None else list(ints(output_shape))
    # Indices count over the tensor that was pooled, whose size is the tight one; a larger output holds it at its start.
    result = x.new_zeros(math.prod(tight)).scatter(0, indices.flatten(), x.flatten()).reshape(tight)
    return pad_sides(result, [0] * n, [w - t for w, t in zip(wanted[2:], lengths, strict=True)])
