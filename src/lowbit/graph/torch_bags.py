"""torch's embedding bags on their way through its exporter, which writes a Loop over bags that no engine loads.

Bags of one length become Gather and a reduction; bags that begin at offsets, Gather and ScatterElements.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

_EMPTY = {"sum": 0.0, "mean": 0.0, "max": -torch.inf}


@contextlib.contextmanager
def embedding_bags() -> Iterator[None]:
    """Every module inside that calls `embedding_bag` calls what can be exported."""
    before = F.embedding_bag
    F.embedding_bag = _embedding_bag
    try:
        yield
    finally:
        F.embedding_bag = before


def _embedding_bag(
    input: Tensor, weight: Tensor, offsets: Tensor | None = None, max_norm: float | None = None, norm_type: float = 2,
    scale_grad_by_freq: bool = False, mode: str = "mean", sparse: bool = False,
    per_sample_weights: Tensor | None = None, include_last_offset: bool = False, padding_idx: int | None = None,
) -> Tensor:  # fmt: skip
    """As torch has it, for inference: (bags, length) ids, or (ids,) with the offsets of bags → (bags, columns)."""
    rows = F.embedding(input, weight)
    if per_sample_weights is not None:
        rows = rows * per_sample_weights[..., None]
    counted = torch.ones_like(input, dtype=rows.dtype)
    if padding_idx is not None:
        counted = (input != padding_idx % len(weight)).to(rows.dtype)
    if mode == "max":
        rows = torch.where(counted[..., None] > 0, rows, -torch.inf)
    else:
        rows = rows * counted[..., None] if padding_idx is not None else rows
    if offsets is None:
        total = rows.amax(1) if mode == "max" else rows.sum(1)
        counts = counted.sum(1)
    else:
        starts = offsets[:-1] if include_last_offset else offsets
        place = torch.arange(input.shape[0], device=input.device)
        bag = (place[:, None] >= starts[None]).to(torch.int64).sum(1) - 1
        empty = rows.new_full((starts.shape[0], weight.shape[1]), _EMPTY[mode])
        total = empty.scatter_reduce(0, bag[:, None].expand_as(rows), rows, "amax" if mode == "max" else "sum")
        counts = rows.new_zeros(starts.shape[0]).scatter_reduce(0, bag, counted, "sum")
    if mode == "mean":
        return total / counts.clamp(min=1)[:, None]
    return torch.where(counts[:, None] > 0, total, 0.0) if mode == "max" else total
