"""float32 numbers of fewer mantissa bits: the type stays, the zeros cost nothing when packed."""

import numpy as np
import torch
from torch import Tensor


def fewer_mantissa_bits(numbers: Tensor, bits: int) -> Tensor:
    """float32 numbers rounded to `bits` bits of mantissa, 1–23, ties to even."""
    cut = 23 - bits
    words = numbers.detach().reshape(-1).contiguous().numpy().view(np.uint32).astype(np.uint64)
    half = np.uint64((1 << cut - 1) - 1) + ((words >> np.uint64(cut)) & np.uint64(1)) if cut else np.uint64(0)
    rounded = ((words + half) >> np.uint64(cut)) << np.uint64(cut)
    return torch.from_numpy(rounded.astype(np.uint32).view(np.float32)).reshape(numbers.shape)
