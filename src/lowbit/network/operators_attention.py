"""Attention and rotary embedding."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from lowbit.network.operators_types import TORCH_TYPES


def _heads(x: Tensor, count: int | None) -> Tensor:
    """(batch, time, heads * size) → (batch, heads, time, size); four axes stay as they are."""
    return x.reshape(*x.shape[:2], count or 1, -1).transpose(1, 2) if x.dim() == 3 else x


def _allowed(
    queries: int,
    keys: int,
    offset: Tensor,
    is_causal: int,
    left: int,
    right: int,
    nonpad_kv_seqlen: Tensor | None,
) -> Tensor | None:
    """Which keys each query may see, (batch or 1, 1, queries, keys), or None for all.

    offset  (batch or 1,)  how many keys come before the first query
    """
    device = offset.device
    key = torch.arange(keys, device=device)
    place = (offset[:, None] + torch.arange(queries, device=device))[:, :, None]
    rules = []
    if is_causal:
        rules.append(key <= place)
    if left >= 0:
        rules.append(key >= place - left)
    if right >= 0:
        rules.append(key <= place + right)
    if nonpad_kv_seqlen is not None:
        rules.append((key < nonpad_kv_seqlen[:, None])[:, None, :])
    if not rules:
        return None
    allowed = rules[0]
    for rule in rules[1:]:
        allowed = allowed & rule
    return allowed.unsqueeze(1)


def _bias(mask: Tensor | None, allowed: Tensor | None, keys: int, like: Tensor) -> Tensor | None:
    """What is added to the scores: the float mask, −inf where a key may not be seen."""
    bias = None
    if mask is not None:
        missing = keys - mask.shape[-1]
        if mask.dtype == torch.bool:
            mask = F.pad(mask, (0, missing)) if missing else mask
            bias = torch.zeros(mask.shape, dtype=like.dtype, device=like.device).masked_fill(~mask, -math.inf)
        else:
            bias = F.pad(mask, (0, missing), value=-math.inf) if missing else mask
    if allowed is None:
        return bias
    zero = torch.zeros((), dtype=like.dtype, device=like.device) if bias is None else bias
    return torch.where(allowed, zero, -math.inf).to(like.dtype)


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    attn_mask: Tensor | None = None,
    past_key: Tensor | None = None,
    past_value: Tensor | None = None,
    nonpad_kv_seqlen: Tensor | None = None,
    *,
    is_causal: int = 0,
    kv_num_heads: int | None = None,
    left_window_size: int = -1,
    q_num_heads: int | None = None,
    qk_matmul_output_mode: int = 0,
    right_window_size: int = -1,
    scale: float | None = None,
    softcap: float = 0.0,
    softmax_precision: int | None = None,
    outputs: int = 1,
) -> Tensor | tuple[Tensor, ...]:
    packed = q.dim() == 3
    q, k, v = _heads(q, q_num_heads), _heads(k, kv_num_heads), _heads(v, kv_num_heads)
    past = 0
    if past_key is not None and past_value is not None:
        past = past_key.shape[2]
        k, v = torch.cat([past_key, k], 2), torch.cat([past_value, v], 2)
    present = (k, v)
    queries, keys = q.shape[2], k.shape[2]
    offset = torch.full((1,), past, device=q.device)
    if nonpad_kv_seqlen is not None and past_key is None:
        offset = nonpad_kv_seqlen - queries
    allowed = _allowed(queries, keys, offset, is_causal, left_window_size, right_window_size, nonpad_kv_seqlen)
    bias = _bias(attn_mask, allowed, keys, q)
    if q.shape[1] != k.shape[1]:  # grouped queries: each key head serves several query heads
        k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], 1) for t in (k, v))
    root = math.sqrt(1 / math.sqrt(q.shape[-1]) if scale is None else scale)
    scores = [torch.matmul(q * root, (k * root).transpose(-1, -2))]
    scores.append(softcap * torch.tanh(scores[0] / softcap) if softcap else scores[0])
    scores.append(scores[1] if bias is None else scores[1] + bias)
    wide = scores[2] if softmax_precision is None else scores[2].to(TORCH_TYPES[softmax_precision])
    weights = torch.softmax(wide, -1)
    if bias is not None:  # a query that may see no key gives zeros, not NaN
        weights = weights.masked_fill((bias == -math.inf).all(-1, keepdim=True), 0)
    scores.append(weights.to(q.dtype))
    y = torch.matmul(scores[3], v)
    y = y.transpose(1, 2).flatten(2) if packed else y
    return y if outputs == 1 else (y, *present, scores[qk_matmul_output_mode])


def rotary_embedding(
    x: Tensor,
    cos_cache: Tensor,
    sin_cache: Tensor,
    position_ids: Tensor | None = None,
    *,
    interleaved: int = 0,
    num_heads: int | None = None,
    rotary_embedding_dim: int = 0,
) -> Tensor:
    heads = _heads(x, num_heads)
    size = rotary_embedding_dim or heads.shape[-1]
    turned, kept = heads[..., :size], heads[..., size:]
    cos, sin = (c if position_ids is None else F.embedding(position_ids, c) for c in (cos_cache, sin_cache))
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    a, b = (turned[..., ::2], turned[..., 1::2]) if interleaved else turned.chunk(2, -1)
    real, imaginary = cos * a - sin * b, sin * a + cos * b
    turned = torch.stack((real, imaginary), -1).flatten(-2) if interleaved else torch.cat((real, imaginary), -1)
    result = torch.cat((turned, kept), -1) if kept.shape[-1] else turned
    return result.transpose(1, 2).flatten(2) if x.dim() == 3 else result
