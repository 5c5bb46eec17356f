"""The biases of a model that a constant displacement can be written into, and how to add those that are missing."""

import copy
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from steering.sites import site_module, text_config
from steering.types import Site, SiteKind
from training.errors import BakeError

DOWN = ("down_proj", "c_proj", "dense_4h_to_h", "fc2", "fc_out")
# Norms between the feed-forward sub-layer and the residual stream.
POST_NORMS = ("post_feedforward_layernorm", "post_mlp_layernorm")
# Settings with which architectures make their projections with biases.
SWITCHES = {True: ("attention_bias", "use_bias"), False: ("mlp_bias", "use_bias")}
INSTEAD = "steer at run time instead (matsteer serve), or export the checkpoint (matsteer checkpoints export)"


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
