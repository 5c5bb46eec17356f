"""A training command opens models as carefully as the server: one sentence, and no code that nobody asked for."""

import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from tests.broken_models import RAN
from training.cli import app
from training.errors import TrainingError
from training.models import load_base, load_config


def test_what_is_no_usable_model_is_one_sentence(broken_model: tuple[str, str]) -> None:
    id, said = broken_model
    with pytest.raises(TrainingError, match=said) as caught:
        load_base(id, device="cpu")
    assert "\n" not in str(caught.value)


def rows(folder: Path) -> str:
    lines = [
        f'{{"prompt": "Q: What is {n}? A:", "completion": " {answer} {n}", "label": {label}}}\n'
        for n in range(8)
        for answer, label in (("good", "true"), ("bad", "false"))
    ]
    path = folder / "rows.jsonl"
    path.write_text("".join(lines))
    return f"tone={path}"


COMMANDS = {
    "extract": ["--layer", "1", "--out", "acts"],
    "train": ["--layer", "1", "--method", "caa", "--out", "checkpoints/x", "--no-evaluate"],
    "sweep": ["--layer", "1", "--method", "caa", "--multipliers", "1", "--out", "swept"],
}


@pytest.mark.parametrize("command", COMMANDS)
def test_no_command_runs_a_folders_code_unasked(command: str, model_with_code: Path, tmp_path: Path) -> None:
    arguments = [command, "--model", str(model_with_code), "--data", rows(tmp_path), *COMMANDS[command]]
    result = CliRunner().invoke(app, arguments, input="y\n" * 9)
    assert result.exit_code == 2
    assert "which is run only with --trust-remote-code" in result.output
    assert "[y/N]" not in result.output
    assert not Path(RAN).exists()


@pytest.mark.parametrize("asked", ["option", "environment"])
def test_a_folders_code_runs_where_it_is_trusted(
    asked: str, model_with_code: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if asked == "environment":
        monkeypatch.setenv("MATSTEER_TRUST_REMOTE_CODE", "true")
    trusted = ["--trust-remote-code"] if asked == "option" else []
    arguments = ["--model", str(model_with_code), "--data", rows(tmp_path), *COMMANDS["extract"], *trusted]
    result = CliRunner().invoke(app, ["extract", *arguments])
    assert result.exit_code == 0, result.output
    assert Path(RAN).exists()


def test_a_config_alone_is_read_as_carefully(model_with_code: Path, tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match="only with --trust-remote-code"):
        load_config(str(model_with_code))
    assert not Path(RAN).exists()
    assert sys.stdin.read() == "y\n" * 9
    assert load_config(str(model_with_code), trust_remote_code=True).model_type == "mystery"
