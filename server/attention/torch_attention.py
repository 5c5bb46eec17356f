"""What layers ask of their attention, and PyTorch's answer."""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention


@dataclass(frozen=True)
class Rules:
    """What a layer asks of its attention."""

    scale: float | None  # None: one over the root of the width
    window: int | None  # how many tokens a token sees, itself included
    cap: float | None  # scores go through cap * tanh(score / cap)
    sinks: Tensor | None  # [heads]: a score that takes its share and gives nothing


def attention(query: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None, rules: Rules) -> Tensor:
    """query [rows, heads, asked, width], keys and values [rows, heads, keys, width], mask broadcastable to the scores
    -> [rows, heads, asked, value width]. Step by step where PyTorch's own has no argument for it: capped scores
    (Gemma 2) and sinks (GPT-OSS)."""
    if rules.cap is None and rules.sinks is None:
        return scaled_dot_product_attention(query, keys, values, attn_mask=mask, scale=rules.scale)
    scores = query @ keys.transpose(2, 3) * (query.shape[-1] ** -0.5 if rules.scale is None else rules.scale)
    if rules.cap is not None:
        scores = torch.tanh(scores / rules.cap) * rules.cap
    if mask is not None:
        scores = scores + mask
    if rules.sinks is not None:
        rows, heads, asked, _ = scores.shape
        sink = rules.sinks.view(1, heads, -1, 1).expand(rows, heads, -1, asked * heads // len(rules.sinks))
        scores = torch.cat([scores, sink.reshape(rows, heads, asked, 1).to(scores.dtype)], dim=-1)
    weights = torch.softmax(scores, dim=-1, dtype=torch.float32).to(query.dtype)
    return weights[..., : keys.shape[2]] @ values


def hidden_keys(keys: Tensor, last: Tensor, window: int | None) -> Tensor:
    """keys [K], last [...]: the last key that each token may see -> [..., K] bool: what it must not."""
    hidden = keys > last[..., None]
    return hidden | (keys <= last[..., None] - window) if window else hidden
