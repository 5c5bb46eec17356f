"""A study of `matsteer train` on a tiny chat model."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.training.helpers import make_llama, make_tokenizer
from training.evaluation.generation import Sampling

ROOT = Path(__file__).parents[2]


def found_twice(run: Callable[..., Any], folder: Path, count: int, options: Sequence[str]) -> Any:
    """What `run` finds on `count` questions, in JSON's types; a second call, which reads what the first has kept, finds
    the same."""
    make_llama(num_hidden_layers=16).save_pretrained(folder / "model")
    tokenizer = make_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}assistant: "
    tokenizer.save_pretrained(folder / "model")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        found, again = (run(str(folder / "model"), folder / "work", Sampling(0, 4), count, options) for _ in range(2))
    assert json.loads(json.dumps(found)) == again
    return again
