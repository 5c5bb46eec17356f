"""The command line."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import typer
from typer.testing import CliRunner

from server.cli import app
from server.config import Settings
from server.errors import StartupError
from server.loading import load_model
from steering.checkpoint import base_model_info
from tests.broken_models import RAN
from tests.server.conftest import columns, free_port, write

runner = CliRunner(env={"COLUMNS": "160", "NO_COLOR": "1", "MATSTEER_THREADS": "1"})


def test_help_is_quick_because_it_does_not_import_torch() -> None:
    code = (
        "import sys; from typer.testing import CliRunner; from server.cli import app;"
        "r = CliRunner().invoke(app, ['--help']); assert r.exit_code == 0; assert 'serve' in r.output;"
        "assert 'torch' not in sys.modules and 'transformers' not in sys.modules"
    )
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run(
        [sys.executable, "-S", "-c", _no_plugins() + code], cwd=root, env=_environment(root), check=False
    )
    assert done.returncode == 0


def _no_plugins() -> str:
    """Commands of other packages may import what they like."""
    return "import importlib.metadata as m; m.entry_points = lambda **k: [];"


def _environment(root: Path) -> dict[str, str]:
    return os.environ | {"PYTHONPATH": os.pathsep.join([str(root), *filter(None, sys.path)])}


@pytest.mark.parametrize(
    "command",
    [
        ["serve"],
        ["generate"],
        ["compare"],
        ["chat"],
        ["bench"],
        ["checkpoints", "list"],
        ["checkpoints", "show"],
        ["checkpoints", "verify"],
    ],
)
def test_every_command_shows_an_example(command: list[str]) -> None:
    result = runner.invoke(app, [*command, "--help"])
    assert result.exit_code == 0
    assert f"Example: matsteer {' '.join(command)}" in result.output


def test_generate_shows_both_arms(model_folder: Path, checkpoints: Path) -> None:
    arguments = [
        "generate",
        "Q: What colour is the sky? A:",
        "--set",
        "kind=1.5",
        "--baseline",
        "--max-new-tokens",
        "5",
    ]
    result = runner.invoke(app, [*arguments, "--model", str(model_folder), "--checkpoints", str(checkpoints)])
    assert result.exit_code == 0, result.output
    output = words(result.output)
    assert "demo@2 kind=1.5; 5 steered tokens" in output
    assert "no steering; 0 steered tokens" in output
    assert "perplexity ratio" in output


def words(output: str) -> str:
    """What stands in panels, without their frames; two panels side by side are read line by line."""
    return " ".join(output.replace("│", " ").split())


ARMS = ["--arm", "plain", "--arm", "kinder:kind=2,true=0.5", "--max-new-tokens", "4"]


def test_compare_shows_every_arm(model_folder: Path, checkpoints: Path) -> None:
    place = ["--model", str(model_folder), "--checkpoints", str(checkpoints), "--checkpoint", "demo@1"]
    result = runner.invoke(app, ["compare", "Q: What", *ARMS, *place], env={"COLUMNS": "200"})
    assert result.exit_code == 0, result.output
    output = words(result.output)
    assert "plain" in output
    assert "kinder" in output
    assert "demo@1 kind=2, demo@1 true=0.5; 4 steered tokens" in output
    assert "KL a token" in output


def test_a_server_is_asked_instead(address: str) -> None:
    wide = {"COLUMNS": "200", "MATSTEER_URL": address}
    result = runner.invoke(app, ["compare", "Q: What", *ARMS], env=wide)
    assert result.exit_code == 0, result.output
    assert "4 steered tokens" in words(result.output)
    result = runner.invoke(app, ["compare", "Q: What", *ARMS, "--checkpoint", "demo@1"], env=wide)
    assert "demo@1 kind=2, demo@1 true=0.5; 4 steered tokens" in words(result.output)
    generate = ["generate", "Q: What", "--set", "kind=2", "--trace", "--baseline", "--checkpoint", "demo@1"]
    result = runner.invoke(app, generate, env=wide | {"FORCE_COLOR": "1"})
    assert result.exit_code == 0, result.output
    assert "moved most by" in result.output
    for arguments, message in (
        ([*generate, "--model", "x"], "the server at --url has its own"),
        (["generate", "a", "--set", "nonsense=1"], "The server refuses: Checkpoint 'demo' has no attribute"),
        (["generate", "a", "--url", "http://127.0.0.1:9"], "There is no mat-steer at http://127.0.0.1:9"),
        (["generate", "a", "--url", "nonsense"], "There is no mat-steer at nonsense"),
    ):
        result = runner.invoke(app, arguments, env=wide)
        assert result.exit_code in (1, 2)
        assert message in words(result.output)


@pytest.mark.parametrize("pair", ["kind", "kind=much", "=1", "kind=nan", "kind=inf"])
def test_a_bad_multiplier_is_refused_before_the_model_is_loaded(pair: str) -> None:
    result = runner.invoke(app, ["generate", "Q:", "--set", pair, "--model", "/nowhere"])
    assert result.exit_code == 2
    assert "NAME=NUMBER" in result.output


def test_a_multiplier_that_is_given_twice_is_refused() -> None:
    result = runner.invoke(app, ["generate", "Q:", "--set", "kind=1", "--set", "kind=2", "--model", "/nowhere"])
    assert result.exit_code == 2
    assert "'kind' twice" in result.output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["serve", "--port", "0"], "Bad setting port"),
        (["serve", "--model", "/no/model", "--port", "FREE"], "There is no model folder '/no/model'"),
        (["serve", "--model", "/no/model", "--host", "no.host.invalid"], "The server cannot listen on no.host.invalid"),
        (
            ["serve", "--chat-template", "/no/file", "--port", "FREE"],
            "The chat template '/no/file' cannot be read: No such file or directory. (--chat-template",
        ),
        (["generate", "Q:", "--model", "/no/model"], "There is no model folder '/no/model'"),
        (["checkpoints", "show", "nowhere"], "There is no checkpoint 'nowhere'"),
        (["checkpoints", "show", "demo@"], "There is no checkpoint 'demo@'"),
    ],
)
def test_what_cannot_start_says_why_in_one_sentence(arguments: list[str], message: str) -> None:
    result = runner.invoke(app, [str(free_port()) if word == "FREE" else word for word in arguments])
    assert result.exit_code == 1
    assert result.output.startswith(f"matsteer: {message}")
    assert len(result.output.splitlines()) == 1


def test_serve_and_generate_run_a_folders_code_where_it_is_trusted_alone(
    model_with_code: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def opened(settings: Settings) -> None:
        raise StartupError(f"opened a {type(load_model(settings).model).__name__}")

    monkeypatch.setattr("server.app.create_app", opened)
    serve = ["serve", "--model", str(model_with_code), "--port", str(free_port()), "--device", "cpu"]
    for arguments in (serve, ["generate", "Q:", "--model", str(model_with_code)]):
        result = runner.invoke(app, arguments, input="y\n" * 9)
        assert result.exit_code == 1
        assert "which is run only with --trust-remote-code" in result.output
        assert not Path(RAN).exists()
    assert "opened a MysteryModel" in runner.invoke(app, [*serve, "--trust-remote-code"]).output
    assert Path(RAN).exists()


def test_an_import_reads_a_config_without_running_the_code_beside_it(model_with_code: Path, tmp_path: Path) -> None:
    torch.save({1: torch.ones(16)}, tmp_path / "x.pt")
    arguments = ["checkpoints", "import", str(tmp_path / "x.pt"), "--model", str(model_with_code), "--out", "mine"]
    for trusted in (False, True):
        environment = {"MATSTEER_TRUST_REMOTE_CODE": "true"} if trusted else {}
        result = runner.invoke(app, [*arguments, "--site", "residual"], input="y\n" * 9, env=environment)
        assert ("which is run only with --trust-remote-code" in result.output) is not trusted
        assert Path(RAN).exists() is trusted


def test_an_unknown_attribute_is_one_sentence(model_folder: Path, checkpoints: Path) -> None:
    arguments = ["generate", "Q:", "--set", "funny=1", "--model", str(model_folder), "--checkpoints", str(checkpoints)]
    result = runner.invoke(app, arguments)
    assert result.exit_code == 1
    assert "it has kind, true, fair" in result.output


def test_checkpoints_are_listed_shown_and_verified(model_folder: Path, checkpoints: Path) -> None:
    place = ["--checkpoints", str(checkpoints)]
    listed = runner.invoke(app, ["checkpoints", "list", *place]).output
    assert all(part in listed for part in ("demo@2", "kind 1", "cannot be loaded"))
    shown = runner.invoke(app, ["checkpoints", "show", "demo", *place]).output
    assert all(part in shown for part in ("demo@2", "1.attn_output", "# demo"))
    sound = runner.invoke(app, ["checkpoints", "verify", "demo@1", *place, "--model", str(model_folder)])
    assert (sound.exit_code, sound.output) == (0, "demo@1: sound\n")
    foreign = runner.invoke(app, ["checkpoints", "verify", "foreign", *place, "--model", str(model_folder)])
    assert foreign.exit_code == 1
    assert "hidden_size" in foreign.output
    assert runner.invoke(app, ["checkpoints", "verify", *place]).exit_code == 1


def test_what_a_checkpoint_says_is_printed_as_it_stands(model: Any, tmp_path: Path) -> None:
    info = base_model_info(model, "org/[bold]model[/]", None)
    folder = write(tmp_path, "demo", "1", info, columns(32, seed=1))
    (folder / "README.md").write_bytes(b"caf\xe9 [/red]")
    listed = runner.invoke(app, ["checkpoints", "list", "--checkpoints", str(tmp_path)])
    assert "org/[bold]model[/]" in listed.output
    shown = runner.invoke(app, ["checkpoints", "show", "demo", "--checkpoints", str(tmp_path)])
    assert "caf\N{REPLACEMENT CHARACTER} [/red]" in shown.output


def test_other_packages_add_commands(monkeypatch: pytest.MonkeyPatch) -> None:
    other = typer.Typer()

    @other.command()
    def train() -> None:
        """Train."""
        print("training")

    @other.command()
    def sweep() -> None:
        """Sweep."""

    entry = SimpleNamespace(name="training", load=lambda: other)
    monkeypatch.setattr("server.cli.entry_points", lambda group: [entry])
    assert "sweep" in runner.invoke(app, ["--help"]).output
    assert runner.invoke(app, ["train"]).output == "training\n"


def test_verify_names_a_folder_that_is_incomplete(checkpoints: Path, tmp_path: Path) -> None:
    shutil.copytree(checkpoints / "demo" / "1", tmp_path / "mine" / "1")
    place = ["--checkpoints", str(tmp_path)]
    assert runner.invoke(app, ["checkpoints", "verify", *place]).exit_code == 0
    (tmp_path / "mine" / "1" / "config.json").unlink()
    found = runner.invoke(app, ["checkpoints", "verify", *place])
    assert found.exit_code == 1
    assert "mine@1: incomplete, there is no config.json" in found.output


def test_the_version_is_shown() -> None:
    result = runner.invoke(app, ["--version"])
    assert result.exit_code == 0
    assert re.fullmatch(r"mat-steer \d+\.\d+\.\d+ \(Python 3\.\d+\.\S+, torch \S+, transformers \S+\)\n", result.output)


def test_every_command_warns_of_a_variable_that_is_no_setting(checkpoints: Path) -> None:
    listing = ["checkpoints", "list", "--checkpoints", str(checkpoints)]
    result = runner.invoke(app, listing, env={"MATSTEER_CHEKPOINTS": "elsewhere"})
    assert result.exit_code == 0
    assert result.stderr == (
        "warning: MATSTEER_CHEKPOINTS is in the environment, but no setting has that name. "
        "Is MATSTEER_CHECKPOINTS meant?\n"
    )


def test_a_variable_that_is_no_setting_is_warned_of_at_the_start() -> None:
    command = [sys.executable, "-m", "server.cli", "serve", "--model", "/no/model", "--port", str(free_port())]
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run(command, cwd=root, env=os.environ | {"MATSTEER_PROT": "9000"}, capture_output=True, text=True)
    assert "MATSTEER_PROT is in the environment, but no setting has that name. Is MATSTEER_PORT meant?" in done.stderr
