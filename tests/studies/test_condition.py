"""CAST beside MAT-Steer: the study on a tiny model, the questions that it asks, and the page that shows it."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from demo.readme import commands
from studies.condition import (
    CAST,
    CONDITION,
    MARKERS,
    METHODS,
    METRICS,
    OPEN,
    READS,
    SAME,
    SIDES,
    TOGETHER,
    chosen,
    command,
    conditional,
    page,
    run,
    write,
)
from studies.style import FACTORS, MEANS
from tests.studies.tiny import ROOT, found_twice
from training.data import Split, load_data, split_samples

PAGE = ROOT / "docs/methods.md"


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Of the study on a tiny model."""
    return found_twice(run, tmp_path_factory.mktemp("condition"), 6, ("--limit", "4"))


def test_the_questions_of_both_sides_are_as_many_and_none_is_in_two_splits() -> None:
    samples = load_data([f"food={ROOT / CONDITION}"], chat=True)
    counts = {
        split: [sum(one.split is split and one.label is label for one in samples) for label in (True, False)]
        for split in Split
    }
    assert counts == {Split.TRAIN: [24, 24], Split.DEV: [16, 16], Split.TEST: [32, 32]}
    assert len({one.prompt for one in samples}) == len(samples)
    tested = {one.prompt for one in samples if one.split is Split.TEST}
    fitted = load_data([f"cheerful={ROOT / TOGETHER}", f"cheerful={ROOT / 'examples/tone/cheerful.jsonl'}"], chat=True)
    assert not tested & {one.prompt for one in fitted}


@pytest.mark.parametrize("style", ["cheerful", "formal"])
def test_a_style_and_the_condition_can_be_trained_on_together(style: str) -> None:
    data = [f"{style}={ROOT}/examples/tone/{style}.jsonl", f"food={ROOT / CONDITION}"]
    assert {one.split for one in split_samples(load_data(data, chat=True), seed=0)} == set(Split)


def test_style_and_condition_in_one_change_gloomy_answers_about_food_alone() -> None:
    samples = load_data([f"cheerful={ROOT / TOGETHER}"], chat=True)
    about_food = {one.prompt for one in load_data([f"food={ROOT / CONDITION}"], chat=True) if one.label}
    assert {one.prompt for one in samples if not one.label} <= about_food
    food = [one for one in samples if one.prompt in about_food]
    assert sum(one.label for one in food) == len(food) / 2 == 36
    assert all(one.label for one in samples if one.prompt not in about_food)


def test_the_condition_is_read_where_it_is_best_on_dev() -> None:
    told = [{"reads": site, "dev F1": f1, "train F1": 1 - f1} for site, f1 in zip("abc", (0.5, 0.9, 0.9), strict=True)]
    assert chosen(told) == "b"


def test_the_study_measures_every_method_on_both_sides(results: Any) -> None:
    assert [one["reads"] for one in results["conditions"]] == [*READS]
    best = max(one["dev F1"] for one in results["conditions"])
    assert next(one for one in results["conditions"] if one["reads"] == results["reads"])["dev F1"] == best
    assert set(results["sides"]) == set(SIDES)
    for side in results["sides"].values():
        assert side["questions"] == 6
        lines = {line["arm"]: line for line in side["arms"]}
        assert len(lines) == 1 + len(FACTORS) * (1 + len(METHODS))
        for name, line in lines.items():
            steered = name != "unsteered"
            assert set(METRICS) - set(line["metrics"]) == (set() if steered else {OPEN, SAME})
            assert bool(line["differences"]) is steered
            assert not {OPEN, SAME} & set(line["differences"])
        for factor in FACTORS:
            assert lines[f"{MEANS} x{factor:g}"]["metrics"][OPEN]["value"] == 1
            gate, same = (lines[f"{CAST} x{factor:g}"]["metrics"][name]["value"] for name in (OPEN, SAME))
            assert same >= 1 - gate
            apart = side["beside"][f"{CAST} x{factor:g} minus {MEANS} x{factor:g}"][OPEN]["value"]
            assert apart == pytest.approx(gate - 1)
        for alike, of in side["exact"].values():
            assert alike == of
        assert sum(of for _, of in side["exact"].values()) == 6 * len(FACTORS)


def test_the_page_shows_what_was_measured(results: Any, tmp_path: Path) -> None:
    said = page(results)
    assert said.count(f"\n| {CAST} x") == len(SIDES) * len(FACTORS)
    assert all(f"| {site} |" in said for site in READS)
    (tmp_path / "condition.json").write_text(json.dumps(results))
    shutil.copy(PAGE, tmp_path / "methods.md")
    write(tmp_path / "condition.json", tmp_path / "methods.md")
    assert said.strip() in (tmp_path / "methods.md").read_text(encoding="utf-8")


def test_the_documents_show_what_is_in_the_results() -> None:
    begin, end = MARKERS
    text, results = PAGE.read_text(encoding="utf-8"), json.loads((ROOT / "docs/results/condition.json").read_text())
    assert text.split(begin)[1].split(end)[0].strip() == page(results).strip()
    told = command(conditional(results["reads"]), "smollm2", "checkpoints/cheerful-food")
    assert " ".join(["matsteer", *told]) in commands(PAGE)
