"""Reductions over axes, arg-extremes, cumulative sums, softmaxes and matrix products."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from lowbit.network.operators_types import Ints, ints, number


def _axes(x: Tensor, axes: Ints | None, noop_with_empty_axes: int) -> list[int] | None:
    """The axes to reduce over; None: none, the input is only transformed."""
    chosen = [] if axes is None else list(ints(axes))
    if chosen:
        return chosen
    return None if noop_with_empty_axes or x.dim() == 0 else list(range(x.dim()))


def _over_axes(
    name: str, reduce: Callable[[Tensor, list[int], bool], Tensor], before: Callable[[Tensor], Tensor] = lambda x: x
) -> Callable[..., Tensor]:
    """ONNX's form of a reduction over axes, which it keeps or not; `before` is computed also where there are none.

    name   under which this module has it: a pickled network looks for it there
    """

    def reduced(x: Tensor, axes: Ints | None = None, *, keepdims: int = 1, noop_with_empty_axes: int = 0) -> Tensor:
        over, x = _axes(x, axes, noop_with_empty_axes), before(x)
        return x if over is None else reduce(x, over, bool(keepdims))

    reduced.__name__ = reduced.__qualname__ = name
    return reduced


def _sum(x: Tensor, over: list[int], keep: bool) -> Tensor:
    return torch.sum(x, over, keep, dtype=x.dtype)


def _mean(x: Tensor, over: list[int], keep: bool) -> Tensor:
    if x.is_floating_point():
        return torch.mean(x, over, keep)
    return torch.mean(x, over, keep, dtype=torch.float64).to(x.dtype)


def _max(x: Tensor, over: list[int], keep: bool) -> Tensor:
    return torch.amax(x, over, keep) if _has_elements(x, over) else _empty(x, over, keep, _lowest(x.dtype))


def _min(x: Tensor, over: list[int], keep: bool) -> Tensor:
    return torch.amin(x, over, keep) if _has_elements(x, over) else _empty(x, over, keep, _highest(x.dtype))


def _has_elements(x: Tensor, over: list[int]) -> bool:
    return all(x.shape[axis] for axis in over)


def _empty(x: Tensor, over: list[int], keep: bool, value: float) -> Tensor:
    return torch.full_like(torch.sum(x, over, keep), value, dtype=x.dtype)


def _lowest(dtype: torch.dtype) -> float:
    return float("-inf") if dtype.is_floating_point else 0 if dtype == torch.bool else torch.iinfo(dtype).min


def _highest(dtype: torch.dtype) -> float:
    return float("inf") if dtype.is_floating_point else 1 if dtype == torch.bool else torch.iinfo(dtype).max


def _prod(x: Tensor, over: list[int], keep: bool) -> Tensor:
    for axis in sorted({axis % x.dim() for axis in over}, reverse=True):
        x = torch.prod(x, axis, keep, dtype=x.dtype)
    return x


reduce_sum = _over_axes("reduce_sum", _sum)
reduce_mean = _over_axes("reduce_mean", _mean)
reduce_max = _over_axes("reduce_max", _max)
reduce_min = _over_axes("reduce_min", _min)
reduce_prod = _over_axes("reduce_prod", _prod)
reduce_log_sum_exp = _over_axes("reduce_log_sum_exp", torch.logsumexp)
reduce_l1 = _over_axes("reduce_l1", _sum, torch.abs)
reduce_sum_square = _over_axes("reduce_sum_square", _sum, torch.square)


def reduce_l2(x: Tensor, axes: Ints | None = None, *, keepdims: int = 1, noop_with_empty_axes: int = 0) -> Tensor:
    if x.is_floating_point() and (over := _axes(x, axes, noop_with_empty_axes)) is not None:
        norm: Tensor = torch.linalg.vector_norm(x, 2, over, bool(keepdims))
        return norm
    squares = reduce_sum_square(x, axes, keepdims=keepdims, noop_with_empty_axes=noop_with_empty_axes)
    return torch.sqrt(squares.to(torch.float64)).to(x.dtype)


def reduce_log_sum(x: Tensor, axes: Ints | None = None, *, keepdims: int = 1, noop_with_empty_axes: int = 0) -> Tensor:
    return torch.log(reduce_sum(x, axes, keepdims=keepdims, noop_with_empty_axes=noop_with_empty_axes)).to(x.dtype)


def argmax(x: Tensor, *, axis: int = 0, keepdims: int = 1, select_last_index: int = 0) -> Tensor:
    if select_last_index:
        return x.shape[axis] - 1 - torch.argmax(x.flip(axis), axis, bool(keepdims))
    return torch.argmax(x, axis, bool(keepdims))


def argmin(x: Tensor, *, axis: int = 0, keepdims: int = 1, select_last_index: int = 0) -> Tensor:
    if select_last_index:
        return x.shape[axis] - 1 - torch.argmin(x.flip(axis), axis, bool(keepdims))
    return torch.argmin(x, axis, bool(keepdims))


def cumulative_sum(x: Tensor, axis: Ints, *, exclusive: int = 0, reverse: int = 0) -> Tensor:
    along = int(number(axis))
    x = x.flip(along) if reverse else x
    if exclusive:
        x = torch.cat([torch.zeros_like(x.narrow(along, 0, 1)), x.narrow(along, 0, x.shape[along] - 1)], along)
    sums = torch.cumsum(x, along, dtype=x.dtype)
    return sums.flip(along) if reverse else sums


def softmax(x: Tensor, *, axis: int = -1) -> Tensor:
    return torch.softmax(x, axis)


def log_softmax(x: Tensor, *, axis: int = -1) -> Tensor:
    return torch.log_softmax(x, axis)


def gemm(
    a: Tensor,
    b: Tensor,
    c: Tensor | None = None,
    *,
    alpha: float = 1.0,
    beta: float = 1.0,
    transA: int = 0,
    transB: int = 0,
) -> Tensor:
    if alpha == 1.0 and beta == 1.0 and transB and not transA and (c is None or c.dim() == 1):
        return F.linear(a, b, c)
    a = a.t() if transA else a
    b = b.t() if transB else b
    if c is not None and a.is_floating_point():
        return torch.addmm(c, a, b, beta=beta, alpha=alpha)
    product = torch.matmul(a, b)
    product = product if alpha == 1.0 else (alpha * product).to(a.dtype)
    return product if c is None else product + (c if beta == 1.0 else (beta * c).to(a.dtype))


def einsum(*operands: Tensor, equation: str) -> Tensor:
    return torch.einsum(equation.replace(" ", ""), *operands)
