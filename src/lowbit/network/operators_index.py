"""Picking and placing elements by index: gather, scatter, top-k, one-hot, non-zero."""

import torch
import torch.nn.functional as F
from torch import Tensor

from lowbit.errors import DataError
from lowbit.network.operators_types import Ints, Number, number


def _from_start(indices: Tensor, length: int) -> Tensor:
    """Indices with negative ones counted from the end, as torch's own gathers need them."""
    indices = indices.to(torch.int64)
    return torch.where(indices < 0, indices + length, indices)


def gather(data: Tensor, indices: Ints, *, axis: int = 0) -> Tensor:
    if isinstance(indices, int):
        return data.select(axis, indices)
    if not isinstance(indices, Tensor):
        if len(indices) == 1:
            return data.narrow(axis, indices[0] % data.shape[axis], 1)
        indices = torch.tensor(indices, dtype=torch.int64, device=data.device)
    index = _from_start(indices, data.shape[axis])
    try:
        if axis == 0 and data.dim() == 2 and data.is_floating_point():
            return F.embedding(index, data)
        axis %= data.dim()
        flat = data.index_select(axis, index.flatten())
    except IndexError:
        length = data.shape[axis]
        wrong = int(indices[(index < 0) | (index >= length)].flatten()[0])
        raise DataError(
            f"index {wrong} lies outside the table of {length} rows. Give indices from 0 to {length - 1}."
        ) from None
    return flat.reshape((*data.shape[:axis], *index.shape, *data.shape[axis + 1 :]))


def gather_elements(data: Tensor, indices: Tensor, *, axis: int = 0) -> Tensor:
    return torch.gather(data, axis, _from_start(indices, data.shape[axis]))


def gather_nd(data: Tensor, indices: Tensor, *, batch_dims: int = 0) -> Tensor:
    batches = [
        torch.arange(data.shape[i], device=data.device).reshape((-1,) + (1,) * (indices.dim() - 2 - i))
        for i in range(batch_dims)
    ]
    return data[(*batches, *indices.to(torch.int64).unbind(-1))]


_REDUCTIONS = {"add": "sum", "mul": "prod", "max": "amax", "min": "amin"}


def scatter_elements(
    data: Tensor, indices: Tensor, updates: Tensor, *, axis: int = 0, reduction: str = "none"
) -> Tensor:
    index = _from_start(indices, data.shape[axis])
    if reduction == "none":
        return torch.scatter(data, axis, index, updates)
    return torch.scatter_reduce(data, axis, index, updates, _REDUCTIONS[reduction])


def scatter_nd(data: Tensor, indices: Tensor, updates: Tensor, *, reduction: str = "none") -> Tensor:
    index = indices.to(torch.int64).unbind(-1)
    if reduction in ("none", "add"):
        return torch.index_put(data, index, updates, accumulate=reduction == "add")
    depth = len(index)
    flat = torch.zeros_like(index[0])
    for axis, part in enumerate(index):
        flat = flat * data.shape[axis] + _from_start(part, data.shape[axis])
    rows = data.reshape(-1, *data.shape[depth:])
    values = updates.reshape(-1, *data.shape[depth:])
    place = flat.reshape(-1, *(1,) * (rows.dim() - 1)).expand_as(values)
    return torch.scatter_reduce(rows, 0, place, values, _REDUCTIONS[reduction]).reshape(data.shape)


def top_k(
    x: Tensor, k: Ints, *, axis: int = -1, largest: int = 1, sorted: int = 1, outputs: int = 2
) -> tuple[Tensor, Tensor]:
    """Equal values keep the order of their indices, as ONNX demands; torch.topk does not promise it."""
    count = int(number(k))
    order = torch.argsort(x, dim=axis, descending=bool(largest), stable=True).narrow(axis, 0, count)
    return torch.gather(x, axis, order), order


def one_hot(indices: Tensor, depth: Number, values: Tensor, *, axis: int = -1) -> Tensor:
    count = int(number(depth))
    index = indices.to(torch.int64)
    classes = torch.arange(count, device=indices.device)
    hot = torch.where(index < 0, index + count, index).unsqueeze(-1) == classes
    off, on = values.unbind()
    return torch.where(hot, on, off).movedim(-1, axis)


def non_zero(x: Tensor) -> Tensor:
    return torch.nonzero(x).t()
