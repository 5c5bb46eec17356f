"""The judge that a command line names, and the prompts that it judges answers to."""

import hashlib
import importlib
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, cast

from training.data.rows import Row, collect, read_rows, split_field, text_field
from training.data.samples import Split
from training.errors import DataError, TrainingError

Judge = Callable[[str, str], Mapping[str, bool | None]]
"""(prompt, generated text) -> metric -> does it hold; None where the metric does not apply."""


@dataclass(frozen=True)
class Prompt:
    text: str
    split: Split | None
    """None belongs to every split."""


def load_judge(name: str) -> Judge:
    """The function "module:function", modules of the working directory included. Raises TrainingError."""
    module, found, function = name.partition(":")
    if not (found and module and function):
        raise TrainingError(f"A judge is named as module:function, got {name!r}.")
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.insert(0, here)
    try:
        judge: Any = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError) as error:
        raise TrainingError(f"The judge {name!r} cannot be found: {error}.") from None
    if not callable(judge):
        raise TrainingError(f"The judge {name!r} is a {type(judge).__name__}, not a function.")
    return cast(Judge, judge)


def judge_key(judge: Judge) -> str:
    """The judge's name and a hash of the file that it is defined in."""
    module = sys.modules.get(judge.__module__)
    file = getattr(module, "__file__", None)
    source = hashlib.sha256(Path(file).read_bytes()).hexdigest() if file else ""
    return f"{judge.__module__}:{getattr(judge, '__qualname__', '')} {source}"


def load_prompts(path: Path) -> list[Prompt]:
    """JSON lines of `{"prompt", "split"?}`. Raises DataError with file and line."""

    def convert(row: Row) -> list[Prompt]:
        return [Prompt(text_field(row, "prompt"), split_field(row))]

    prompts = collect(str(path), partial(read_rows, path), convert)
    if not prompts:
        raise DataError(f"{path} holds no prompts.")
    return prompts


def prompts_of(prompts: Sequence[Prompt], split: Split, limit: int | None = None) -> list[str]:
    """The (first `limit`) prompts of a split. Raises DataError where there is none."""
    chosen = [prompt.text for prompt in prompts if prompt.split in (None, split)]
    if not chosen:
        raise DataError(f"There is no prompt of the {split} split.")
    return chosen[:limit]
