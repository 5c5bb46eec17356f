"""Constant columns written into a copy of a model's weights: an ordinary Hugging Face folder, with no code of ours.

| site | bias | what is added to it |
| --- | --- | --- |
| attn_heads | of the attention's output projection | W_o @ displacement |
| attn_output | of the attention's output projection | displacement |
| mlp_output | of the MLP's last projection | displacement |
| residual | of the MLP's last projection, where a block gives h + mlp(...) | displacement |

A bias acts at every position, the prompt's included: the folder equals the model steered at positions `all`.
"""

import copy
import os
import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from steering.checkpoint import Checkpoint, base_model_info, verify_against, verify_sites
from steering.formats.foreign import displacements
from steering.hook import steered
from steering.sites import site_module, text_config
from steering.types import Positions, Site, SiteKind
from training.errors import BakeError
from training.files import write_bytes
from training.models import Base

TOLERANCE = {torch.float64: 1e-6, torch.float32: 0.05}
COARSE = 0.5  # in half precision rounding is a good part of a small effect
TOKENS = 16

DOWN = ("down_proj", "c_proj", "dense_4h_to_h", "fc2", "fc_out")
# Norms between the feed-forward sub-layer and the residual stream.
POST_NORMS = ("post_feedforward_layernorm", "post_mlp_layernorm")
# Settings with which architectures make their projections with biases.
SWITCHES = {True: ("attention_bias", "use_bias"), False: ("mlp_bias", "use_bias")}
INSTEAD = "steer at run time instead (matsteer serve), or export the checkpoint (matsteer checkpoints export)"


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
    _save(base, out, _card(base.id, checkpoint, multipliers, baked.sites, baked.switched, baked.apart))
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


def _save(base: Base, out: Path, text: str) -> None:
    partial = out.with_name(f".{out.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        base.model.save_pretrained(partial)
        base.tokenizer.save_pretrained(partial)
        write_bytes(partial / "README.md", text.encode())
        os.replace(partial, out)
    except OSError as error:
        raise BakeError(f"{out} cannot be written: {error}.") from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def at_attention(site: Site) -> bool:
    return site.kind in (SiteKind.ATTN_HEADS, SiteKind.ATTN_OUTPUT)


def projection(model: nn.Module, site: Site) -> nn.Module:
    """The linear layer whose bias moves a site: the attention's output projection, or the last one of the MLP.

    Raises BakeError for a site that no bias moves, UnsupportedArchitecture for one that the model lacks.
    """
    name = type(model).__name__
    if at_attention(site):
        found, _ = site_module(model, Site(site.layer, SiteKind.ATTN_HEADS))
    else:
        block, _ = site_module(model, Site(site.layer, SiteKind.RESIDUAL))
        norm = next((norm for norm in POST_NORMS if hasattr(block, norm)), None)
        if site.kind is SiteKind.RESIDUAL and norm:
            raise BakeError(
                f"The output of a block of {name} is not h + mlp(...): its MLP's output passes {norm} first, so that "
                f"no bias gives {site}; {INSTEAD}."
            )
        mlp, _ = site_module(model, Site(site.layer, SiteKind.MLP_OUTPUT))
        found = next((module for last in DOWN if isinstance(module := getattr(mlp, last, None), nn.Module)), mlp)
    if not isinstance(found, nn.Linear | Conv1D) or not found.weight.is_floating_point():
        raise BakeError(
            f"{site} of {name} ends in a {type(found).__name__}, not in one linear layer with a bias; {INSTEAD}."
        )
    return found


def bias_of(model: nn.Module, site: Site, displacement: Tensor) -> Tensor:
    """What to add to the bias of `projection` to move a site by a float64 displacement [D]: float64 [hidden size].

    At attn_heads that is W_o @ displacement (arXiv 2306.03341), at residual the displacement as the block scales it.
    """
    layer: Any = projection(model, site)
    displacement = displacement.to(layer.weight.device)
    if site.kind is SiteKind.ATTN_HEADS:
        weight: Tensor = layer.weight.detach().double()
        return displacement @ (weight if isinstance(layer, Conv1D) else weight.T)
    if site.kind is SiteKind.RESIDUAL:
        block: Any = site_module(model, site)[0]
        return displacement / float(getattr(block, "residual_multiplier", 1.0))
    return displacement


def add_missing(model: nn.Module, sites: Iterable[Site]) -> dict[str, bool]:
    """Gives the projections of these sites their biases, by the architecture's own settings; all new ones are 0.

    Returns the settings that were changed. Raises BakeError where no setting adds the biases.
    """
    lacking = [site for site in sites if getattr(projection(model, site), "bias", None) is None]
    if not lacking:
        return {}
    config: Any = copy.deepcopy(model.config)
    text = config.get_text_config(decoder=True)
    switches = {name for site in lacking for name in SWITCHES[at_attention(site)] if getattr(text, name, None) is False}
    for name in switches:
        setattr(text, name, True)
    with torch.device("meta"):
        biased = type(model)(config)
    for site in lacking:
        if getattr(projection(biased, site), "bias", None) is None:
            what = "attention's output projection" if at_attention(site) else "MLP's last projection"
            raise BakeError(
                f"The {what} of {type(model).__name__} has no bias, and no setting of its config adds one, so that "
                f"{site} cannot be baked; {INSTEAD}."
            )
    own = model.state_dict()
    for name, wanted in biased.state_dict().items():
        if name not in own:
            module = model.get_submodule(name.rpartition(".")[0])
            like: Any = module.weight
            module.bias = nn.Parameter(torch.zeros(wanted.shape, dtype=like.dtype, device=like.device))
    for name in switches:
        setattr(text_config(model), name, True)
    return dict.fromkeys(sorted(switches), True)


def _card(
    base_model: str,
    checkpoint: Checkpoint,
    multipliers: Sequence[float],
    sites: Sequence[Site],
    switched: Mapping[str, bool],
    apart: float,
) -> str:
    """The card as Markdown."""
    config = checkpoint.config
    rows = [
        f"| {column.attribute} | {column.site} | {multiplier:g} |"
        for column, multiplier in zip(checkpoint.columns, multipliers, strict=True)
        if multiplier
    ]
    settings = " and ".join(f"`{name}`" for name in switched)
    changed = f" Its config has {settings} switched on; every other new bias is 0." if switched else ""
    return "\n".join(
        [
            f"---\nbase_model: {base_model}\ntags: [activation-steering, baked]\n---\n",
            f"# {base_model} with {config.name}, version {config.version}, in its weights\n",
            f"`{base_model}` with the steering vectors of the checkpoint `{config.name}@{config.version}` "
            f"({config.method}, sha256 `{config.sha256[:12]}`) added to biases at "
            f"{', '.join(f'`{site}`' for site in sites)}.{changed} No code is needed:\n",
            "```python",
            "from transformers import AutoModelForCausalLM, AutoTokenizer",
            "",
            'model = AutoModelForCausalLM.from_pretrained("THIS FOLDER")',
            'tokenizer = AutoTokenizer.from_pretrained("THIS FOLDER")',
            "```\n",
            "| attribute | site | multiplier |",
            "| --- | --- | --- |",
            *rows,
            "",
            "## What is different from steering at run time\n",
            "- A bias acts at **every position, the prompt's included**: this model equals the one that is steered at "
            f"positions `all`. The checkpoint's own positions are `{config.positions}`.",
            "- The multipliers are fixed, and so is the steering of every request.",
            f"- When it was written, its logits differed from the run-time hook's by {apart:.2g} of what steering "
            "changes.",
            "- The rates in the checkpoint's card were measured with its own positions: measure this model again.",
            "",
        ]
    )
