"""Recipes are options of `matsteer train` that the command line overrides."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM
from typer.testing import CliRunner, Result

from training.cli import app
from training.recipe_files import known

SMALL = {"hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 2, "num_key_value_heads": 1,
         "max_position_embeddings": 128, "bos_token_id": None, "eos_token_id": 0}  # fmt: skip
MODELS = {
    "llama-3.1-8b": (LlamaForCausalLM, LlamaConfig, 32, "14.attn_output"),
    "qwen2.5-7b": (Qwen2ForCausalLM, Qwen2Config, 28, "16.attn_output"),
}


@pytest.fixture
def here(tmp_path: Path) -> Path:
    rows = [
        {
            "prompt": f"Q: {split} {n}? A:",
            "completion": f" {word} {n} {split}",
            "label": label,
            "group": f"{split}{n}",
            "split": split,
        }
        for split in ("train", "dev", "test")
        for n in range(4)
        for label, word in ((True, "good bees"), (False, "bad cows"))
    ]
    (tmp_path / "facts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


def model(folder: Path, recipe: str, tokenizer: Any) -> Path:
    kind, config, depth, _ = MODELS[recipe]
    torch.manual_seed(0)
    kind(config(vocab_size=len(tokenizer), num_hidden_layers=depth, **SMALL)).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    return folder / "model"


def train(here: Path, recipe: str, *arguments: str) -> Result:
    command = ["train", "--recipe", recipe, "--data", f"truth={here / 'facts.jsonl'}", "--out", str(here / "mine"),
               "--device", "cpu", "--threads", "1", "--no-evaluate", *arguments]  # fmt: skip
    return CliRunner().invoke(app, command)


def test_every_recipe_has_a_shape_here() -> None:
    assert known() == sorted(MODELS)


@pytest.mark.parametrize("recipe", sorted(MODELS))
def test_a_recipe_is_run_on_a_model_of_its_shape(here: Path, tokenizer: Any, recipe: str) -> None:
    result = train(here, recipe, "--model", str(model(here, recipe, tokenizer)), "--epochs", "2")
    assert result.exit_code == 0, result.output
    config = json.loads((here / "mine" / "v1" / "config.json").read_text())
    assert [f"{column['layer']}.{column['site']}" for column in config["columns"]] == [MODELS[recipe][3]]
    assert config["base_model"]["num_layers"] == MODELS[recipe][2]
    settings = config["training"]["hyperparameters"]
    assert settings["epochs"] == 2, "the command line wins"
    paper = {"l_pos": 0.9, "l_sparse": 0.9, "l_ortho": 0.1, "batch": 16, "lr": 1e-3, "joint": True, "pool": "mean"}
    assert {name: settings[name] for name in paper} == paper


def test_the_command_line_wins(here: Path, tokenizer: Any) -> None:
    """Also where it names another method, or another preset, which the recipe's settings do not go with."""
    place = ["--model", str(model(here, "qwen2.5-7b", tokenizer))]
    assert train(here, "qwen2.5-7b", *place, "--method", "caa", "--layer", "3", "--site", "residual").exit_code == 0
    config = json.loads((here / "mine" / "v1" / "config.json").read_text())
    assert (config["method"], config["columns"][0]["layer"], config["columns"][0]["site"]) == ("caa", 3, "residual")
    assert train(here, "qwen2.5-7b", *place, "--paper", "--epochs", "1").exit_code == 0
    config = json.loads((here / "mine" / "v2" / "config.json").read_text())
    assert config["training"]["hyperparameters"]["objective"] == "paper"


def test_a_recipe_names_its_model(here: Path) -> None:
    result = train(here, "llama-3.1-8b", "--model", str(here / "none"))
    assert "none" in result.output
    own = here / "own.yaml"
    own.write_text(f"model: {here / 'nowhere'}\nlayer: 1\n")
    assert "nowhere" in train(here, str(own)).output


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "There is no recipe 'gpt-5'; there are llama-3.1-8b, qwen2.5-7b, or a .yaml file"),
        ("layers: 3", "names --layers, which is no option of train"),
        ("- 3", "is no mapping of options"),
        ("a: [", "cannot be read"),
    ],
)
def test_what_is_no_recipe_is_one_sentence(here: Path, content: str | None, message: str) -> None:
    recipe = "gpt-5"
    if content is not None:
        (here / "own.yaml").write_text(content)
        recipe = str(here / "own.yaml")
    result = train(here, recipe)
    assert result.exit_code == 2
    assert message in " ".join(result.output.split())
