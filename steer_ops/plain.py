"""The twins of the ops, in PyTorch: for devices and dtypes without kernels, and what kernels are tried against."""

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention


def paged_attention_decode(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    block_tables: Tensor,
    context_lens: Tensor,
    out: Tensor,
    *,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> None:
    """See `steer_ops.paged_attention_decode`. Every row is read as far as the longest one, in whole blocks, which are
    copied; so on a CPU the last bits of a row may depend on its neighbours."""
    rows, heads, width = query.shape
    kv_heads, block_size = key_cache.shape[1:3]
    last = context_lens.long() - 1  # [R]: position of the new token
    newest = block_tables.gather(1, (last // block_size)[:, None]).long()  # [R, 1]: the block that it is in
    key_cache[newest[:, 0], :, last % block_size] = key
    value_cache[newest[:, 0], :, last % block_size] = value

    first, stop = 0, block_tables.shape[1]  # the blocks that are read; on a GPU all, as lengths are known there alone
    if rows and context_lens.device.type == "cpu":
        first = max(0, int(last.min()) + 1 - window) // block_size if window else 0
        stop = int(last.max()) // block_size + 1
    positions = torch.arange(first * block_size, stop * block_size, device=last.device)
    hidden = positions > last[:, None]  # [R, K]
    if window:
        hidden = hidden | (positions <= last[:, None] - window)
    exists = positions[::block_size] <= last[:, None]
    blocks = torch.where(exists, block_tables[:, first:stop].long(), newest)
    lines = blocks[:, None] * kv_heads + torch.arange(kv_heads, device=last.device)[:, None]  # [R, kv_heads, blocks]
    # [R, kv_heads, K, width]. What is hidden may be anything, and 0 times NaN would be NaN.
    keys, values = (
        cache.flatten(0, 1)[lines].flatten(2, 3).masked_fill_(hidden[:, None, :, None], 0)
        for cache in (key_cache, value_cache)
    )
    grouped = query.reshape(rows, kv_heads, heads // kv_heads, width)  # queries that share a key head
    if softcap is None and sinks is None:
        visible = ~hidden[:, None, None]
        found = scaled_dot_product_attention(grouped, keys, values, attn_mask=visible, scale=scale)
    else:
        found = _softmax_attention(grouped, keys, values, hidden[:, None, None], scale, softcap, sinks)
    out.copy_(found.reshape(out.shape))


def _softmax_attention(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    hidden: Tensor,
    scale: float,
    softcap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    """Step by step: PyTorch's own attention has no argument for capped scores (Gemma 2) and sinks (GPT-OSS).

    query [R, kv_heads, groups, width], keys and values [R, kv_heads, K, width], hidden broadcastable to
    [R, kv_heads, groups, K], sinks [kv_heads * groups] -> [R, kv_heads, groups, width]
    """
    wide = torch.promote_types(query.dtype, torch.float32)
    scores = query.to(wide) @ keys.to(wide).transpose(2, 3) * scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores.masked_fill(hidden, -torch.inf)
    if sinks is not None:
        own = sinks.to(wide).view(1, *query.shape[1:3], 1).expand(len(query), -1, -1, 1)
        scores = torch.cat([scores, own], dim=-1)
    shares = torch.softmax(scores, dim=-1)[..., : keys.shape[2]]
    return (shares @ values.to(wide)).to(query.dtype)
