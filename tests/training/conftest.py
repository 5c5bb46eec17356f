"""Tiny real models and tokenizers, built from configs and a few sentences."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from tests.training.helpers import make_llama, make_tokenizer
from training.data.samples import Sample


@pytest.fixture(autouse=True)
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Plots take a third of the time of these tests, which look at none: tests/test_docs_training.py has them drawn."""
    monkeypatch.setattr("training.evaluation.report.can_plot", lambda: False)


@pytest.fixture(scope="session")
def tokenizer() -> Any:
    return make_tokenizer()


@pytest.fixture(scope="session")
def llama() -> Any:
    return make_llama()


@pytest.fixture(scope="session")
def gpt2() -> Any:
    torch.manual_seed(1)
    config = GPT2Config(
        vocab_size=320, n_embd=16, n_layer=2, n_head=2, n_positions=256, eos_token_id=0, bos_token_id=0,
        initializer_range=0.5,
    )  # fmt: skip
    return GPT2LMHeadModel(config).eval()


@pytest.fixture
def samples() -> list[Sample]:
    """Two attributes, eight questions, right and wrong answers of different lengths."""
    made = []
    for number in range(8):
        prompt = f"Q: What is {number}? A:"
        for attribute in ("truthfulness", "civility"):
            made.append(Sample(attribute, prompt, f" {attribute} is good, it is {number}", True, f"g{number}"))
            made.append(Sample(attribute, prompt, f" bad {number}", False, f"g{number}"))
    return made


@pytest.fixture
def here(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory: new, with links to what is in the `world` of the test's module."""
    monkeypatch.chdir(tmp_path)
    for path in world.iterdir():
        (tmp_path / path.name).symlink_to(path)
    return tmp_path
