"""The names that vectors have in files, and where each of them acts.

`14`, `layer_14`, `direction.14`      the block with index 14; the file does not say the site
`model.layers.14`                     the output of that block, unless another site is named; `.mlp`, `.self_attn` of it
`blocks.14.hook_resid_post`           TransformerLens's: `hook_resid_pre` is the output of the block before
`hidden_states.15`                    Hugging Face's: 0 is the embedding, l + 1 the output of block l
"""

import re
from dataclasses import dataclass, replace

from steering.errors import FormatError
from steering.formats.foreign import Counting, Hints, ModelShape
from steering.formats.pyvene_names import site_of
from steering.types import SiteKind

_KINDS = "|".join(SiteKind)
_LENS = re.compile(r"blocks\.(\d+)\.(.+)")
_HIDDEN = re.compile(r"(?:.*[._ -])?hidden_?states?[._ \[-]?(\d+)\]?", re.IGNORECASE)
_MODULE = re.compile(r"((?:\w+\.)*(?:layers|h))(?:\.(\d+)|\[(\d+)\])(?:\.(.+))?")
_PLAIN = re.compile(
    rf"(?:(?:.*[._ -])?(?:layers?|blocks?|l|direction)[._ -]?)?(-?\d+)(?:[._ -]({_KINDS}))?", re.IGNORECASE
)

_LENS_PLACES = {  # how many blocks before, and the site
    "hook_resid_pre": (1, SiteKind.RESIDUAL),
    "hook_resid_post": (0, SiteKind.RESIDUAL),
    "hook_resid_mid": (0, SiteKind.ATTN_OUTPUT),  # what is added there is added to what the attention adds
    "hook_attn_out": (0, SiteKind.ATTN_OUTPUT),
    "hook_mlp_out": (0, SiteKind.MLP_OUTPUT),
    "attn.hook_z": (0, SiteKind.ATTN_HEADS),
}
# Blocks that add what attention and MLP give to the residual stream as it is: one after the other, and side by side.
# Elsewhere a norm or a factor lies between, and TransformerLens's hook behind it.
_SEQUENTIAL = frozenset(
    f"{name}ForCausalLM"
    for name in ("Llama", "Mistral", "Mixtral", "Qwen2", "Qwen3", "Gemma", "Phi3", "SmolLM3", "Starcoder2")
) | {"GPT2LMHeadModel"}
_PARALLEL = frozenset({"GPTNeoXForCausalLM", "PhiForCausalLM", "Cohere2ForCausalLM"})


@dataclass(frozen=True)
class Place:
    """Where a vector acts. `layer` is the index of a block; -1 the embedding, before the first block."""

    name: str  # in the file
    layer: int
    site: SiteKind | None
    normed: bool = False  # the last of hidden_states, which has passed the final norm

    @property
    def outside(self) -> str | None:
        """Why no block gives it."""
        if self.layer < 0:
            return f"{self.name} is the embedding, before the first block"
        return (
            f"{self.name} has passed the final norm, which the output of the last block has not"
            if self.normed
            else None
        )


def place_of(name: str, hints: Hints) -> Place | None:
    """Where the vector of this name acts; None for a name that names no layer.

    Raises FormatError for a place that no site is, and for names that count layers otherwise than the user says.
    """
    if found := _LENS.fullmatch(name):
        return _lens(name, int(found[1]), found[2], hints)
    if found := _HIDDEN.fullmatch(name):
        _check_counting(name, Counting.HIDDEN_STATES, hints)
        return hidden_state(name, int(found[1]), hints)
    if found := _MODULE.fullmatch(name):
        _check_counting(name, Counting.BLOCKS, hints)
        return _module(name, int(found[2] or found[3]), found[1], found[4], hints)
    if found := _PLAIN.fullmatch(name):
        site = SiteKind(found[2].lower()) if found[2] else None
        return numbered(name, int(found[1]), replace(hints, site=_site(name, site, hints)))
    return None


def numbered(name: str, number: int, hints: Hints) -> Place:
    """A layer by its number, counted as the user says, else in blocks; a negative one from the last block backwards."""
    if hints.counting is Counting.HIDDEN_STATES:
        return hidden_state(name, number, hints)
    if number < 0:
        if hints.model is None or number < -hints.model.num_layers:
            raise FormatError(f"{name} is no layer of the model")
        number += hints.model.num_layers
    return Place(name, number, hints.site)


def hidden_state(name: str, number: int, hints: Hints) -> Place:
    """Entry `number` of Hugging Face's hidden_states."""
    if hints.model is not None and number < 0:
        number += hints.model.num_layers + 1
    if number < 0 or (hints.model is not None and number > hints.model.num_layers):
        raise FormatError(f"{name} is no entry of the model's hidden_states")
    site = _site(name, SiteKind.RESIDUAL, hints)
    return Place(name, number - 1, site, normed=hints.model is not None and number == hints.model.num_layers)


def _lens(name: str, block: int, hook: str, hints: Hints) -> Place:
    _check_counting(name, Counting.BLOCKS, hints)
    if hook not in _LENS_PLACES:
        raise FormatError(
            f"{name} is at no site of ours; of TransformerLens's hooks these are: {', '.join(_LENS_PLACES)}"
        )
    back, kind = _LENS_PLACES[hook]
    if hints.model is not None and not _equal(hook, hints.model):
        raise FormatError(
            f"{name} is at no site of {hints.model.architecture}: what is added there is not what is added to "
            f"{kind}, because of a norm, a factor, or an MLP beside the attention"
        )
    return Place(name, block - back, _site(name, kind, hints))


def _equal(hook: str, model: ModelShape) -> bool:
    if hook == "hook_resid_mid":
        return model.architecture in _SEQUENTIAL
    return hook not in ("hook_attn_out", "hook_mlp_out") or model.architecture in _SEQUENTIAL | _PARALLEL


def _module(name: str, block: int, blocks: str, within: str | None, hints: Hints) -> Place:
    if within is None:  # the block alone: its output, unless the user knows of another site
        return Place(name, block, hints.site or SiteKind.RESIDUAL)
    if within in tuple(SiteKind):
        return Place(name, block, _site(name, SiteKind(within), hints))
    path = f"{blocks}.{block}.{within}"
    site = site_of(path, None) or site_of(f"{path}.output", None)
    if site is None:
        raise FormatError(f"{name} is at no site of ours: {', '.join(SiteKind)}")
    return Place(name, block, _site(name, site.kind, hints))


def _site(name: str, named: SiteKind | None, hints: Hints) -> SiteKind | None:
    if named is not None and hints.site not in (None, named):
        raise FormatError(f"{name} is at {named}, not at --site {hints.site}")
    return named or hints.site


def _check_counting(name: str, counting: Counting, hints: Hints) -> None:
    if hints.counting not in (None, counting):
        raise FormatError(f"{name} counts {counting}, as its name says, not --counting {hints.counting}")
