"""The tutorial of docs/style.md: its commands are those that are measured, and its figures those that were."""

import json
import re
import shlex
import shutil
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

import server.cli
import training.cli
from demo.readme import commands
from examples.tone.judge import cheerful, formal, held_out
from studies.style import (
    CHEERFUL,
    MARKERS,
    MAT,
    MEANS,
    PREFERS,
    STYLES,
    factors,
    own_folder,
    page,
    run,
    write,
)
from tests.studies.tiny import ROOT, found_twice
from training.data import Split, load_data

PAGE = ROOT / "docs/style.md"
COMMANDS = [shlex.split(command) for command in commands(PAGE)]
FEW = ("--limit", "3", "--damage", "1", "--max-new-tokens", "2")


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Of the study on a tiny model."""
    return found_twice(run, tmp_path_factory.mktemp("style"), 3, FEW)


def test_five_commands_and_the_second_is_what_is_measured() -> None:
    words = [one[1] for one in COMMANDS if one[0] == "matsteer"]
    assert words == ["get", "train", "inspect", "evaluate", "serve"]
    assert COMMANDS[1][1:] == CHEERFUL.command(MAT, "smollm2")
    assert all(style.command(MEANS, "smollm2")[6:8] == ["--method", "caa"] for style in STYLES)


def test_what_is_trained_in_another_way_or_on_other_data_has_another_folder(tmp_path: Path) -> None:
    """So a study neither takes nor overwrites what is there already, a reader's own checkpoint say."""
    pairs = tmp_path / "pairs.jsonl"
    pairs.write_text("one")
    words = ["train", "--data", f"cheerful={pairs}", "--out", str(tmp_path / "cheerful")]
    first = own_folder(words)
    assert first == own_folder(words) != tmp_path / "cheerful"
    assert first.parent == tmp_path
    assert own_folder(words, ("--strength", "2")) != first
    pairs.write_text("two")
    assert own_folder(words) != first


def test_every_option_of_the_tutorial_is_there() -> None:
    for words in COMMANDS:
        if words[0] == "matsteer":
            app = server.cli.app if words[1] in ("get", "serve") else training.cli.app
            said = CliRunner(env={"COLUMNS": "200"}).invoke(app, [words[1], "--help"]).output
            assert {word for word in words if word.startswith("--") and word not in said} == set()
    links = re.findall(r"\]\((?!http)([^)#]+)", PAGE.read_text(encoding="utf-8"))
    assert links
    assert all((PAGE.parent / link).exists() for link in links)


@pytest.mark.parametrize("name", [style.attribute for style in STYLES])
def test_the_pairs_have_both_sides_and_the_judge_tells_them_apart(name: str) -> None:
    samples = load_data([f"{name}={ROOT / f'examples/tone/{name}.jsonl'}"], chat=True)
    sides: dict[tuple[str, bool], Split | None] = {(one.group, one.label): one.split for one in samples}
    assert len(sides) == len(samples) == 216
    assert all(sides[group, True] is sides[group, False] for group, _ in sides)
    right, count = held_out(name)
    assert count == 102
    assert right >= 0.9 * count


def test_what_the_judge_hears() -> None:
    assert cheerful("", "What a wonderful day, let's dance!") == {"cheerful": True, "exclaims": True}
    assert cheerful("", "It will rain, and nobody will come.") == {"cheerful": False, "exclaims": False}
    assert formal("", "It's kinda cool, you know?") == {"formal": False, "contracts": True}
    assert formal("", " ") == {"formal": None, "contracts": None}


def test_the_study_measures_every_method_on_the_same_questions(results: Any) -> None:
    assert set(results) == {style.attribute for style in STYLES}
    for style in STYLES:
        found = results[style.attribute]
        assert set(found["places"]) == set(style.methods)
        assert all(place.startswith(f"{style.layer}.residual") for place in found["places"].values())
        assert found["questions"] == 3
        lines = {line["arm"]: line for line in found["arms"]}
        assert set(lines) == {"unsteered"} | {f"{title} x{x:g}" for title in style.methods for x in factors(title)}
        for name, line in lines.items():
            assert set(line["metrics"]) == set(style.named)
            assert line["metrics"][PREFERS]["count"] == 3
            assert set(line["damage"]) == {"rep-4", "empty", "kl"}
            assert bool(line["differences"]) is (name != "unsteered")
        steered, means, unsteered = (
            lines[name]["metrics"][PREFERS]["value"] for name in (f"{MAT} x1", f"{MEANS} x1", "unsteered")
        )
        assert lines[f"{MAT} x1"]["differences"][PREFERS]["value"] == pytest.approx(steered - unsteered)
        assert found["beside"][f"{MAT} x1 minus {MEANS} x1"][PREFERS]["value"] == pytest.approx(steered - means)


def test_the_page_shows_what_was_measured(results: Any, tmp_path: Path) -> None:
    said = page(results)
    assert said.count("\n| MAT-Steer x2 |") == len(STYLES)
    assert all(f"sounds {style.attribute}" in said for style in STYLES)
    assert "MAT-Steer x1 minus difference in means x1: " in said
    assert "MAT-Steer x1 minus RePS x0.25: " in said
    assert "MAT-Steer x2 minus RePS x0.5: " in said
    assert all(text["question"] in said for found in results.values() for text in found["texts"])
    weakest = {"unsteered", *(f"{title} x{min(factors(title)):g}" for title in CHEERFUL.methods)}
    assert {text["arm"] for text in results["cheerful"]["texts"]} == weakest
    (tmp_path / "style.json").write_text(json.dumps(results))
    shutil.copy(PAGE, tmp_path / "style.md")
    write(tmp_path / "style.json", tmp_path / "style.md")
    assert said.strip() in (tmp_path / "style.md").read_text(encoding="utf-8")


def test_the_tutorial_shows_what_is_in_the_results() -> None:
    begin, end = MARKERS
    results = json.loads((ROOT / "docs/results/style.json").read_text(encoding="utf-8"))
    shown = PAGE.read_text(encoding="utf-8").split(begin)[1].split(end)[0].strip()
    assert shown == page(results).strip()
