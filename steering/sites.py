"""Where the sites are in a Hugging Face decoder: found by the module names that model families share."""

from collections.abc import Sequence
from typing import Any, Literal, cast

from torch import Tensor, nn

from steering.errors import UnsupportedArchitecture
from steering.types import Site, SiteKind

LAYERS = ("model.layers", "transformer.h", "gpt_neox.layers", "model.language_model.layers", "layers", "h")
ATTENTION = ("self_attn", "attn", "attention")
PROJECTION = ("o_proj", "c_proj", "dense", "out_proj")
MLP = ("mlp", "block_sparse_moe", "feed_forward")

# Blocks whose sub-layers add the residual stream themselves, so that their output is not what the site means.
ADDS_RESIDUAL = frozenset({"BloomBlock", "MptBlock", "FalconDecoderLayer"})

Side = Literal["input", "output"]


def layers(model: nn.Module) -> list[nn.Module]:
    """The decoder blocks, first to last. Raises UnsupportedArchitecture naming the class and the paths looked for."""
    for path in LAYERS:
        found = _follow(model, path)
        if isinstance(found, nn.ModuleList) and len(found):
            return list(found)
    raise UnsupportedArchitecture(f"{type(model).__name__} has no list of decoder blocks at {_any_of(LAYERS)}")


def site_module(model: nn.Module, site: Site) -> tuple[nn.Module, Side]:
    """The module at a site, and whether the site is its input or its output.

    attn_output: output of the self-attention sub-layer, before any norm that follows it; attn_heads: input of the
    attention output projection; mlp_output: output of the feed-forward sub-layer, experts included; residual: output
    of the block. Raises UnsupportedArchitecture naming the class and the paths looked for.
    """
    blocks = layers(model)
    if site.layer >= len(blocks):
        raise UnsupportedArchitecture(
            f"{type(model).__name__} has layers 0 to {len(blocks) - 1}: there is no layer {site.layer} for site {site}"
        )
    block, where = blocks[site.layer], f"layer {site.layer} of {type(model).__name__}"
    if site.kind is SiteKind.RESIDUAL:
        return block, "output"
    if type(block).__name__ in ADDS_RESIDUAL:
        raise UnsupportedArchitecture(
            f"{where} ({type(block).__name__}) adds the residual stream inside its sub-layers: "
            f"{site.kind} has no module of its own, only residual can be steered"
        )
    if site.kind is SiteKind.MLP_OUTPUT:
        return _child(block, MLP, "feed-forward sub-layer", where), "output"
    attention = _child(block, ATTENTION, "self-attention sub-layer", where)
    if site.kind is SiteKind.ATTN_OUTPUT:
        return attention, "output"
    return _child(attention, PROJECTION, "attention output projection", f"the attention of {where}"), "input"


def site_width(model: nn.Module, kind: SiteKind) -> int:
    """D at the sites of a kind: the hidden size, or the input width of the attention output projection."""
    if kind is not SiteKind.ATTN_HEADS:
        return hidden_size(model)
    projection, _ = site_module(model, Site(_first_attention(model), kind))
    features = getattr(projection, "in_features", None)
    # GPT-2's Conv1D keeps its weight as [in, out] and has no in_features.
    return int(features if features is not None else cast(Tensor, projection.weight).shape[0])


def hidden_size(model: nn.Module) -> int:
    """The width of the residual stream."""
    return int(text_config(model).hidden_size)


def text_config(model: nn.Module) -> Any:
    """The config of the decoder, also where the model has others (vision, audio)."""
    config: Any = model.config
    return config.get_text_config(decoder=True) if hasattr(config, "get_text_config") else config


def _first_attention(model: nn.Module) -> int:
    """Hybrid models have blocks without attention."""
    for index, block in enumerate(layers(model)):
        if any(isinstance(getattr(block, name, None), nn.Module) for name in ATTENTION):
            return index
    return 0


def _child(parent: nn.Module, names: Sequence[str], what: str, where: str) -> nn.Module:
    for name in names:
        found = getattr(parent, name, None)
        if isinstance(found, nn.Module):
            return found
    raise UnsupportedArchitecture(f"{where} ({type(parent).__name__}) has no {what} named {_any_of(names)}")


def _follow(model: nn.Module, path: str) -> object:
    found: object = model
    for name in path.split("."):
        found = getattr(found, name, None)
    return found


def _any_of(names: Sequence[str]) -> str:
    return ", ".join(names[:-1]) + f" or {names[-1]}"
