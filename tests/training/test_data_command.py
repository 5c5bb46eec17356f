"""`matsteer data` shows what is there; a checkpoint is evaluated in the splits that it was trained in."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from tests.training.helpers import make_llama, make_tokenizer
from training.cli import app
from training.data.sources import load_data
from training.data.splits import SPLITS, split_samples

FIXTURES = Path(__file__).parent / "data"


def run(*arguments: str) -> Result:
    return CliRunner().invoke(app, [*arguments])


def test_data_are_counted_and_shown() -> None:
    result = run("data", f"truthfulqa={FIXTURES}/truthfulqa.csv", f"corrigible=caa:{FIXTURES}/caa")
    assert result.exit_code == 0, result.output
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in result.output.splitlines() if "│" in line]
    assert ["corrigible", "test", "3", "3", "2"] in rows
    assert sum(int(row[2]) for row in rows if row[0] == "truthfulness" and row[1] in ("train", "dev", "test")) == 5
    assert ["truthfulness", "negative", "Q: Do goldfish forget everything after three seconds? A:", "Yes."] in rows
    wrong = run("data", "truthfulqa=gone.csv")
    assert wrong.exit_code == 2
    assert "error: gone.csv cannot be read: No such file or directory." in wrong.output


def test_data_are_written_as_conversations_or_texts_that_are_read_as_the_same(tmp_path: Path) -> None:
    known = [
        f"truthfulqa={FIXTURES}/truthfulqa.csv",
        f"bbq={FIXTURES}/bbq",
        f"helpfulness=helpsteer:{FIXTURES}/helpsteer.jsonl",
    ]
    for option, data in ((["--chat"], known), ([], [*known, f"toxigen={FIXTURES}/toxigen_train.csv"])):
        file = tmp_path / "rows.jsonl"
        result = run("data", *data, *option, "--out", str(file))
        assert result.exit_code == 0, result.output
        written = split_samples(load_data(data, chat=bool(option)), seed=0)
        read = split_samples(load_data([f"any={file}"]), seed=9)
        shown = {"prompt": "", "question": ""}  # what people see of a conversation is written in one way
        hidden = shown if option else {}
        assert [replace(one, **hidden) for one in read] == [replace(one, **hidden) for one in written]
        assert ("messages" in json.loads(file.read_text().splitlines()[0])) == bool(option)
        asked = "Do goldfish forget everything after three seconds?"
        assert (f"Q: {asked} A:" in result.output) != bool(option)
        assert asked in result.output


def test_texts_without_a_prompt_are_no_conversations() -> None:
    result = run("data", f"toxigen={FIXTURES}/toxigen_train.csv", "--chat")
    assert result.exit_code == 2
    assert "--chat makes the prompt a user's turn, and this text has no prompt" in result.output


def test_no_seed_moves_a_training_question_into_the_test_split(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    make_llama().save_pretrained("model")
    make_tokenizer().save_pretrained("model")
    rows = [
        {"question": f"What is {n}?", "mc2_targets": {f"It is {n}": 1, f"It was {n * n}": 1, f"It is not {n}": 0}}
        for n in range(30)
    ]
    Path("questions.json").write_text(json.dumps(rows))
    common = ["--model", "model", "--data", "truthfulqa=questions.json"]
    trained = run("train", *common, "--layer", "1", "--method", "caa", "--out", "mine", "--seed", "1")
    assert trained.exit_code == 0, trained.output
    config = json.loads(Path("mine/v1/config.json").read_text())
    assert {key: config["training"]["data"][0][key] for key in ("name", "path", "loader")} == {
        "name": "truthfulqa", "path": "questions.json", "loader": "truthfulqa",
    }  # fmt: skip
    splits = json.loads(Path("mine/v1", SPLITS).read_text())["splits"]["truthfulness"]
    assert {split: len(groups) for split, groups in splits.items()} == {"train": 12, "dev": 3, "test": 15}

    def steered(seed: int) -> dict[str, object]:
        again = run("evaluate", *common, "--checkpoint", "mine", "--seed", str(seed))
        assert again.exit_code == 0, again.output
        _, arm = json.loads(Path("mine/v1/evaluation/evaluation.json").read_text())["arms"]
        metrics: dict[str, object] = arm["metrics"]
        return metrics

    at_training = next(arm for arm in config["evaluation"]["arms"] if arm["arm"] == "steered")["metrics"]
    assert steered(seed=0) == at_training
    Path("mine/v1", SPLITS).unlink()
    assert steered(seed=0) != at_training
    assert steered(seed=1) == at_training
