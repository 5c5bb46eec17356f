"""One command trains, evaluates and writes a checkpoint that loads; whatever is wrong is one sentence."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner, Result

from steering import checkpoint as checkpoints
from tests.training.helpers import make_llama, make_tokenizer
from training.cli import app
from training.methods.fit import fit

FIT = ["--epochs", "2", "--layer", "1"]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder, two attributes, prompts and a judge."""
    folder = tmp_path_factory.mktemp("world")
    make_llama().save_pretrained(folder / "model")
    make_tokenizer().save_pretrained(folder / "model")
    for attribute in ("truthfulness", "civility"):
        rows = [
            {"prompt": f"Q: What is {n}? A:", "completion": f" {attribute if label else 'bad'} {n}", "label": label,
             "group": n}
            for n in range(20) for label in (True, False)
        ]  # fmt: skip
        (folder / f"{attribute}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    prompts = [{"prompt": f"Q: Where is {n}? A:", "split": ("dev", "test")[n % 2]} for n in range(6)]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in prompts))
    (folder / "oracle_of_tests.py").write_text("def judge(prompt, text):\n    return {'short': len(text) < 10}\n")
    return folder


def run(command: str, *arguments: str, model: str = "model") -> Result:
    return CliRunner().invoke(app, [command, "--model", model, *arguments])


DATA = ["--data", "truthfulness=truthfulness.jsonl", "--data", "civility=civility.jsonl"]
JUDGE = ["--judge", "oracle_of_tests:judge", "--prompts", "prompts.jsonl", "--max-new-tokens", "5"]


@pytest.mark.parametrize("method", ["mat", "caa", "probe"])
def test_train_writes_a_checkpoint_that_loads(here: Path, method: str) -> None:
    settings = FIT if method == "mat" else ["--layer", "1"]
    result = run("train", *DATA, *settings, "--method", method, "--out", "checkpoints/mine")
    assert result.exit_code == 0, result.output
    checkpoint = checkpoints.load(here / "checkpoints/mine/v1")
    config = checkpoint.config
    assert (config.name, config.version, config.method) == ("mine", "v1", method)
    assert checkpoint.attributes == {"truthfulness": 1.0, "civility": 1.0}
    assert config.normalize is (method == "mat")
    assert [str(column.site) for column in checkpoint.columns] == ["1.attn_output"] * 2
    assert {row["split"]: row["positive"] for row in config.training["splits"]["counts"]} == {
        "train": 8, "dev": 2, "test": 10,
    }  # fmt: skip
    assert set(config.training) == {"form", "data", "splits", "hyperparameters", "gates", "seed", "libraries"}
    libraries = {"python", "numpy", "safetensors", "scikit-learn", "torch", "transformers"}
    assert set(config.training["libraries"]) == libraries
    assert config.training["libraries"]["torch"] == torch.__version__
    assert [arm["arm"] for arm in config.evaluation["arms"]] == [
        "unsteered", "steered", "truthfulness alone", "civility alone",
    ]  # fmt: skip
    card = (here / "checkpoints/mine/v1/README.md").read_text()
    for part in ("## Data and splits", "## Gates", "## Evaluation", "| steered |", "## How to use", "## Limits"):
        assert part in card
    assert str(here) not in card
    assert checkpoints.list_checkpoints(here / "checkpoints") == [("mine", "v1", here / "checkpoints/mine/v1")]


def test_train_with_a_judge_strengths_and_a_second_version(here: Path) -> None:
    first = run("train", *DATA, *FIT, "--out", "checkpoints/mine", "--no-evaluate")
    assert first.exit_code == 0, first.output
    assert "4/5 no evaluation" in first.output
    assert "evaluate on test" not in first.output
    options = ["--strength", "2", "--strength", "civility=3", "--set", "truthfulness=1.5"]
    second = run("train", *DATA, *FIT, "--out", "checkpoints/mine", *JUDGE, *options)
    assert second.exit_code == 0, second.output
    plain, scaled = (checkpoints.load(here / "checkpoints/mine" / v).columns for v in ("v1", "v2"))
    assert float(scaled[0].vector.norm() / plain[0].vector.norm()) == pytest.approx(2, rel=1e-5)
    assert float(scaled[1].vector.norm() / plain[1].vector.norm()) == pytest.approx(3, rel=1e-5)
    assert [column.default_multiplier for column in scaled] == [1.5, 1.0]
    assert "short" in second.output
    third = run("train", *DATA, *FIT, "--out", "checkpoints/mine", "--version", "v1")
    assert third.exit_code == 2
    assert "exists already" in third.output
    again = run("train", *DATA, *FIT, "--out", "checkpoints/mine", "--version", "v1", "--overwrite", "--paper")
    assert again.exit_code == 0, again.output
    settings = checkpoints.load(here / "checkpoints/mine/v1").config.training["hyperparameters"]
    assert (settings["objective"], settings["kernel"], settings["epochs"]) == ("paper", "fixed", 2)


def test_a_second_run_reuses_activations_and_fit(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert run("train", *DATA, *FIT, "--out", "checkpoints/mine", "--no-evaluate").exit_code == 0

    def forbidden(*_: Any, **__: Any) -> None:
        raise AssertionError

    monkeypatch.setattr("training.activations.extraction.ExtractionJob.run", forbidden)
    monkeypatch.setattr("training.methods.mat_training.train_step", forbidden)
    assert run("train", *DATA, *FIT, "--out", "checkpoints/mine", "--no-evaluate").exit_code == 0
    first, second = (checkpoints.load(here / "checkpoints/mine" / v) for v in ("v1", "v2"))
    assert first.config.sha256 == second.config.sha256


def test_evaluate_prints_and_stores_the_table(here: Path) -> None:
    assert run("train", *DATA, *FIT, "--out", "checkpoints/mine", "--no-evaluate").exit_code == 0
    result = run(
        "evaluate", "--checkpoint", "checkpoints/mine", *DATA, "--baseline", "--alone", "--multipliers=-1,1",
        "--set", "civility=3",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    stored = json.loads((here / "checkpoints/mine/v1/evaluation/evaluation.json").read_text())
    names = ["unsteered", "-1 x", "steered", "truthfulness alone", "civility alone", "civility 3"]
    assert [arm["arm"] for arm in stored["arms"]] == names
    assert all(name in result.output for name in names)
    strange = run("evaluate", "--checkpoint", "checkpoints/mine", "--data", "kindness=civility.jsonl", "--out", "other")
    assert "the checkpoint does not steer kindness; it steers truthfulness, civility" in strange.output
    assert "| unsteered |" in (here / "checkpoints/mine/v1/evaluation/evaluation.md").read_text()
    judged = run(
        "evaluate", "--checkpoint", "checkpoints/mine/v1", "--baseline", *JUDGE, "--out", "judged", "--split", "dev"
    )
    assert judged.exit_code == 0, judged.output
    assert json.loads((here / "judged/evaluation.json").read_text())["settings"]["prompts"] == 3
    assert len((here / "judged/generations.jsonl").read_text().splitlines()) == 6


def test_sweep_writes_down_the_best(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = [*DATA, "--layer", "0,1", "--site", "attn_output,residual", "--method", "caa", "--out", "swept"]
    result = run("sweep", *arguments, "--multipliers", "0.5,1", *JUDGE)
    assert result.exit_code == 0, result.output
    points = json.loads((here / "swept/sweep.json").read_text())
    assert len(points) == 8
    best = json.loads((here / "swept/best.json").read_text())
    assert best == points[0]
    order = [(-point["shortfall"], point["score"]) for point in points]
    assert order == sorted(order, reverse=True)
    assert f"--layer {best['layer']} --site {best['site']}" in result.output

    fitted: list[Any] = []

    def counted(activations: Any, sites: Any, *arguments: Any, **options: Any) -> Any:
        fitted.extend(map(str, sites))
        return fit(activations, sites, *arguments, **options)

    monkeypatch.setattr("training.evaluation.sweep.fit", counted)
    assert run("sweep", *arguments, "--multipliers", "0.5,1", *JUDGE).exit_code == 0
    assert fitted == [f"{best['layer']}.{best['site']}"], "every site was measured already; the report shows the best"


def test_sweep_finds_a_place_for_each_attribute_and_train_takes_it(here: Path) -> None:
    arguments = [
        *DATA,
        "--layer",
        "0,1",
        "--site",
        "residual",
        "--method",
        "caa",
        "--out",
        "swept",
        "--alone",
        "--sites-each",
        "2",
    ]
    result = run("sweep", *arguments, "--multipliers", "0.5,1")
    assert result.exit_code == 0, result.output
    points = json.loads((here / "swept/sweep.json").read_text())
    assert len(points) == 8
    places = json.loads((here / "swept/places.json").read_text())
    for name in ("truthfulness", "civility"):
        best = next(point for point in points if point["attribute"] == name)
        assert places[name]["sites"][0] == f"{best['layer']}.{best['site']}"
        assert len(set(places[name]["sites"])) == len(places[name]["sites"]) <= 2
        assert places[name]["strength"] > 0
    fit = [*DATA, "--method", "caa", "--places", "swept/places.json", "--out", "checkpoints/placed", "--no-evaluate"]
    assert run("train", *fit).exit_code == 0
    columns = checkpoints.load(here / "checkpoints/placed/v1").columns
    for name, place in places.items():
        assert [str(column.site) for column in columns if column.attribute == name] == sorted(place["sites"])


def test_sweep_shows_what_its_points_are_to_be_compared_with(here: Path) -> None:
    arguments = [*DATA, "--layer", "1", "--site", "residual", "--method", "caa", "--out", "swept", "--alone"]
    result = run("sweep", *arguments, "--multipliers", "0")
    assert result.exit_code == 0, result.output
    told = (here / "swept/sweep.md").read_text().splitlines()
    header, _, cases, clusters, unsteered, together, *points = [
        [cell.strip() for cell in line.strip("|").split("|")] for line in told if line.startswith("|")
    ]
    assert [row[0] for row in (cases, clusters, unsteered, together)] == [
        "cases", "clusters", "unsteered", "together",
    ]  # fmt: skip
    rates = [index for index, name in enumerate(header) if name.endswith(" mc2")]
    assert [cases[index] for index in rates] == [clusters[index] for index in rates] == ["2", "2"]
    assert len(points) == 2
    nothing = [f"{unsteered[index]} (+0.0 [0.0, 0.0])" for index in rates]
    assert all([row[index] for index in rates] == nothing for row in points), "multiplier 0"
    for name in ("truthfulness", "civility"):
        assert f"{name}: no setting scores above the unsteered model" in result.output
        assert any(line.startswith(f"- {name}: no setting scores above") for line in told)
    assert "few cases" in result.output
    assert set(json.loads((here / "swept/beside.json").read_text())) == {"unsteered", "together"}


@pytest.mark.parametrize(
    ("command", "rows", "complaint"),
    [
        ("train", [("a", True), ("b", True)], "Attribute 'truthfulness' has no negative sample at all."),
        ("sweep", [("a", True), ("a", False)], "in train: its samples are of 1 group, and a group is in one split."),
        ("sweep", [(str(n), n % 2 == 0) for n in range(40)], "No prompt has both a positive and a negative completion"),
    ],
)
def test_what_the_data_alone_can_say_is_said_before_the_model_is_loaded(
    here: Path, command: str, rows: list[tuple[str, bool]], complaint: str
) -> None:
    lines = [
        {"prompt": f"Q: {number} {group}?", "completion": " yes", "label": label, "group": group}
        for number, (group, label) in enumerate(rows)
    ]
    (here / "own.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    result = run(command, "--data", "truthfulness=own.jsonl", "--layer", "1", "--out", "out", model="./no-such-model")
    assert result.exit_code == 2
    assert complaint in result.output
    if command == "train" or len(rows) == 2:
        shown = CliRunner().invoke(app, ["data", "truthfulness=own.jsonl"])
        assert "warning: Attribute 'truthfulness' has no " in shown.output


def test_an_out_that_cannot_be_a_folder_is_one_sentence(here: Path) -> None:
    (here / "file").write_text("")
    for command in ("train", "extract"):
        result = run(command, *DATA, "--layer", "1", "--out", "file")
        assert result.exit_code == 2
        assert "error: file" in result.output
        assert "cannot be used" in result.output


def test_sweep_keeps_attributes_apart(here: Path) -> None:
    arguments = [*DATA, "--site", "residual", "--method", "caa", "--out", "swept", "--alone", "--apart"]
    arguments += ["--multipliers", "1", "--max-side-effect", "0.5"]
    result = run("sweep", *arguments, "--layer", "0,1")
    assert result.exit_code == 0, result.output
    places = json.loads((here / "swept/places.json").read_text())
    assert sorted(site for place in places.values() for site in place["sites"]) == ["0.residual", "1.residual"]
    result = run("sweep", *arguments, "--layer", "1")
    assert result.exit_code == 2
    assert "No site is left for civility" in result.output


def test_train_names_a_file_of_places_that_is_not_one(here: Path) -> None:
    (here / "wrong.json").write_text('{"truthfulness": 3}')
    for name in ("wrong.json", "gone.json"):
        result = run("train", *DATA, "--places", name, "--out", "checkpoints/x")
        assert result.exit_code == 2
        assert f"error: {name} does not hold places" in result.output


def test_extract_takes_data_after_one_flag(here: Path) -> None:
    result = run(
        "extract", "--data", "truthfulness=truthfulness.jsonl", "civility=civility.jsonl", "--layer", "0,2",
        "--site", "residual", "--out", "acts",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    manifest = json.loads((here / "acts/manifest.json").read_text())
    assert manifest["sites"] == ["0.residual", "2.residual"]
    assert len(manifest["samples"]) == 80


TRAIN = ("train", "--out", "checkpoints/x")


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ([*TRAIN, "--layer", "1"], "No data was given"),
        ([*TRAIN, *DATA, "--layer", "one"], "--layer must be whole numbers"),
        ([*TRAIN, *DATA, "--layer", "-1"], "--layer must not be negative"),
        ([*TRAIN, *DATA, "--layer", "7"], "7"),
        ([*TRAIN, *DATA, "--layer", "1", "--site", "heads"], "--site must be one of attn_heads"),
        ([*TRAIN, "--data", "x=gone.jsonl", "--layer", "1"], "gone.jsonl cannot be read"),
        ([*TRAIN, "--data", "gone.jsonl", "--layer", "1"], "NAME=PATH"),
        ([*TRAIN, *DATA, *FIT, "--lr", "-1"], "lr must be a positive number"),
        ([*TRAIN, *DATA, *FIT, "--set", "kindness=1"], "no attribute 'kindness'"),
        ([*TRAIN, *DATA, *FIT, "--set", "civility"], "--set must be NAME=NUMBER"),
        ([*TRAIN, *DATA, *FIT, "--set", "civility=nan"], "--set must be NAME=NUMBER with one finite number"),
        ([*TRAIN, *DATA, *FIT, "--prompts", "prompts.jsonl"], "--prompts are what a --judge's answers are"),
        ([*TRAIN, *DATA, *FIT, "--judge", "nowhere:judge", "--prompts", "prompts.jsonl"], "'nowhere:judge' cannot be"),
        ([*TRAIN, *DATA, *FIT, "--judge", "json", "--prompts", "prompts.jsonl"], "named as module:function"),
        ([*TRAIN, *DATA, *FIT, *JUDGE, "--temperature", "nan"], "temperature must be"),
        ([*TRAIN, *DATA, *FIT, "--positions", "some"], "--positions must be one of"),
        ([*TRAIN, *DATA, *FIT, "--device", "tpu!"], "device must be"),
        ([*TRAIN, *DATA, *FIT, "--dtype", "int8"], "dtype must be one of"),
        ([*TRAIN, *DATA, *FIT, "--version", "../up"], "version"),
        (["evaluate", "--checkpoint", "gone", *DATA], "gone"),
        (["evaluate", "--checkpoint", "gone", *DATA, "--split", "valid"], "--split must be"),
        (["sweep", "--out", "s", *DATA, "--layer", "1", "--multipliers", "a"], "--multipliers must be finite numbers"),
        (["sweep", "--out", "s", *DATA, "--layer", "1", "--goal", "x", "--method", "caa"], "There is no metric 'x'"),
        (["sweep", "--out", "s", *DATA, "--layer", "1", "--keep", "x", "--method", "caa"], "--keep must be NAME="),
        (["sweep", "--out", "s", *DATA, "--layer", "1", "--lr", "0"], "lr must be a positive number"),
    ],
)
def test_bad_input_is_one_sentence_and_exit_code_2(here: Path, arguments: list[str], complaint: str) -> None:
    result = run(arguments[0], *arguments[1:])
    assert result.exit_code == 2, result.output
    errors = [line for line in result.output.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert complaint in errors[0]
    assert "Traceback" not in result.output


def test_a_model_that_is_not_there_is_named(here: Path) -> None:
    (here / "empty").mkdir()
    result = run("train", *DATA, *FIT, "--out", "checkpoints/x", model="empty")
    assert result.exit_code == 2
    assert "error: The model 'empty' cannot be loaded" in result.output


def test_another_model_is_refused(here: Path) -> None:
    assert run("train", *DATA, *FIT, "--out", "checkpoints/mine", "--no-evaluate").exit_code == 0
    make_llama(hidden_size=32).save_pretrained(here / "other")
    make_tokenizer().save_pretrained(here / "other")
    result = run("evaluate", "--checkpoint", "checkpoints/mine", *DATA, model="other")
    assert result.exit_code == 2
    assert "hidden_size 16" in result.output


COMMANDS = ["data", "extract", "train", "evaluate", "sweep", "inspect", "import-features", "bake"]


def test_help_lists_every_command_and_loads_no_library(tmp_path: Path) -> None:
    code = (
        "import runpy, sys\n"
        "try: runpy.run_module('training', run_name='__main__')\n"
        "except SystemExit as end: code = end.code\n"
        "heavy = {'torch', 'transformers', 'sklearn', 'datasets', 'numpy', 'matplotlib'} & set(sys.modules)\n"
        "sys.exit(f'{code} {heavy}' if code or heavy else 0)"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run(
        [sys.executable, "-c", code, "--help"], env=environment, cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert re.findall(r"^│ ([a-z][a-z-]+) ", done.stdout, re.MULTILINE) == COMMANDS


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_explains_itself_with_an_example(command: str) -> None:
    result = CliRunner().invoke(app, [command, "--help"])
    assert result.exit_code == 0
    assert f"Example: matsteer {command}" in result.output


def test_an_attribute_can_have_a_place_of_its_own(here: Path) -> None:
    places = ["--at", "truthfulness=0.residual"]
    result = run("train", *DATA, *FIT, *places, "--out", "checkpoints/placed", "--no-evaluate")
    assert result.exit_code == 0, result.output
    columns = checkpoints.load(here / "checkpoints/placed/v1").columns
    assert {column.attribute: str(column.site) for column in columns} == {
        "truthfulness": "0.residual",
        "civility": "1.attn_output",
    }


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--method", "iti"], "--layer is missing: for --method iti no place is looked for"),
        (["--layer", "auto", "--site", "roof"], "--site must be one of"),
        (["--at", "truthfulness=0.residual"], "'civility' has no place"),
        (["--at", "truthfulness=residual", "--layer", "1"], "--at must be NAME=LAYER.SITE"),
        (["--at", "beauty=0.residual", "--layer", "1"], "no attribute 'beauty'"),
    ],
)
def test_a_place_that_is_missing_or_unknown_is_one_sentence(here: Path, arguments: list[str], said: str) -> None:
    result = run("train", *DATA, *arguments, "--out", "checkpoints/placed", "--no-evaluate")
    assert result.exit_code == 2
    assert said in result.output
