"""Constant columns written into a copy of a model's weights: an ordinary Hugging Face folder, with no code of ours.

| site | bias | what is added to it |
| --- | --- | --- |
| attn_heads | of the attention's output projection | W_o @ displacement |
| attn_output | of the attention's output projection | displacement |
| mlp_output | of the MLP's last projection | displacement |
| residual | of the MLP's last projection, where a block gives h + mlp(...) | displacement |

A bias acts at every position, the prompt's included: the folder equals the model steered at positions `all`.
"""

import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from steering.checkpoint import Checkpoint, base_model_info, verify_against, verify_sites
from steering.formats.foreign import displacements
from steering.hook import steered
from steering.sites import text_config
from steering.types import Positions, Site
from training.baking.biases import add_missing, bias_of, projection
from training.baking.card import render
from training.errors import BakeError
from training.files import write_bytes
from training.models import Base

TOLERANCE = {torch.float64: 1e-6, torch.float32: 0.05}
COARSE = 0.5  # in half precision rounding is a good part of a small effect
TOKENS = 16


@dataclass(frozen=True)
class Baked:
    """What was written: the sites, the settings of the config that were switched on, and how well it agrees."""

    sites: tuple[Site, ...]
    switched: Mapping[str, bool]
    apart: float
    """The largest difference of a logit from the runtime hook's, as a share of the largest that steering makes."""


def bake(base: Base, checkpoint: Checkpoint, out: Path, attributes: Mapping[str, float] | None = None) -> Baked:
    """Write `base` with the checkpoint's displacement as biases into the new folder `out`, with tokenizer and card.

    attributes: a multiplier for each attribute, 0 where it is not listed; None: the checkpoint's defaults. The model
    in `base` is changed. Raises BakeError for a folder that exists, a site that no bias moves, and a result that is not
    the runtime hook's; FormatError for columns that are not constant; CheckpointMismatch for another base model.
    """
    if out.exists():
        raise BakeError(f"{out} exists already: choose another folder or delete it.")
    model = base.model
    verify_against(checkpoint, base_model_info(model, base.id, base.revision))
    verify_sites(checkpoint, model)
    multipliers = checkpoint.multipliers(checkpoint.attributes if attributes is None else attributes)
    for column, multiplier in zip(checkpoint.columns, multipliers, strict=True):
        low, high = column.range
        if not low <= multiplier <= high:
            raise BakeError(
                f"The multiplier of {column.attribute!r} must be from {low:g} to {high:g}, got {multiplier:g}."
            )
    moved = displacements(checkpoint.columns, multipliers, "a bias")
    plain, hooked = _references(model, checkpoint, multipliers)
    switched = write_biases(model, moved)
    apart = _apart(_logits(model), hooked, plain)
    if not apart <= TOLERANCE.get(model.dtype, COARSE):
        raise BakeError(
            f"Biases in {type(model).__name__} at {', '.join(map(str, moved))} do not do what the runtime hook does: "
            f"logits differ by {apart:.2g} of what steering changes."
        )
    baked = Baked(tuple(moved), switched, apart)
    _save(base, out, render(base.id, checkpoint, multipliers, baked.sites, baked.switched, baked.apart))
    return baked


@torch.no_grad()
def write_biases(model: Any, moved: Mapping[Site, Tensor]) -> dict[str, bool]:
    """Adds float64 displacements [D] of sites to the biases that move them; returns what was switched on in the config.

    Raises BakeError, before anything is changed.
    """
    added = [(projection(model, site), bias_of(model, site, displacement)) for site, displacement in moved.items()]
    switched = add_missing(model, moved)
    for layer, bias in added:
        own: Any = layer.bias
        own.copy_(own.double() + bias)
    return switched


def _references(model: Any, checkpoint: Checkpoint, multipliers: Sequence[float]) -> tuple[Tensor, Tensor]:
    """The logits without steering, and with the hook at every position."""
    plain = _logits(model)
    with steered(model, checkpoint.columns, multipliers, positions=Positions.ALL):
        return plain, _logits(model)


@torch.no_grad()
def _logits(model: Any) -> Tensor:
    """Of a few random tokens, the same on every call."""
    vocabulary = int(text_config(model).vocab_size)
    tokens = torch.randint(vocabulary, (1, TOKENS), generator=torch.Generator().manual_seed(0))
    logits: Tensor = model(input_ids=tokens.to(model.device), use_cache=False).logits
    return logits.double()


def _apart(baked: Tensor, hooked: Tensor, plain: Tensor) -> float:
    effect = float((hooked - plain).abs().max())
    difference = float((baked - hooked).abs().max())
    return difference / effect if effect else difference


def _save(base: Base, out: Path, card: str) -> None:
    partial = out.with_name(f".{out.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        base.model.save_pretrained(partial)
        base.tokenizer.save_pretrained(partial)
        write_bytes(partial / "README.md", card.encode())
        os.replace(partial, out)
    except OSError as error:
        raise BakeError(f"{out} cannot be written: {error}.") from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)
