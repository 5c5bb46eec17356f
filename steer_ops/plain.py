"""The references of the ops, in PyTorch: for devices and dtypes without kernels, and what kernels are tried against."""

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor
from torch.nn.functional import gelu, linear, scaled_dot_product_attention, silu

SIGMOID, CONSTANT, LINEAR, COSINE, READ = range(5)  # kinds of gates, as kernels know them
SMALLEST_NORM = 1e-19  # below it squares leave float32
GATHERED = 16 * 2**20  # numbers that are copied together at most, unless one row needs more


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
    cos: Tensor | None = None,
    sin: Tensor | None = None,
) -> None:
    """See `steer_ops.paged_attention_decode`. Every row is read as far as the longest one, in whole blocks, which are
    copied; so on a CPU the last bits of a row may depend on its neighbours."""
    if cos is not None and sin is not None:
        query, key = rotary(query, key, cos, sin)
    together = max(1, GATHERED // (block_tables.shape[1] * key_cache[0].numel()))  # rows
    if len(query) > together:
        for at in range(0, len(query), together):
            part = slice(at, at + together)
            paged_attention_decode(
                query[part],
                key[part],
                value[part],
                key_cache,
                value_cache,
                block_tables[part],
                context_lens[part],
                out[part],
                scale=scale,
                window=window,
                softcap=softcap,
                sinks=sinks,
            )
        return
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
    hidden = _hidden(positions, last, window)  # [R, K]
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


def paged_attention_prefill(
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    block_tables: Tensor,
    query_starts: Tensor,
    context_lens: Tensor,
    out: Tensor,
    *,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> None:
    """See `steer_ops.paged_attention_prefill`. Chunk after chunk; waits for the device."""
    groups = query.shape[1] // key_cache.shape[1]
    starts = query_starts.tolist()
    for lo, hi, length, table in zip(starts, starts[1:], context_lens.tolist(), block_tables, strict=False):
        if lo == hi:
            continue
        blocks = table[: -(-length // key_cache.shape[2])].long()
        # [1, heads, length, width]
        keys, values = (
            cache[blocks].transpose(0, 1).flatten(1, 2)[None, :, :length].repeat_interleave(groups, 1)
            for cache in (key_cache, value_cache)
        )
        at = torch.arange(length, device=query.device)
        hidden = _hidden(at, at[length - (hi - lo) :], window)
        if softcap is None and sinks is None:
            asked = query[lo:hi].transpose(0, 1)[None]
            found = scaled_dot_product_attention(asked, keys, values, attn_mask=~hidden, scale=scale)[0].transpose(0, 1)
        else:  # every head is a key head of its own
            asked = query[lo:hi, :, None]
            found = _softmax_attention(asked, keys, values, hidden[:, None, None], scale, softcap, sinks)[:, :, 0]
        out[lo:hi] = found


def varlen_attention(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    query_starts: Tensor,
    key_starts: Tensor,
    key_lens: Tensor,
    most_queries: int,
    most_keys: int,
    *,
    scale: float,
    window: int | None = None,
) -> Tensor:
    """See `steer_ops.varlen_attention`. Text after text; waits for the device."""
    out = query.new_empty(*query.shape[:2], values.shape[-1])
    groups = query.shape[1] // keys.shape[1]
    starts = query_starts.tolist()
    for lo, hi, first, length in zip(starts, starts[1:], key_starts.tolist(), key_lens.tolist(), strict=False):
        asked = query[lo:hi].transpose(0, 1)
        own, theirs = (part[first : first + length].transpose(0, 1) for part in (keys, values))
        at = torch.arange(length, device=query.device)
        seen = ~_hidden(at, at[length - (hi - lo) :], window)  # [new, keys]
        own, theirs = (part.repeat_interleave(groups, 0) for part in (own, theirs))
        out[lo:hi] = scaled_dot_product_attention(asked, own, theirs, attn_mask=seen, scale=scale).transpose(0, 1)
    return out


def write_kv(key: Tensor, value: Tensor, key_cache: Tensor, value_cache: Tensor, places: Tensor) -> None:
    """See `steer_ops.write_kv`."""
    heads, block_size = key_cache.shape[1:3]
    head = torch.arange(heads, device=places.device)
    # In the caches, seen as [lines, width].
    lines = (places[:, :1] * heads + head) * block_size + places[:, 1:]
    for cache, new in ((key_cache, key), (value_cache, value)):
        width = cache.shape[-1]
        cache.view(-1, width).index_copy_(0, lines.reshape(-1), new.reshape(-1, width))


def gather_kv(key_cache: Tensor, value_cache: Tensor, blocks: Tensor) -> tuple[Tensor, Tensor]:
    """See `steer_ops.gather_kv`."""
    keys, values = (
        # Whole blocks first: PyTorch would copy all of a pool that is not contiguous before it selects.
        cache.index_select(0, blocks).transpose(1, 2).flatten(0, 1)
        for cache in (key_cache, value_cache)
    )
    return keys, values


def copy_kv(caches: list[Tensor], blocks: Tensor) -> None:
    """See `steer_ops.copy_kv`."""
    sources, targets = blocks.unbind(1)
    for cache in caches:
        cache.index_copy_(0, targets, cache.index_select(0, sources))


def _hidden(keys: Tensor, last: Tensor, window: int | None) -> Tensor:
    """Positions of keys [K], and of tokens [...] -> [..., K] bool: which keys each token does not see."""
    hidden = keys > last[..., None]
    return hidden | (keys <= last[..., None] - window) if window else hidden


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


def steer(
    activations: Tensor,
    vectors: Tensor,
    weights: Tensor,
    biases: Tensor,
    kinds: Tensor,
    keep_norm: Tensor,
    multipliers: Tensor,
    *,
    clamps: Tensor | None = None,
    opened: Tensor | None = None,
    all_keep: bool = False,
) -> Tensor:
    """f(a) = a + sum s(a) v over the norm-keeping columns, rescaled to |a|, then + sum s(a) v over the others.

    arXiv 2502.12446, eq. 1-3, with a multiplier m for each token and column: s(a) = m g(a). A column with a clamp
    (c, o) sets a's projection on its unit vector to o + m c instead: s(a) = g(a) (o + m c - v.a). Gates and projections
    are taken on the original a.
    Computed in float32 whatever the dtype of the activations (in float64 for float64), because a half-precision sum of
    squares overflows at the widths that models have.

    activations [N, D], vectors and weights [C, D], biases [C], kinds [C] int8 (as `gates` has them), keep_norm [C]
    bool, multipliers [N, C], clamps [C, 2], NaN where there is none (None: nowhere), opened [N, C], gates that were
    read at another site (None: none were) -> [N, D] in the dtype of the activations. A row whose multipliers, or whose
    s(a), are all 0 comes out bit for bit as it went in, -0.0, infinities and NaN included; a column whose multiplier is
    0 has no influence on a row whatever its gate. `all_keep`: the caller knows that every column keeps the norm, which
    saves a product.
    """
    with full_precision(activations):
        a, v, w, b, m = widen(activations, vectors, weights, biases, multipliers)
        strength = strengths(a, v, gates(a, w, b, kinds, opened), m, clamps)
        moved = torch.addmm(a, strength if all_keep else torch.where(keep_norm, strength, 0), v)
        moved = moved * _rescale(a, moved)
        if not all_keep:
            moved = torch.addmm(moved, torch.where(keep_norm, 0, strength), v)
        acts = (strength != 0).any(dim=1, keepdim=True)
        return torch.where(acts, moved.to(activations.dtype), activations)


def steer_and_count(
    activations: Tensor,
    vectors: Tensor,
    weights: Tensor,
    biases: Tensor,
    kinds: Tensor,
    keep_norm: Tensor,
    clamps: Tensor,
    multipliers: Tensor,
    opened: Tensor,
    owners: Tensor,
    counts: Tensor,
    owner: int,
) -> Tensor:
    """See `steer_ops.steer_and_count`."""
    tokens = len(activations)
    counts[:tokens].add_(owners[:tokens] == owner)
    return steer(
        activations, vectors, weights, biases, kinds, keep_norm, multipliers[:tokens], clamps=clamps,
        opened=opened[:tokens],
    )  # fmt: skip


def gates(a: Tensor, weights: Tensor, biases: Tensor, kinds: Tensor, opened: Tensor | None = None) -> Tensor:
    """How open each column's gate is on each token: sigmoid(w.a + b) of a SIGMOID, 1 of a CONSTANT, w.a + b of a
    LINEAR, of a COSINE 1 where w.a / |a| + b > 0 and 0 elsewhere, of a READ what `opened` says.

    a [N, D], weights [C, D], biases, kinds [C], opened [N, C] or None -> [N, C].
    """
    overlap = a @ weights.T
    linear = overlap + biases
    found = torch.where(kinds == SIGMOID, torch.sigmoid(linear), linear)
    lengths = torch.linalg.vector_norm(a, dim=1, keepdim=True).clamp_min(SMALLEST_NORM)
    found = torch.where(kinds == COSINE, (overlap / lengths + biases > 0).to(a.dtype), found)
    found = torch.where(kinds == CONSTANT, 1.0, found)
    return found if opened is None else torch.where(kinds == READ, opened.to(a.dtype), found)


def strengths(a: Tensor, vectors: Tensor, opened: Tensor, multipliers: Tensor, clamps: Tensor | None) -> Tensor:
    """The factor of each column's vector on each token, s(a) of `steer`. a [N, D], vectors [C, D], opened (what `gates`
    gives) and multipliers [N, C], clamps [C, 2] or None -> [N, C]."""
    amount = multipliers
    if clamps is not None:
        values, origins = torch.nan_to_num(clamps.to(a.dtype)).unbind(1)
        targets = origins + multipliers * values
        amount = torch.where(clamps[:, 0].isnan(), multipliers, targets - a @ vectors.T)
    return torch.where(multipliers != 0, opened * amount, 0)


def widen(activations: Tensor, *others: Tensor) -> tuple[Tensor, ...]:
    """All in float32, or in float64 where the activations are."""
    dtype = torch.promote_types(activations.dtype, torch.float32)
    return tuple(tensor.to(dtype) for tensor in (activations, *others))


def full_precision(activations: Tensor) -> AbstractContextManager[object]:
    """Keeps an autocast region around the model from turning these products back into half precision."""
    device = activations.device.type
    lowered = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
    return torch.autocast(device, enabled=False) if lowered else nullcontext()


def _rescale(a: Tensor, moved: Tensor) -> Tensor:
    """|a| / |moved| as [N, 1]: exactly 1 for a row that was not moved, and where a norm is beyond float32."""
    old = torch.linalg.vector_norm(a, dim=1, keepdim=True)
    new = torch.linalg.vector_norm(moved, dim=1, keepdim=True)
    return torch.where(torch.maximum(old, new) < torch.inf, old / new.clamp_min(SMALLEST_NORM), 1)


def rms_norm(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """See `steer_ops.rms_norm`."""
    wide = x.float()
    normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + epsilon)
    return (weight * (normed.to(x.dtype) if weight.dtype == x.dtype else normed)).to(x.dtype)


def add_rms_norm(x: Tensor, y: Tensor, weight: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
    """See `steer_ops.add_rms_norm`."""
    total = x + y
    return total, rms_norm(total, weight, epsilon)


def silu_mul(gate_up: Tensor) -> Tensor:
    """See `steer_ops.silu_mul`."""
    gate, up = gate_up.chunk(2, dim=-1)
    return silu(gate) * up


def gelu_tanh_mul(gate_up: Tensor) -> Tensor:
    """See `steer_ops.gelu_tanh_mul`."""
    gate, up = gate_up.chunk(2, dim=-1)
    return gelu(gate, approximate="tanh") * up


def rotary(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """See `steer_ops.rotary`."""

    def turn(x: Tensor) -> Tensor:
        turned, rest = x.tensor_split([cos.shape[1]], dim=-1)
        left, right = turned.chunk(2, dim=-1)
        turned = turned * cos[:, None] + torch.cat([-right, left], dim=-1) * sin[:, None]
        return torch.cat([turned, rest], dim=-1)

    return turn(query), turn(key)


def tiled_linear(x: Tensor, tiles: Tensor, bias: Tensor | None, out_features: int) -> Tensor:
    """See `steer_ops.tiled_linear`."""
    return linear(x, untiled(tiles, out_features), bias)


def untiled(tiles: Tensor, out_features: int) -> Tensor:
    """The weight [out, in] that lies in tiles (`steer_ops.tiled_linear`)."""
    return tiles.transpose(1, 2).reshape(-1, tiles.shape[1] * tiles.shape[3])[:out_features]
