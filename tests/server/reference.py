"""The slow and obvious way to a steered text: one request, no cache, the formulas of arXiv 2502.12446 in float64."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from steering.column import Column
from steering.sites import site_module
from steering.types import Gate


def steered(activation: Tensor, columns: Sequence[Column], multipliers: Mapping[str, float]) -> Tensor:
    """One token's activation [D], steered, norm kept."""
    a = activation.double()
    total = a.clone()
    for column in columns:
        weight = column.gate_weight.double() @ a + column.gate_bias
        gate = torch.sigmoid(weight) if column.gate is Gate.SIGMOID else torch.ones(())
        total += multipliers.get(column.attribute, 0.0) * gate * column.vector.double()
    return total * a.norm() / total.norm()


@contextmanager
def steering(
    model: Any, columns: Sequence[Column], multipliers: Mapping[str, float], *, prompt: int, positions: str
) -> Iterator[None]:
    """Whole texts that are computed inside are steered. prompt: how many of their tokens are the prompt's."""

    def hook(module: Any, args: Any, output: Any) -> Any:
        whole = isinstance(output, Tensor)
        hidden = (output if whole else output[0]).clone()
        for index in range(hidden.shape[1]):
            at_prompt, at_generated = index < prompt, index >= prompt - 1
            if {"prompt": at_prompt, "generated": at_generated, "all": True}[positions]:
                hidden[0, index] = steered(hidden[0, index], columns, multipliers).to(hidden.dtype)
        return hidden if whole else (hidden, *output[1:])

    module, side = site_module(model, columns[0].site)
    assert side == "output"
    handle = module.register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


def logits(
    model: Any, ids: Sequence[int], columns: Sequence[Column], multipliers: Mapping[str, float], *, prompt: int
) -> Tensor:
    """Of every token of a text, [len(ids), vocab], steered where it is generated."""
    with torch.no_grad(), steering(model, columns, multipliers, prompt=prompt, positions="generated"):
        found: Tensor = model(torch.tensor([list(ids)]), use_cache=False).logits[0]
    return found


def greedy(
    model: Any,
    prompt: Sequence[int],
    columns: Sequence[Column],
    multipliers: Mapping[str, float],
    *,
    new: int,
    positions: str = "generated",
    eos: int | None = 0,
) -> list[int]:
    """New token ids; every step is one whole forward pass over the text so far."""
    ids = list(prompt)
    with torch.no_grad(), steering(model, columns, multipliers, prompt=len(prompt), positions=positions):
        for _ in range(new):
            ids.append(int(model(torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
            if ids[-1] == eos:
                break
    return ids[len(prompt) :]


def plain(model: Any, prompt: Sequence[int], *, new: int) -> list[int]:
    """What `transformers.generate` gives, greedily, for one prompt alone."""
    ids = torch.tensor([list(prompt)])
    output = model.generate(
        ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=new, pad_token_id=0
    )
    return output[0, len(prompt) :].tolist()
