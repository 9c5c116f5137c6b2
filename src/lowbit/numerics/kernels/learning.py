"""Rounding to a step that learns, on the CPU: one pass forward, one backward; see `Kernels` for what is computed.

bfloat16 is read and written as the upper half of float32. Sums are added up part by part in an order that does not
depend on the number of threads.
"""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lowbit.machine_code import ANY_ORDER, kernel

_PART = 1 << 15  # elements that one sum covers
_ALONE = 1 << 17  # below so many elements a second thread costs more than it saves


@kernel
def _round(x: Any, scale: Any, low: Any, high: Any, first: Any, last: Any, y: Any) -> None:
    line, to = x[first:last], y[first:last]
    for i in range(line.shape[0]):
        to[i] = min(max(np.rint(line[i] / scale), low), high) * scale


@kernel(fastmath=ANY_ORDER)
def _gradient(
    x: Any, along: Any, scale: Any, low: Any, high: Any, first: Any, last: Any, passed: Any, sums: Any
) -> None:
    line, g, to = x[first:last], along[first:last], passed[first:last]
    inside, below, above = np.float32(0), np.float32(0), np.float32(0)
    for i in range(line.shape[0]):
        v, d = line[i] / scale, g[i]
        is_below, is_above = v < low, v > high
        kept = np.float32(0) if is_below or is_above else d
        to[i] = kept
        inside += kept * (np.rint(v) - v)
        below += d if is_below else np.float32(0)
        above += d if is_above else np.float32(0)
    sums[0], sums[1], sums[2] = inside, below, above


@kernel
def _wide(half: Any) -> Any:
    return np.int32(np.int32(half) << np.int32(16)).view(np.float32)


@kernel
def _narrow(number: Any) -> Any:
    """Round to nearest even, as torch does; a NaN stays one."""
    bits = np.float32(number).view(np.int32)
    rounded = np.int32(bits + np.int32(0x7FFF) + np.int32(np.int32(bits >> np.int32(16)) & np.int32(1)))
    return np.int16(np.int32(rounded if number == number else bits | np.int32(0x400000)) >> np.int32(16))


@kernel
def _round_half(x: Any, scale: Any, low: Any, high: Any, first: Any, last: Any, y: Any) -> None:
    line, to = x[first:last], y[first:last]
    for i in range(line.shape[0]):
        to[i] = _narrow(min(max(np.rint(_wide(line[i]) / scale), low), high) * scale)


@kernel(fastmath=ANY_ORDER)
def _gradient_half(
    x: Any, along: Any, scale: Any, low: Any, high: Any, first: Any, last: Any, passed: Any, sums: Any
) -> None:
    line, g, to = x[first:last], along[first:last], passed[first:last]
    inside, below, above = np.float32(0), np.float32(0), np.float32(0)
    for i in range(line.shape[0]):
        v, d = _wide(line[i]) / scale, _wide(g[i])
        is_below, is_above = v < low, v > high
        to[i] = np.int16(0) if is_below or is_above else g[i]
        inside += np.float32(0) if is_below or is_above else d * (np.rint(v) - v)
        below += d if is_below else np.float32(0)
        above += d if is_above else np.float32(0)
    sums[0], sums[1], sums[2] = inside, below, above


@kernel
def _round_rows(rows: Any, scale: Any, low: Any, high: Any, y: Any) -> None:
    for row in range(rows.shape[0]):
        _round(rows[row], scale[row], low, high, 0, rows.shape[1], y[row])


@kernel
def _gradient_rows(rows: Any, along: Any, scale: Any, low: Any, high: Any, passed: Any, sums: Any) -> None:
    for row in range(rows.shape[0]):
        _gradient(rows[row], along[row], scale[row], low, high, 0, rows.shape[1], passed[row], sums[row])


def round_to_step(x: Tensor, scale: Tensor, low: float, high: float) -> Tensor:
    ends = np.float32(low), np.float32(high)
    if scale.numel() > 1:
        rows = x.detach().contiguous()
        y = torch.empty_like(rows)
        _round_rows(rows.numpy(), _line(scale), *ends, y.numpy())
        return y
    x = _dense(x)
    y = torch.empty_like(x)
    line, to, s = _line(x), _line(y), np.float32(float(scale))
    loop = _round_half if x.dtype == torch.bfloat16 else _round
    _in_parts(len(line), lambda part, first, last: loop(line, s, *ends, first, last, to))
    return y


def step_gradient(x: Tensor, along: Tensor, scale: Tensor, low: float, high: float) -> tuple[Tensor, Tensor]:
    ends = np.float32(low), np.float32(high)
    if scale.numel() > 1:
        rows, g = x.detach().contiguous(), along.detach().contiguous()
        passed, sums = torch.empty_like(rows), np.zeros((len(rows), 3), np.float32)
        _gradient_rows(rows.numpy(), g.numpy(), _line(scale), *ends, passed.numpy(), sums)
        return passed, torch.from_numpy(sums)
    x = _dense(x)
    passed = torch.empty_like(x)
    if along.stride() != x.stride() or along.dtype != x.dtype:
        along = torch.empty_like(x).copy_(along)
    line, g, to, s = _line(x), _line(along), _line(passed), np.float32(float(scale))
    sums = np.zeros((max(1, -(-len(line) // _PART)), 3), np.float32)
    loop = _gradient_half if x.dtype == torch.bfloat16 else _gradient
    _in_parts(len(line), lambda part, first, last: loop(line, g, s, *ends, first, last, to, sums[part]))
    return passed, torch.from_numpy(sums.sum(0, keepdims=True, dtype=np.float64).astype(np.float32))


def _dense(x: Tensor) -> Tensor:
    """x without gaps in memory, in the order in which it lies where it has none."""
    strided = x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last)
    return x if strided else x.contiguous()


def _line(x: Tensor) -> Any:
    """All elements in the order in which they lie in memory, as float32 or as the bits of bfloat16."""
    held = x.detach()
    flat = held.as_strided((held.numel(),), (1,))
    return (flat.view(torch.int16) if x.dtype == torch.bfloat16 else flat).numpy()


@lru_cache(maxsize=1)
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, "lowbit-kernel")


def _in_parts(count: int, work: Callable[[int, int, int], None]) -> None:
    """Call work(part, first, last) for all parts, on as many threads as torch has."""
    parts = range(-(-count // _PART))

    def some(chosen: range) -> None:
        for part in chosen:
            work(part, part * _PART, min((part + 1) * _PART, count))

    threads = torch.get_num_threads()
    if threads == 1 or count < _ALONE:
        some(parts)
        return
    cut = [len(parts) * i // threads for i in range(threads + 1)]
    list(_pool(threads).map(some, [parts[a:b] for a, b in pairwise(cut)]))
