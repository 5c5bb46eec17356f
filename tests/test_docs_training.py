"""The commands of docs/training.md, run one after the other on files as the page describes them."""

import json
import re
import shlex
from pathlib import Path

import httpx
import pytest
import torch
from typer.testing import CliRunner

import training.cli
from demo.readme import commands, requests, served
from steering.checkpoint import load
from tests.training.helpers import make_llama, make_tokenizer

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs/training.md"
MODEL = "Qwen/Qwen2.5-0.5B-Instruct"
COMMANDS = [shlex.split(command.replace(MODEL, "model")) for command in commands(PAGE)]


def block(language: str, number: int) -> str:
    return re.findall(rf"```{language}\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)[number]


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The files that the page shows, with more questions, and a tiny model as deep as its layers ask for."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("MATSTEER_THREADS", "1")  # tiny models only lose by more
    make_llama(num_hidden_layers=17).save_pretrained("model")
    make_tokenizer().save_pretrained("model")
    for number, name in enumerate(("facts.jsonl", "tone.jsonl")):
        rows = block("json", number)
        Path(name).write_text(
            "".join(rows.replace("Hamlet", f"play {n}").replace('"hamlet"', f'"play {n}"') for n in range(12))
        )
    Path("prompts.jsonl").write_text(block("json", 2))
    Path("verdicts.py").write_text(block("python", 0))
    return tmp_path


def run(words: list[str]) -> str:
    result = CliRunner().invoke(training.cli.app, words)
    assert result.exit_code == 0, (words, result.output)
    return result.output


@pytest.mark.timeout(400)  # it trains, and a server starts
def test_five_commands_lead_from_texts_to_steered_answers(here: Path) -> None:
    five = [words[1:] for words in COMMANDS if words[0] == "matsteer"][:5]
    assert [words[0] for words in five] == ["data", "sweep", "train", "evaluate", "serve"]

    shown = run(five[0])
    assert "facts" not in shown
    assert all(word in shown for word in ("truthfulness", "civility", "train", "dev", "test", "negative"))

    swept = run(five[1])
    assert "now: matsteer train --places runs/sweep/places.json" in swept
    assert "civility mc2" in Path("runs/sweep/sweep.md").read_text()
    assert set(json.loads(Path("runs/sweep/places.json").read_text())) == {"truthfulness", "civility"}

    trained = run(five[2])
    assert all(row in trained for row in ("5/5 checkpoint", "unsteered", "steered", "truthfulness alone", "mc2"))
    assert "## Gates" in Path("checkpoints/mine/v1/README.md").read_text()

    measured = run(five[3])
    assert all(column in measured for column in ("polite", "perplexity", "ratio"))
    assert len(Path("checkpoints/mine/v1/evaluation/generations.jsonl").read_text().splitlines()) == 6

    plots = [*Path("runs/sweep").glob("*.png"), *Path("checkpoints/mine/v1/evaluation").glob("*.png")]
    assert len(plots) == 2
    assert all(plot.read_bytes().startswith(b"\x89PNG") for plot in plots)

    with served(*five[4][1:]) as url:
        (request,) = requests(PAGE)
        answer = httpx.post(url + request.path, json=request.body, timeout=60).raise_for_status().json()
    steering = answer["results"][0]["steering"]
    assert steering["checkpoint"] == "mine"
    assert steering["steered_tokens"] > 0
    assert answer["baseline"][0]["steering"]["steered_tokens"] == 0
    assert "perplexity_ratio" in json.dumps(answer["comparison"])

    (found,) = map(str, Path("runs/sweep").glob("activations-*"))
    again = [word for word in five[2] if "=" not in word and word != "--data"]
    run([*again, "--activations", found, "--no-evaluate"])
    first, second = (load(Path("checkpoints/mine") / version).columns for version in ("v1", "v2"))
    assert all(torch.equal(one.vector, other.vector) for one, other in zip(first, second, strict=True))


def test_activations_are_extracted_once_and_fitted_by_themselves(here: Path) -> None:
    launched, fitted = COMMANDS[-2:]
    assert launched[:2] == ["accelerate", "launch"]
    assert "activations at 8.residual" in run(launched[launched.index("matsteer") + 1 :])
    assert "truth-caa@v1 on test" in run(fitted[1:])
    assert Path("checkpoints/truth-caa/v1/config.json").is_file()


def test_the_page_names_settings_and_files_that_exist() -> None:
    text = PAGE.read_text(encoding="utf-8")
    options = set(re.findall(r"(--[a-z][a-z-]+)", text))
    helps = "".join(
        CliRunner(env={"COLUMNS": "200"}).invoke(training.cli.app, [name, "--help"]).output
        for name in ("sweep", "train", "evaluate", "extract", "inspect")
    )
    elsewhere = {"--checkpoints", "--num_processes", "--nproc-per-node", "--num", "--no", "--no-python"}
    assert {option for option in options - elsewhere if option not in helps} == set()
    links = re.findall(r"\]\((?!http)([^)#]+)", text)
    assert links
    assert all((PAGE.parent / link).exists() for link in links)
