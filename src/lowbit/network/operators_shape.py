"""Moving values without changing them: reshape, transpose, slice, split, concatenate, pad; and shapes themselves."""

import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from lowbit.network.operators_types import Ints, Number, ints, number


def shape(x: Tensor, *, start: int = 0, end: int | None = None) -> Tensor:
    return torch.tensor(x.shape[start:end], dtype=torch.int64)


def size(x: Tensor) -> Tensor:
    return torch.tensor(x.numel())


def reshape(x: Tensor, shape: Ints, *, allowzero: int = 0) -> Tensor:
    wanted = ints(shape)
    if not allowzero and 0 in wanted:
        wanted = tuple(x.shape[i] if n == 0 else n for i, n in enumerate(wanted))
    return x.reshape(wanted)


def flatten(x: Tensor, *, axis: int = 1) -> Tensor:
    return x.reshape(math.prod(x.shape[:axis]), math.prod(x.shape[axis:]))


def transpose(x: Tensor, *, perm: tuple[int, ...] | None = None) -> Tensor:
    return x.permute(tuple(reversed(range(x.dim()))) if perm is None else perm)


def squeeze(x: Tensor, axes: Ints | None = None) -> Tensor:
    return torch.squeeze(x) if axes is None else torch.squeeze(x, ints(axes))


def unsqueeze(x: Tensor, axes: Ints) -> Tensor:
    wanted = ints(axes)
    rank = x.dim() + len(wanted)
    for axis in sorted(axis % rank for axis in wanted):
        x = x.unsqueeze(axis)
    return x


def expand(x: Tensor, shape: Ints) -> Tensor:
    return x.expand(np.broadcast_shapes(x.shape, ints(shape)))


def tile(x: Tensor, repeats: Ints) -> Tensor:
    return x.repeat(ints(repeats)) if x.dim() else x.clone()


def concat(*tensors: Tensor, axis: int) -> Tensor:
    return torch.cat(tensors, axis)


def split(
    x: Tensor, split: Ints | None = None, *, axis: int = 0, num_outputs: int | None = None, outputs: int = 1
) -> Tensor | tuple[Tensor, ...]:
    if split is None:
        length = x.shape[axis]
        part = -(-length // outputs)
        sizes = [max(0, min(part, length - part * i)) for i in range(outputs)]
    else:
        sizes = list(ints(split))
    parts = torch.split(x, sizes, axis)
    return parts[0] if outputs == 1 else parts


def slice_axes(x: Tensor, starts: Ints, ends: Ints, axes: Ints | None = None, steps: Ints | None = None) -> Tensor:
    first, last = ints(starts), ints(ends)
    over = range(len(first)) if axes is None else ints(axes)
    stride = (1,) * len(first) if steps is None else ints(steps)
    window: list[slice] = [slice(None)] * x.dim()
    for axis, start, end, step in zip(over, first, last, stride, strict=True):
        n = x.shape[axis]
        start, end = (p + n if p < 0 else p for p in (start, end))
        if step < 0:  # torch has no negative steps: mirror the axis, and the bounds with it
            x = x.flip(axis)
            start, end, step = n - 1 - min(max(start, 0), n - 1), n - 1 - end, -step
        window[axis] = slice(min(max(start, 0), n), min(max(end, 0), n), step)
    return x[tuple(window)]


def pad(
    x: Tensor, pads: Ints, constant_value: Number | None = None, axes: Ints | None = None, *, mode: str = "constant"
) -> Tensor:
    amounts = ints(pads)
    over = range(x.dim()) if axes is None else ints(axes)
    n = len(amounts) // 2
    before_after = {axis % x.dim(): (amounts[i], amounts[n + i]) for i, axis in enumerate(over)}
    if mode == "constant":
        value = 0 if constant_value is None else number(constant_value)
        return F.pad(x, [p for axis in reversed(range(x.dim())) for p in before_after.get(axis, (0, 0))], value=value)
    for axis, (before, after) in before_after.items():
        if before or after:
            x = x.index_select(axis, _source(x.shape[axis], before, after, mode, x.device))
    return x


def _source(length: int, before: int, after: int, mode: str, device: torch.device) -> Tensor:
    """Which element of an axis each element of the padded axis repeats."""
    position = torch.arange(-before, length + after, device=device)
    if mode == "edge":
        return position.clamp(0, length - 1)
    if mode == "wrap":
        return position % length
    period = max(1, 2 * (length - 1))  # reflect: 0 1 2 3 2 1 | 0 1 2 3 …
    position = position % period
    return torch.minimum(position, period - position)


def depth_to_space(x: Tensor, *, blocksize: int, mode: str = "DCR") -> Tensor:
    b = blocksize
    n, c, h, w = x.shape
    if mode == "CRD":
        return F.pixel_shuffle(x, b)
    return x.reshape(n, b, b, c // (b * b), h, w).permute(0, 3, 4, 1, 5, 2).reshape(n, c // (b * b), h * b, w * b)


def space_to_depth(x: Tensor, *, blocksize: int, mode: str = "DCR") -> Tensor:
    b = blocksize
    n, c, h, w = x.shape
    if mode == "CRD":
        return F.pixel_unshuffle(x, b)
    return x.reshape(n, c, h // b, b, w // b, b).permute(0, 3, 5, 1, 2, 4).reshape(n, c * b * b, h // b, w // b)


def constant_of_shape(shape: Ints, *, value: tuple[tuple[float, ...], torch.dtype] = ((0.0,), torch.float32)) -> Tensor:
    (element,), dtype = value
    return torch.full(ints(shape), element, dtype=dtype)


def number_range(start: Tensor, limit: Tensor, delta: Tensor, *, stash_type: int = 1) -> Tensor:
    return torch.arange(start.item(), limit.item(), delta.item(), dtype=start.dtype, device=start.device)


def trilu(x: Tensor, k: Ints | None = None, *, upper: int = 1) -> Tensor:
    diagonal = 0 if k is None else int(number(k))
    return torch.triu(x, diagonal) if upper else torch.tril(x, diagonal)


def identity(x: Tensor) -> Tensor:
    return x


def reverse_sequence(x: Tensor, sequence_lens: Tensor, *, batch_axis: int = 1, time_axis: int = 0) -> Tensor:
    rows = x.movedim((batch_axis, time_axis), (0, 1))
    step = torch.arange(rows.shape[1], device=x.device)[None]
    lengths = sequence_lens[:, None]
    source = torch.where(step < lengths, lengths - 1 - step, step)
    source = source.reshape(source.shape + (1,) * (x.dim() - 2)).expand(rows.shape)
    return rows.gather(1, source).movedim((0, 1), (batch_axis, time_axis))
