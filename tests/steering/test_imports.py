"""While libraries are imported the garbage collector waits; a tokenizer is opened without PyTorch."""

import gc
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

import pytest
import torch
from safetensors.torch import save
from transformers import AutoTokenizer

from steering.errors import ModelError
from steering.imports import importing
from steering.pretrained import open_tokenizer
from tests.training.helpers import make_llama, make_tokenizer

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("enabled", [True, False])
def test_the_garbage_collector_waits_and_is_afterwards_as_it_was(enabled: bool) -> None:
    seen: list[bool] = []

    def fail() -> None:
        seen.append(gc.isenabled())
        raise ModuleNotFoundError

    try:
        if not enabled:
            gc.disable()
        with pytest.raises(ModuleNotFoundError), importing():
            fail()
        assert seen == [False]
        assert gc.isenabled() is enabled
    finally:
        gc.enable()


OPENED = """
import logging, os, sys
from steering.imports import without_torch
from steering.pretrained import open_tokenizer

tokenizer = open_tokenizer(sys.argv[1], alone=True)
assert not any(name.startswith("torch") for name in sys.modules)
assert "TRANSFORMERS_NO_ADVISORY_WARNINGS" not in os.environ
print(type(tokenizer).__name__, tokenizer("Q: naïve 東京 🙂", add_special_tokens=True)["input_ids"])

import torch
with without_torch():
    assert sys.modules["torch"] is torch, "it is there, and stays"
"""


def test_a_tokenizer_that_is_opened_alone_is_the_same_without_pytorch(tmp_path: Path) -> None:
    whole = make_tokenizer()
    whole.save_pretrained(tmp_path)
    make_llama().config.save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(save({"a": torch.zeros(1)}))
    done = subprocess.run([sys.executable, "-c", OPENED, tmp_path], capture_output=True, text=True, cwd=ROOT)
    assert done.stderr == ""
    ids = AutoTokenizer.from_pretrained(tmp_path)("Q: naïve 東京 🙂", add_special_tokens=True)["input_ids"]
    assert done.stdout.split(" ", 1)[1].strip() == str(ids)


@pytest.mark.parametrize("of", ["model", "hub"])
def test_what_is_asked_of_the_hub_is_asked_without_pytorch(of: str, tmp_path: Path) -> None:
    """Nothing is there, or can be asked: what has been imported by then is what counts."""
    (tmp_path / "model").mkdir()
    code = (
        "import sys\nfrom steering.errors import ModelError\nfrom steering.pretrained import open_tokenizer\n"
        "try:\n    open_tokenizer(sys.argv[1], alone=True)\nexcept ModelError:\n"
        "    print(any(name.startswith('torch') for name in sys.modules))"
    )
    id = str(tmp_path / "model") if of == "model" else "nobody/nothing"
    done = subprocess.run(
        [sys.executable, "-c", code, id],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=os.environ | {"HF_HUB_OFFLINE": "1"},
    )
    assert done.stdout == "False\n", done.stderr


@pytest.mark.parametrize(
    ("alone", "trust_remote_code", "hidden"), [(True, False, 1), (False, False, 0), (True, True, 0)]
)
def test_pytorch_is_hidden_only_from_tokenizers_that_take_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, alone: bool, trust_remote_code: bool, hidden: int
) -> None:
    asked: list[bool] = []

    @contextmanager
    def recording() -> Iterator[None]:
        asked.append(True)
        yield

    monkeypatch.setattr("steering.pretrained.without_torch", recording)
    make_tokenizer().save_pretrained(tmp_path)
    make_llama().save_pretrained(tmp_path)
    open_tokenizer(str(tmp_path), alone=alone, trust_remote_code=trust_remote_code)
    assert len(asked) == hidden


def test_an_adapter_of_the_hub_whose_base_model_takes_pytorch_is_refused_in_a_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, base = tmp_path / "lora", tmp_path / "base.gguf"
    folder.mkdir()
    base.write_bytes(b"GGUF")
    (folder / "adapter_model.safetensors").write_bytes(save({"a": torch.zeros(1)}))
    (folder / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": str(base), "peft_type": "LORA"}))
    monkeypatch.setattr(
        "steering.pretrained._hub_file", lambda _, name, __: path if (path := folder / name).is_file() else None
    )
    monkeypatch.setattr("steering.pretrained.without_torch", nullcontext)
    with pytest.raises(ModelError, match=r"is a GGUF file, whose tokenizer .* with --engine-process false"):
        open_tokenizer("me/my-lora", alone=True)
