"""`matsteer train` and `sweep` with every method: its own defaults, a readable card, one sentence for misuse."""

import json
import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner, Result

from steering import Gate, Positions, Site, SiteKind
from steering import checkpoint as checkpoints
from tests.training.helpers import make_llama, make_tokenizer
from tests.training.planted import unit_vector, with_directions
from training.cli import app
from training.data.samples import Split
from training.methods import METHODS, base
from training.methods.fit import Recipe, fit
from training.options import MethodOptions, parse_sites, users_of


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder, one attribute, prompts and a judge."""
    folder = tmp_path_factory.mktemp("world")
    make_llama().save_pretrained(folder / "model")
    make_tokenizer().save_pretrained(folder / "model")
    rows = [
        {"prompt": f"Q: What is {n}? A:", "completion": f" {word} {n}", "label": label, "group": n}
        for n in range(30)
        for label, word in ((True, "good bees"), (False, "bad cows"))
    ]
    (folder / "facts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "prompts.jsonl").write_text('{"prompt": "Q: Where? A:"}\n')
    (folder / "oracle_of_methods.py").write_text("def judge(prompt, text):\n    return {'short': len(text) < 10}\n")
    return folder


SITE = Site(1, SiteKind.RESIDUAL)
DATA = ["--data", "truth=facts.jsonl"]


def run(command: str, *arguments: str) -> Result:
    return CliRunner().invoke(app, [command, "--model", "model", *arguments])


def train(*arguments: str) -> checkpoints.Checkpoint:
    result = run("train", "--out", "checkpoints/mine", "--no-evaluate", *arguments)
    assert result.exit_code == 0, result.output
    return checkpoints.load(Path("checkpoints/mine/v1"))


@pytest.mark.parametrize(
    ("method", "arguments", "sites"),
    [
        ("iti", ["--layer", "0-2", "--top", "3"], "attn_heads"),
        ("iti", ["--layer", "0-2", "--direction", "probe", "--penalty", "10"], "attn_heads"),
        ("ablation", ["--layer", "0-2", "--source", "1.mlp_output"], "residual"),
        ("ablation", ["--layer", "1", "--site", "mlp_output", "--positions", "all"], "mlp_output"),
        ("head-ablation", ["--heads", "0.1,2.3"], "attn_heads"),
        ("head-ablation", ["--layer", "0-1", "--top", "2", "--fill", "mean"], "attn_heads"),
        ("control", ["--layer", "0-2", "--direction", "pca", "--coefficient", "1=0.5"], "residual"),
        ("control", ["--layer", "0,2", "--scale", "norm", "--normalize"], "residual"),
    ],
)
def test_train_knows_where_each_method_acts(here: Path, method: str, arguments: list[str], sites: str) -> None:
    checkpoint = train(*DATA, "--method", method, *arguments)
    config = checkpoint.config
    assert config.method == method
    assert {column.site.kind.value for column in checkpoint.columns} == {sites}
    assert config.training["hyperparameters"]["pool"] == ("mean" if method == "head-ablation" else "last")
    assert checkpoint.attributes == {"truth": 15.0 if method == "iti" else 1.0}
    assert config.positions is (Positions.ALL if "all" in arguments else Positions.GENERATED)
    assert config.normalize is ("--normalize" in arguments)
    card = (here / "checkpoints/mine/v1/README.md").read_text()
    assert METHODS[method].title in card
    linear = method in ("ablation", "head-ablation")
    assert {column.gate for column in checkpoint.columns} == {Gate.LINEAR if linear else Gate.CONSTANT}
    assert ("## Gates" in card) is not linear


def test_a_head_is_one_line_of_the_card_whatever_its_width(here: Path) -> None:
    checkpoint = train(*DATA, "--method", "head-ablation", "--heads", "1.2")
    assert len(checkpoint.columns) == 4
    card = (here / "checkpoints/mine/v1/README.md").read_text()
    assert card.count("| truth | 1.attn_heads | linear | 4 of 1.000 to 1.000 |") == 1


def test_the_accuracy_of_every_head_stays_in_the_work_folder(here: Path) -> None:
    train(*DATA, "--method", "iti", "--layer", "0-2", "--work", "work")
    (path,) = (here / "work").glob("fit-*/heads.json")
    found = json.loads(path.read_text())["truth"]
    assert len(found) == 12
    assert all(0 <= accuracy <= 1 for accuracy in found.values())


def test_a_pair_of_prompts_is_a_checkpoint_without_data(here: Path) -> None:
    result = run("train", "--method", "actadd", "--pair", "Love", "Hate", "--layer", "1", "--out", "checkpoints/mine")
    assert result.exit_code == 0, result.output
    assert "not evaluated" in result.output
    checkpoint = checkpoints.load(here / "checkpoints/mine/v1")
    assert checkpoint.attributes == {"Love": 1.0}
    assert [str(column.site) for column in checkpoint.columns] == ["1.residual"]
    assert bool(checkpoint.columns[0].vector.any())
    settings = checkpoint.config.training["hyperparameters"]
    assert (settings["positive"], settings["negative"], settings["pool"]) == ("Love", "Hate", "last")
    assert "| data | file |" not in (here / "checkpoints/mine/v1/README.md").read_text()
    named = train("--method", "actadd", "--pair", "Love", "Hate", "--attribute", "warmth", "--layer", "1",
                  "--version", "v1", "--overwrite", "--set", "warmth=3")  # fmt: skip
    assert named.attributes == {"warmth": 3.0}
    assert torch.equal(named.columns[0].vector, checkpoint.columns[0].vector)


def test_a_pair_is_swept_with_a_judge(here: Path) -> None:
    result = run(
        "sweep", "--method", "actadd", "--pair", "Love", "Hate", "--layer", "0,1", "--multipliers", "1,4", "--out",
        "swept", "--judge", "oracle_of_methods:judge", "--prompts", "prompts.jsonl", "--max-new-tokens", "4",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    assert len(json.loads((here / "swept/sweep.json").read_text())) == 4


def test_a_sweep_fits_each_layer_by_itself(here: Path) -> None:
    arguments = ["--method", "iti", "--layer", "0,1", "--multipliers", "5", "--limit", "2", "--out", "swept"]
    result = run("sweep", *DATA, *arguments, "--top", "2")
    assert result.exit_code == 0, result.output
    points = json.loads((here / "swept/sweep.json").read_text())
    assert {(point["layer"], point["site"]) for point in points} == {(0, "attn_heads"), (1, "attn_heads")}


TRAIN = ["train", "--out", "checkpoints/x", "--layer", "1"]
SWEEP = ["sweep", "--out", "s", "--layer", "1"]


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ([*TRAIN, *DATA, "--method", "caa", "--top", "3"], "--top is for --method iti or head-ablation, not for caa"),
        ([*TRAIN, *DATA, "--method", "caa", "--lr", "1"], "--lr is for --method mat, not for caa"),
        ([*TRAIN, *DATA, "--method", "iti", "--paper"], "--paper is for --method mat, not for iti"),
        ([*TRAIN, *DATA, "--method", "iti", "--gate-init", "probe"], "--gate-init is for --method mat"),
        ([*TRAIN, *DATA, "--penalty", "1"], "--penalty is for --method probe or iti or head-ablation, not for mat"),
        ([*TRAIN, *DATA, "--method", "ablation", "--normalize"], "--normalize is for --method mat or caa"),
        ([*TRAIN, *DATA, "--method", "ablation", "--pair", "a", "b"], "--pair is for --method actadd"),
        ([*TRAIN, *DATA, "--method", "ablation", "--source", "x"], "--source must be LAYER.SITE"),
        ([*TRAIN, *DATA, "--method", "ablation", "--source", "9.residual"], "there is no layer 9"),
        ([*TRAIN, *DATA, "--method", "iti", "--site", "residual"], "iti acts on attn_heads"),
        ([*TRAIN, *DATA, "--method", "iti", "--direction", "pca"], "mean or probe, not pca"),
        ([*TRAIN, *DATA, "--method", "iti", "--top", "5"], "5 best heads were asked for, but there are 4"),
        ([*TRAIN, *DATA, "--method", "control", "--direction", "probe"], "mean or pca, not probe"),
        ([*TRAIN, *DATA, "--method", "control", "--coefficient", "x=1"], "--coefficient must be LAYER=NUMBER"),
        ([*TRAIN, *DATA, "--method", "control", "--coefficient", "2=1"], "names layer 2; the layers are 1"),
        ([*TRAIN, *DATA, "--method", "head-ablation"], "needs the heads, or how many"),
        ([*TRAIN, *DATA, "--method", "head-ablation", "--heads", "1"], "written LAYER.HEAD"),
        ([*TRAIN, *DATA, "--method", "head-ablation", "--heads", "1.9"], "There is no head 1.9"),
        ([*TRAIN, *DATA, "--method", "head-ablation", "--heads", "2.1"], "Head 2.1 was named"),
        ([*TRAIN, "--method", "actadd"], "--method actadd needs --pair"),
        ([*TRAIN, "--method", "actadd", "--pair", "a", "a"], "there is no difference"),
        ([*TRAIN, *DATA, "--method", "actadd", "--pair", "a", "b"], "give no --data"),
        ([*TRAIN, "--method", "actadd", "--pair", "a", "b", "--set", "c=1"], "no attribute 'c'"),
        ([*TRAIN[:-2], "--method", "actadd", "--pair", "a", "b"], "--layer is missing"),
        ([*SWEEP, *DATA, "--method", "control", "--coefficient", "1=2"], "a sweep fits one place at a time"),
        ([*SWEEP, *DATA, "--method", "head-ablation", "--heads", "1.2"], "a sweep fits one place at a time"),
        ([*SWEEP, "--method", "actadd", "--pair", "a", "b"], "No prompt has both"),
        (["train", "--out", "x", *DATA, "--layer", "5-3"], "--layer must count upwards"),
    ],
)
def test_misuse_is_one_sentence(here: Path, arguments: list[str], complaint: str) -> None:
    result = run(*arguments)
    assert result.exit_code == 2, result.output
    (error,) = [line for line in result.output.splitlines() if line.startswith("error: ")]
    assert complaint in error


def test_every_option_says_which_methods_use_it() -> None:
    help_text = CliRunner(env={"COLUMNS": "250"}).invoke(app, ["train", "--help"]).output
    for method in METHODS.values():
        assert f"{method.name}: {method.summary}" in " ".join(help_text.replace("│", " ").split())
        for name in (*method.presets, *method.options()):
            (line,) = [line for line in help_text.splitlines() if f"--{name.replace('_', '-')} " in line]
            assert method is METHODS["mat"] or method.name in line.split("  ", 1)[1]
            assert users_of(name).count(method.name) == 1


def test_an_option_of_several_methods_is_given_alike_to_all() -> None:
    kinds: dict[str, set[tuple[str, ...]]] = {}
    for method in METHODS.values():
        for name, (field, option) in method.options().items():
            kind = (str(option.type or field.type), str(option.metavar), str(option.min))
            kinds.setdefault(name, set()).add(kind)
    assert {name for name, found in kinds.items() if len(found) > 1} == set()


def test_layers_can_be_ranges() -> None:
    assert [site.layer for site in parse_sites("8,10-12,9-9", "residual")] == [8, 10, 11, 12, 9]


COMMANDS = re.findall(r"^matsteer (.*)$", (Path(__file__).parents[2] / "docs/methods.md").read_text(), re.MULTILINE)


@pytest.mark.parametrize("command", COMMANDS)
def test_the_commands_of_the_docs_can_be_typed(here: Path, command: str) -> None:
    """Up to the model, of which there is an empty folder."""
    (here / "MODEL").mkdir()
    result = CliRunner().invoke(app, shlex.split(command))
    assert result.exit_code == 2
    # The options were understood: what is missing are the data, which are read first, or the model.
    assert re.search(r"error: (The model 'MODEL' cannot be loaded|\S+\.jsonl cannot be read: No such)", result.output)


def test_the_docs_have_every_method_as_it_is() -> None:
    text = (Path(__file__).parents[2] / "docs/methods.md").read_text()
    assert {command.split("--method ")[1].split()[0] for command in COMMANDS} == set(METHODS)
    for name, method in METHODS.items():
        (row,) = re.findall(rf"^\| `{name}` \|(.*)\|$", text, re.MULTILINE)
        _, site, _, norm, multiplier, _ = (cell.strip() for cell in row.split("|"))
        assert site == f"`{method.site}`"
        assert norm == ("yes" if method.keep_norm else "no")
        assert float(multiplier.split()[0]) == method.multiplier


def test_the_method_of_the_docs_is_a_method(monkeypatch: pytest.MonkeyPatch) -> None:
    text = (Path(__file__).parents[2] / "docs/methods.md").read_text()
    (code,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    names: dict[str, Any] = dict(vars(base)) | {"dataclass": dataclass, "Split": Split, "Sequence": Sequence}
    exec(code, names)
    monkeypatch.setitem(METHODS, "median", names["MEDIAN"])
    planted = with_directions({SITE: unit_vector(16)})
    (whole,) = fit(planted, [SITE], Recipe(names["MEDIAN"].configure({})))
    (half,) = fit(planted, [SITE], Recipe(names["MEDIAN"].configure({"shrink": 0.5})))
    assert float(torch.cosine_similarity(whole.vector, unit_vector(16), dim=0)) > 0.9
    torch.testing.assert_close(half.vector, 0.5 * whole.vector)
    parameters = {parameter.name: parameter for parameter in MethodOptions.parameters()}
    assert "median: factor on the vector" in parameters["shrink"].annotation.__metadata__[0].help
