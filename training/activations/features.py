"""Features of honest_llama and MAT-Steer, three numpy files, as labelled activations.

`PREFIX_labels.npy` [N]; `PREFIX_head_wise.npy` [N, L, H*d], the input of the attention output projections at the last
token; `PREFIX_layer_wise.npy` [N, L + 1, D], Hugging Face's hidden_states there: entry l + 1 is the residual stream
after the block with index l, but the last entry has passed the final norm, and is no site.
"""

from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from steering.types import Site, SiteKind
from training.activations import Pool
from training.activations.store import Activations, label_rows
from training.data.samples import Sample
from training.data.splits import split_samples
from training.errors import ActivationError
from training.files import content_key
from training.models import load_config


class GroupBy(StrEnum):
    """Which rows belong to one question, and so to one split; the files do not say."""

    ANSWERS = "answers"
    """Each question's right answers come before its wrong ones, as in TruthfulQA: a right one after a wrong one begins
    the next."""
    ROWS = "rows"
    """Every row is a question of its own."""


@dataclass(frozen=True)
class Shape:
    """What the features must agree with in the config of their model."""

    id: str
    layers: int
    hidden_size: int
    heads: int
    heads_width: int

    @classmethod
    def of(cls, id: str, revision: str | None = None, *, trust_remote_code: bool = False) -> "Shape":
        """Read from a Hugging Face id or folder; no weights are loaded. Raises TrainingError."""
        config = load_config(id, revision, trust_remote_code=trust_remote_code).get_text_config(decoder=True)
        heads, width = config.num_attention_heads, getattr(config, "head_dim", None)
        heads_width = heads * width if width else config.hidden_size
        return cls(id, config.num_hidden_layers, config.hidden_size, heads, heads_width)


def read_features(
    prefix: str, shape: Shape, sites: tuple[Site, ...], attribute: str, groups: GroupBy | Path, *, seed: int = 0
) -> Activations:
    """The rows at `sites` (attn_heads, residual) with seeded splits by group.

    groups: how to tell which rows belong together, or a numpy file with a group for each row, [N]. The big files are
    mapped, and only the layers that are asked for are read. Raises ActivationError.
    """
    labels = _labels(Path(f"{prefix}_labels.npy"))
    samples = split_samples(
        [
            Sample(attribute, f"row {row}", "", bool(label), group)
            for row, (label, group) in enumerate(zip(labels, _groups(groups, labels), strict=True))
        ],
        seed=seed,
    )
    values = {site: _values(prefix, shape, site, len(labels)) for site in sites}
    source = {
        "features": Path(prefix).name,
        "model": shape.id,
        "heads": shape.heads,
        "sites": [str(site) for site in sites],
        "data": content_key([labels.tolist(), [float(value.double().sum()) for value in values.values()], seed]),
    }
    return label_rows(values, torch.arange(len(labels)), samples, Pool.LAST, source)


def _labels(path: Path) -> NDArray[np.bool_]:
    labels = _mapped(path)
    if labels.ndim != 1 or not len(labels) or not np.isin(labels, (0, 1)).all():
        raise ActivationError(f"{path} must hold a 0 or 1 for each row, not an array of shape {list(labels.shape)}.")
    found: NDArray[np.bool_] = labels.astype(bool)
    return found


def _groups(groups: GroupBy | Path, labels: NDArray[np.bool_]) -> list[str]:
    if groups is GroupBy.ROWS:
        return [str(row) for row in range(len(labels))]
    if groups is GroupBy.ANSWERS:
        begins = labels & ~np.concatenate([[False], labels[:-1]])
        return [str(number) for number in np.cumsum(begins)]
    given = _mapped(Path(groups))
    if given.shape != labels.shape:
        raise ActivationError(f"{groups} must hold a group for each of {len(labels)} rows, not {list(given.shape)}.")
    return [str(group) for group in given.tolist()]


def _values(prefix: str, shape: Shape, site: Site, count: int) -> Tensor:
    """Float32 [N, D] at a site."""
    if site.kind is SiteKind.ATTN_HEADS:
        path, entry, expected = f"{prefix}_head_wise.npy", site.layer, (count, shape.layers, shape.heads_width)
    elif site.kind is SiteKind.RESIDUAL:
        path, entry, expected = f"{prefix}_layer_wise.npy", site.layer + 1, (count, shape.layers + 1, shape.hidden_size)
    else:
        raise ActivationError(f"Features hold attn_heads and residual, not {site}.")
    array = _mapped(Path(path))
    if array.shape != expected or not np.issubdtype(array.dtype, np.floating):
        raise ActivationError(
            f"{path} holds {array.dtype} of shape {list(array.shape)}; {shape.id} and {count} labels ask for floats of "
            f"shape {list(expected)}."
        )
    if site.layer >= shape.layers:
        raise ActivationError(f"{shape.id} has layers 0 to {shape.layers - 1}: there is no layer {site.layer}.")
    if site.kind is SiteKind.RESIDUAL and entry == shape.layers:
        raise ActivationError(
            f"The last entry of {path} has passed the model's final norm: it is not the residual stream at {site}."
        )
    values = torch.from_numpy(array[:, entry].astype(np.float32))
    if not bool(torch.isfinite(values).all()):
        raise ActivationError(f"{path} holds values at {site} that are not finite.")
    return values


def _mapped(path: Path) -> NDArray[Any]:
    """A numpy file, mapped; nothing is unpickled."""
    try:
        array: NDArray[Any] = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise ActivationError(f"{path} cannot be read: {str(error).rstrip('.')}.") from None
    return array
