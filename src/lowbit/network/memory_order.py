"""The order in which a tensor lies in memory: what goes over all of it in that order copies nothing."""

import torch
from torch import Tensor


def as_stored(x: Tensor, like: Tensor | None = None) -> Tensor:
    """The same numbers in the order in which they lie in memory, or `like` does: adding them up then copies nothing."""
    like = x if like is None else like
    strided = like.dim() == 4 and not like.is_contiguous() and like.is_contiguous(memory_format=torch.channels_last)
    return x.permute(0, 2, 3, 1) if strided else x
