"""MAT-Steer's own checkpoints (arXiv 2502.12446), both ages: a state dict, and a state dict with its task names.

`steering_vectors.{i}` [D], `gating_weights.{i}.weight` [1, D], `gating_weights.{i}.bias` [1] for task i. The newer
training script writes the layer and the data sets into `NAME_metadata.json` beside `NAME.pt`; no file says the site.
"""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from steering.column import Column
from steering.errors import FormatError
from steering.formats.foreign import Foreign, Hints, named_layers, need_layer, need_site
from steering.formats.pickles import load_pickle, vector_of
from steering.types import Gate, Positions, Site

PART = re.compile(r"steering_vectors\.(\d+)|gating_weights\.(\d+)\.(weight|bias)")
SITE = "the paper steers attn_output; its code is trained on residual and steers attn_heads"


def is_mat(content: object) -> bool:
    """Whether an unpickled file is one of MAT-Steer's."""
    return isinstance(content, dict) and ("model_state_dict" in content or "steering_vectors.0" in content)


def read(path: Path, hints: Hints) -> Foreign:
    """One gated, norm-keeping column a task. Raises FormatError, also where the layer or the site must be named."""
    content, metadata = load_pickle(path), _metadata(path)
    if not is_mat(content):
        raise FormatError(f"{path} holds no MAT-Steer state: there is neither model_state_dict nor steering_vectors.0")
    state = content.get("model_state_dict", content)
    parts = _parts(state, path)
    names = _names(hints, content, metadata, len(parts), path)
    site = Site(_layer(hints, metadata, path), need_site(hints, path, SITE))
    columns = tuple(
        Column(
            attribute=name,
            site=site,
            gate=Gate.SIGMOID,
            vector=vector,
            gate_weight=weight,
            gate_bias=float(bias),
            keep_norm=True,
        )
        for name, (vector, weight, bias) in zip(names, parts, strict=True)
    )
    return Foreign(columns, "mat", Positions.GENERATED, {"metadata": metadata} if metadata else {})


def _parts(state: object, path: Path) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Vector [D], gate weight [D] and gate bias [1] of each task, in order."""
    if not isinstance(state, Mapping):
        raise FormatError(f"model_state_dict in {path} must be a state dict, not {type(state).__name__}")
    if strange := [str(name) for name in state if not PART.fullmatch(str(name))]:
        raise FormatError(f"{path} holds {', '.join(strange)}, which no MAT-Steer state has")
    count = sum(str(name).startswith("steering_vectors.") for name in state)
    expected = [
        (f"steering_vectors.{i}", f"gating_weights.{i}.weight", f"gating_weights.{i}.bias") for i in range(count)
    ]
    if missing := [name for names in expected for name in names if name not in state]:
        raise FormatError(f"{path} has {count} steering vectors but no {', '.join(missing)}")
    if len(state) != 3 * count:
        raise FormatError(f"{path} has {count} steering vectors but gates of more tasks")
    parts = []
    for names in expected:
        vector, weight, bias = (vector_of(state[name], f"{name} in {path}") for name in names)
        if len(vector) != len(weight) or len(bias) != 1:
            raise FormatError(
                f"{names[0]}, {names[1]} and {names[2]} in {path} have {len(vector)}, {len(weight)} and {len(bias)} "
                "numbers: the first two must be equal, the last one 1"
            )
        parts.append((vector, weight, bias))
    return parts


def _names(hints: Hints, content: Mapping[str, Any], metadata: Mapping[str, Any], count: int, path: Path) -> list[str]:
    names = list(hints.attributes or content.get("task_names") or metadata.get("datasets") or ())
    if not names:
        raise FormatError(f"{path} does not name its {count} attributes: name each with --attribute, in their order")
    if len(names) != count:
        raise FormatError(f"{path} holds {count} attributes, but {len(names)} were named: {', '.join(map(str, names))}")
    return [str(name) for name in names]


def _layer(hints: Hints, metadata: Mapping[str, Any], path: Path) -> int:
    if metadata.get("layer") is None:
        return need_layer(hints, path)
    layer: int = metadata["layer"]
    if hints.layers not in ((), (layer,)):
        raise FormatError(
            f"{path} was trained on layer {layer}, says its metadata, not on --layer {named_layers(hints.layers)}"
        )
    return layer


def _metadata(path: Path) -> dict[str, Any]:
    beside = path.with_name(f"{path.stem}_metadata.json")
    if not beside.is_file():
        return {}
    try:
        metadata = json.loads(beside.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise FormatError(f"{beside} cannot be read: {error}") from None
    if not isinstance(metadata, dict):
        raise FormatError(f"{beside} must hold an object, not {type(metadata).__name__}")
    return metadata
