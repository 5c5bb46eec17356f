"""What is in a checkpoint: what each column promotes, how long it is, what it is like, and what opens its gate."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize as unit

from steering.checkpoint import Checkpoint, base_model_info, verify_against, verify_sites
from steering.column import Column
from steering.operators import gate_codes, gate_values
from steering.sites import layers, site_module
from steering.types import Gate, Site, SiteKind
from training.activations.hidden_states import read_hidden_states
from training.activations.tokenization import check_ids, encode_prompt
from training.data.samples import Turn
from training.errors import DataError, TrainingError
from training.models import Base

NORMS = ("norm", "ln_f", "final_layer_norm", "final_layernorm")


@dataclass(frozen=True)
class Token:
    """A token, and a number that belongs to it."""

    text: str
    value: float


@dataclass(frozen=True)
class ColumnView:
    """One column, looked at."""

    column: Column
    promoted: tuple[Token, ...]
    """The tokens whose logits the vector raises most, by the final norm and the unembedding."""
    suppressed: tuple[Token, ...]
    norm: float
    share: float
    """Default multiplier x norm as a share of the median norm of the activations at the column's site."""
    sink: float
    """The cosine between the vector and what stands at the first position of the texts."""
    gate_sink: float | None
    """The same for the gate's weight, at the site that it reads; None for a constant gate."""
    gates: tuple[tuple[Token, ...], ...]
    """Of each text, how open the gate is at each token; none for a constant gate."""

    @property
    def label(self) -> str:
        return f"{self.column.attribute} at {self.column.site}"

    @property
    def opened(self) -> list[float]:
        """The gate on all tokens of all texts but their first, an attention sink that is never steered."""
        return [token.value for text in self.gates for token in text[1:]]

    def strongest(self, count: int) -> list[Token]:
        """The tokens on which the gate is open the most."""
        found = [token for text in self.gates for token in text[1:]]
        return sorted(found, key=lambda token: -token.value)[:count]


@dataclass(frozen=True)
class Inspection:
    name: str
    base_model: str
    method: str
    columns: tuple[ColumnView, ...]
    cosines: tuple[tuple[float | None, ...], ...]
    """Between the vectors of every two columns; None where they are of different spaces."""
    texts: tuple[str, ...]


@torch.no_grad()
def inspect(base: Base, checkpoint: Checkpoint, texts: "Sequence[str | Sequence[Turn]]", *, top: int = 8) -> Inspection:
    """Look at every column, unsteered, on some texts (conversations are rendered by the model's chat template).

    `top`: tokens that are named of each vector. Raises CheckpointMismatch for a model that the checkpoint was not made
    for, TrainingError for one without a final norm that is known, DataError for texts that cannot be read.
    """
    model = base.model
    verify_against(checkpoint, base_model_info(model, base.id, base.revision))
    verify_sites(checkpoint, model)
    ids = [_encoded(base, text) for text in texts]
    check_ids(model, base.tokenizer, ids)
    columns = checkpoint.columns
    sites = dict.fromkeys(site for column in columns for site in (column.site, _read_site(column)))
    states = [
        read_hidden_states(model, list(sites), lambda found: found[0].float().cpu(),
                           input_ids=torch.tensor([row], device=model.device), use_cache=False)
        for row in ids
    ]  # fmt: skip
    words = [[_shown(base.tokenizer, token) for token in row] for row in ids]
    views = tuple(_view(base, column, states, words, top) for column in columns)
    spaces = [None if column.site.kind is SiteKind.ATTN_HEADS else SiteKind.RESIDUAL for column in columns]
    vectors = [unit(column.vector.double(), dim=0) for column in columns]
    cosines = tuple(
        tuple(
            float(vectors[i] @ vectors[j]) if (spaces[i] and spaces[j]) or one.site == other.site else None
            for j, other in enumerate(columns)
        )
        for i, one in enumerate(columns)
    )
    config = checkpoint.config
    said = tuple("".join(row) for row in words)
    return Inspection(f"{config.name}@{config.version}", base.id, config.method, views, cosines, said)


def read_texts(path: Path) -> "list[str | tuple[Turn, ...]]":
    """A text a line; of JSON lines `text`, `prompt` with its `completion`, or `messages`. Raises DataError."""
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read: {error}.") from None
    found = [_text_of(line, f"{path}:{number}", json_lines=path.suffix == ".jsonl")
             for number, line in enumerate(lines, start=1) if line]  # fmt: skip
    if not found:
        raise DataError(f"{path} holds no text.")
    return found


