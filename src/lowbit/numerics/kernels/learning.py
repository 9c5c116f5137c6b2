"""Rounding to a step that learns, on the CPU: one pass forward, one backward; see `Kernels` for what is computed.

Numbers come as their bits: bfloat16 is the upper half of float32, so one loop serves both. Sums are added up part by
part in an order that does not depend on the number of threads.
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
def _number(bits: Any, shift: Any) -> Any:
    return np.int32(np.int32(bits) << shift).view(np.float32)


@kernel
def _bits(number: Any, shift: Any) -> Any:
    """The upper bits, shift 16 (rounded to nearest even as torch does; a NaN stays one) or all of them, shift 0."""
    bits = np.float32(number).view(np.int32)
    if shift == 0:
        return bits
    rounded = np.int32(bits + np.int32(0x7FFF) + np.int32(np.int32(bits >> np.int32(16)) & np.int32(1)))
    return np.int32(np.int32(rounded if number == number else bits | np.int32(0x400000)) >> np.int32(16))


@kernel
def _round(x: Any, shift: Any, scale: Any, ends: Any, first: Any, last: Any, y: Any, marks: Any) -> None:
    low, high, least = ends
    line, to, mark = x[first:last], y[first:last], marks[first:last]
    most = np.float32(np.iinfo(marks.dtype).max - 1)
    for i in range(line.shape[0]):
        v = _number(line[i], shift) / scale
        nearest = np.rint(v)
        to[i] = _bits(min(max(nearest, low), high) * scale, shift)
        inside = np.rint((nearest - v) * (most + most))
        mark[i] = np.int32(-most - 1 if v < least else (most + 1 if v > high else inside))


@kernel(fastmath=ANY_ORDER)
def _gradient(marks: Any, along: Any, shift: Any, first: Any, last: Any, passed: Any, sums: Any) -> None:
    mark, line, to = marks[first:last], along[first:last], passed[first:last]
    most = np.float32(np.iinfo(marks.dtype).max - 1)
    inside, below, above = np.float32(0), np.float32(0), np.float32(0)
    for i in range(line.shape[0]):
        m, g = np.float32(mark[i]), _number(line[i], shift)
        is_below, is_above = m < -most, m > most
        kept = np.float32(0) if is_below or is_above else g
        to[i] = _bits(kept, shift)
        inside += kept * m
        below += g if is_below else np.float32(0)
        above += g if is_above else np.float32(0)
    sums[0], sums[1], sums[2] = inside / (most + most), below, above


def round_to_step(
    x: Tensor, scale: Tensor, low: Tensor, high: Tensor, past_low: bool, marks: torch.dtype
) -> tuple[Tensor, Tensor]:
    x = _dense(x)
    y, mark = torch.empty_like(x), torch.empty_like(x, dtype=marks)
    (line, shift), (to, _), held = _line(x), _line(y), _flat(mark)
    s, a, b = (np.float32(float(number)) for number in (scale, low, high))
    ends = a, b, np.nextafter(a, np.float32(np.inf)) if past_low else a
    _in_parts(len(line), lambda _, first, last: _round(line, shift, s, ends, first, last, to, held))
    return y, mark


def step_gradient(marks: Tensor, along: Tensor) -> tuple[Tensor, Tensor]:
    passed = torch.empty_like(marks, dtype=along.dtype)
    if along.stride() != marks.stride():
        along = torch.empty_like(passed).copy_(along)
    held, (line, shift), (to, _) = _flat(marks), _line(along), _line(passed)
    sums = np.zeros((max(1, -(-len(line) // _PART)), 3), np.float32)
    _in_parts(len(line), lambda part, first, last: _gradient(held, line, shift, first, last, to, sums[part]))
    return passed, torch.from_numpy(sums.sum(0, dtype=np.float64).astype(np.float32))


def _dense(x: Tensor) -> Tensor:
    """x without gaps in memory, in the order in which it lies where it has none."""
    strided = x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last)
    return x if strided else x.contiguous()


def _flat(x: Tensor) -> Any:
    """All elements in the order in which they lie in memory."""
    return x.detach().as_strided((x.numel(),), (1,)).numpy()


def _line(x: Tensor) -> tuple[Any, Any]:
    """The bits of all elements in the order in which they lie, and how far they are below those of float32."""
    half = x.dtype == torch.bfloat16
    return _flat(x.detach().view(torch.int16 if half else torch.int32)), np.int32(16 if half else 0)


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