def _text_of(line: str, where: str, *, json_lines: bool) -> "str | tuple[Turn, ...]":
    if not json_lines:
        return line
    try:
        row = json.loads(line)
        if "messages" in row:
            return tuple(Turn(turn["role"], turn["content"]) for turn in row["messages"])
        text = row["text"] if "text" in row else row["prompt"] + row.get("completion", "")
    except (ValueError, KeyError, TypeError, AttributeError):
        text = None
    if not isinstance(text, str) or not text:
        raise DataError(f'{where} is no JSON object with "text", "prompt" or "messages".')
    return text


def _encoded(base: Base, text: "str | Sequence[Turn]") -> tuple[int, ...]:
    prompt, turns = (text, ()) if isinstance(text, str) else ("", text)
    ids = encode_prompt(base.tokenizer, prompt, turns, base.chat)
    limit = getattr(base.model.config, "max_position_embeddings", None) or 1 << 30
    return ids[:limit]


def _read_site(column: Column) -> Site:
    return column.reads.site if column.reads else column.site


def _view(
    base: Base, column: Column, states: Sequence[dict[Site, Tensor]], words: Sequence[Sequence[str]], top: int
) -> ColumnView:
    here, read = ([state[site] for state in states] for site in (column.site, _read_site(column)))
    usual = float(torch.cat([rows[1:] for rows in here]).norm(dim=1).median()) if any(len(r) > 1 for r in here) else 0.0
    norm = float(column.vector.norm())
    gated = column.gate is not Gate.CONSTANT
    lens = logit_lens(base.model, column.site, column.vector)
    ranked = lens.argsort(descending=True)
    named = [[Token(_shown(base.tokenizer, int(i)), float(lens[i])) for i in part]
             for part in (ranked[:top], ranked.flip(0)[:top])]  # fmt: skip
    opened = [
        gate_values(rows, column.gate_weight[None], torch.tensor([column.gate_bias]), gate_codes([column.gate]))[:, 0]
        for rows in read
    ]
    return ColumnView(
        column,
        tuple(named[0]),
        tuple(named[1]),
        norm,
        abs(column.default_multiplier) * norm / usual if usual else 0.0,
        _cosine(column.vector, _sink(here)),
        _cosine(column.gate_weight, _sink(read)) if gated else None,
        tuple(
            tuple(Token(word, value) for word, value in zip(own, gates.tolist(), strict=True))
            for own, gates in zip(words, opened, strict=True)
        ) if gated else (),
    )  # fmt: skip


def _sink(rows: Sequence[Tensor]) -> Tensor:
    """What stands at the first position, as a mean over the texts."""
    return torch.stack([own[0] for own in rows]).mean(0)


def _cosine(one: Tensor, other: Tensor) -> float:
    return float(torch.cosine_similarity(one.double(), other.double(), dim=0))


@torch.no_grad()
def logit_lens(model: Any, site: Site, vector: Tensor) -> Tensor:
    """The logits [V] that a vector at a site writes by itself, through the final norm and the unembedding; at heads
    through the attention's output projection first. What an empty stream gives is taken off. Raises TrainingError."""
    head = model.get_output_embeddings()
    own = head.weight
    stream = vector.to(own.device, own.dtype)
    if site.kind is SiteKind.ATTN_HEADS:
        projection, _ = site_module(model, site)
        stream = projection(stream[None])[0] - projection(torch.zeros_like(stream)[None])[0]
    stream = unit(stream.float(), dim=0).to(own.dtype) * stream.shape[0] ** 0.5
    norm = _final_norm(model)
    both = torch.stack([stream, torch.zeros_like(stream)])[None]
    logits = head(norm(both))[0].float().cpu()
    found: Tensor = logits[0] - logits[1]
    return found


def _final_norm(model: nn.Module) -> nn.Module:
    """The norm behind the last block, which stands beside the blocks."""
    blocks = layers(model)
    for parent in model.modules():
        children = dict(parent.named_children())
        if any(isinstance(one, nn.ModuleList) and len(one) and one[0] is blocks[0] for one in children.values()):
            for name in NORMS:
                if name in children:
                    return children[name]
    raise TrainingError(f"{type(model).__name__} has no final norm named {', '.join(NORMS)}.")


def _shown(tokenizer: Any, token: int) -> str:
    text: str = tokenizer.decode([token])
    return text
