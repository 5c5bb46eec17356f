"""`train` looks for a place on dev where none is given, says where steering does nothing, extracts what it needs."""

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner, Result

from steering import checkpoint as checkpoints
from tests.training.helpers import make_llama, make_tokenizer
from tests.training.test_judges import classifier
from training.activations.extraction import ExtractionJob
from training.activations.store import stored_samples
from training.cli import app
from training.data import Split
from training.evaluation.evaluator import Evaluator
from training.methods.reps import pairs_of

CAA = ["--method", "caa", "--out", "checkpoints/x"]
DATA = ["--data", "tone=tone.jsonl"]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("world")
    make_llama(num_hidden_layers=2).save_pretrained(folder / "model")
    make_tokenizer().save_pretrained(folder / "model")
    rows = [
        {"prompt": f"Q: What is {n}? A:", "completion": f" {'good' if label else 'bad'} {n}", "label": label}
        for n in range(30)
        for label in (True, False)
    ]
    (folder / "tone.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    statements = [{"text": row["prompt"] + row["completion"], "label": row["label"]} for row in rows]
    (folder / "statements.jsonl").write_text("".join(json.dumps(row) + "\n" for row in statements))
    return folder


def run(command: str, *arguments: str) -> Result:
    return CliRunner().invoke(app, [command, "--model", "model", *arguments])


def done(command: str, *arguments: str) -> str:
    result = run(command, *arguments)
    assert result.exit_code == 0, result.output
    return result.output


def sites_of(version: str = "v1") -> list[str]:
    return [str(column.site) for column in checkpoints.load(Path("checkpoints/x") / version).columns]


def test_the_place_is_the_one_whose_scores_on_dev_are_best(here: Path) -> None:
    said = done("train", *DATA, *CAA)
    points = json.loads((here / "checkpoints/x/.work/search/sweep.json").read_text())
    assert {f"{point['layer']}.{point['site']}" for point in points} == {
        "0.attn_output", "0.residual", "1.attn_output", "1.residual",
    }  # fmt: skip
    best = max(point["score"] for point in points)
    chosen = [p for p in points if f"{p['layer']}.{p['site']}" == sites_of()[0]]
    assert max(point["score"] for point in chosen) >= best - 0.005
    assert f"place: {sites_of()[0]}, multiplier " in said
    searched = "Place and strength were looked for on dev."
    assert searched in (here / "checkpoints/x/v1/README.md").read_text()
    done("train", *DATA, *CAA, "--layer", "1")
    assert searched not in (here / "checkpoints/x/v2/README.md").read_text()
    settings = checkpoints.load(here / "checkpoints/x/v1").config.training["hyperparameters"]
    assert settings.get("strength", 1.0) in (1.0, 2.0)


def test_where_the_largest_multiplier_is_best_larger_ones_are_tried(
    here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("training.evaluation.search.MULTIPLIERS", (0.5,))
    said = done("train", *DATA, *CAA, "--no-evaluate")
    tried = json.loads((here / "checkpoints/x/.work/search/stronger/sweep.json").read_text())
    first = json.loads((here / "checkpoints/x/.work/search/sweep.json").read_text())
    best = max(first, key=lambda point: (-point["shortfall"], point["score"]))
    assert sorted(point["multiplier"] for point in tried) == [0.75, 1.0]
    assert {(point["layer"], point["site"]) for point in tried} == {(best["layer"], best["site"])}
    assert "is best at the largest multiplier: trying 0.75 and 1" in said
    top = max([*first, *tried], key=lambda point: (-point["shortfall"], point["score"]))
    assert f"best of what was tried: {top['layer']}.{top['site']} x{top['multiplier']:g}" in said
    assert checkpoints.load(here / "checkpoints/x/v1").config.training["hyperparameters"]["strength"] in (0.5, 0.75, 1)


def test_a_gain_that_may_be_chance_is_said_to(here: Path) -> None:
    chance = "note: on dev no gain there is more than chance (tone mc2 "
    assert chance in done("train", *DATA, *CAA, "--strength", "1e-6", "--no-evaluate")
    point = json.loads((here / "checkpoints/x/.work/search/best.json").read_text())
    assert point["differences"]["tone mc2"]["low"] <= 0
    said = done("train", *DATA, *CAA, "--out", "checkpoints/y", "--strength", "3", "--no-evaluate")
    swept = (here / "checkpoints/y/.work/search").glob("**/sweep.json")
    points = [point for file in swept for point in json.loads(file.read_text())]
    places = {f"place: {p['layer']}.{p['site']}, multiplier {p['multiplier']:g}:": p for p in points}
    (chosen,) = (p for told, p in places.items() if told in said)
    assert (chance in said) is not (chosen["differences"]["tone mc2"]["low"] > 0)


def test_a_place_that_breaks_the_text_is_said_to(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("training.evaluation.search.MULTIPLIERS", (100.0,))
    said = done("train", *DATA, *CAA, "--layer", "auto", "--no-evaluate")
    assert "warning: every place and multiplier breaks the text beyond a limit, and this one least" in said
    assert "is best at the largest" not in said


@pytest.mark.parametrize(
    ("given", "looked"),
    [
        (["--layer", "1", "--site", "auto"], {"1.attn_output", "1.residual"}),
        (["--layer", "auto", "--site", "mlp_output"], {"0.mlp_output", "1.mlp_output"}),
        (["--site", "residual"], {"0.residual", "1.residual"}),
        (["--layer", "0,1", "--site", "auto"], {"0.attn_output", "0.residual", "1.attn_output", "1.residual"}),
        (["--layer", "1"], set()),
        (["--at", "tone=0.residual"], set()),
    ],
)
def test_what_was_given_is_kept(here: Path, given: list[str], looked: set[str]) -> None:
    done("train", *DATA, *CAA, *given, "--no-evaluate")
    swept = here / "checkpoints/x/.work/search/sweep.json"
    points = json.loads(swept.read_text()) if swept.exists() else []
    assert {f"{point['layer']}.{point['site']}" for point in points} == looked
    assert not looked or set(sites_of()) <= looked


def test_a_strength_that_was_given_is_not_overruled(here: Path) -> None:
    done("train", *DATA, *CAA, "--strength", "0.25", "--no-evaluate")
    assert checkpoints.load(here / "checkpoints/x/v1").config.training["hyperparameters"]["strength"] == 0.25


def test_stored_activations_are_searched_at_their_own_sites(here: Path) -> None:
    done("extract", *DATA, "--layer", "1", "--site", "residual,mlp_output", "--out", "stored")
    done("train", "--activations", "stored", *DATA, *CAA)
    assert sites_of()[0] in ("1.residual", "1.mlp_output")


def test_data_that_cannot_tell_places_apart_are_named_before_the_model_is_loaded(
    here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("training.models.load_base", None)
    result = run("train", "--data", "tone=statements.jsonl", *CAA)
    assert result.exit_code == 2
    assert "--layer is missing, and on dev there is nothing to find a place by" in result.output
    assert "or name a layer and a site" in result.output


def test_steering_that_changes_no_score_is_said_to(here: Path) -> None:
    quiet = done("train", *DATA, *CAA, "--layer", "1", "--strength", "1e-6")
    assert "warning: steering changed no score on dev by half a point (tone mc2 " in quiet
    assert "another place (without --layer and --site one is looked for)" in quiet
    few = done("train", *DATA, *CAA, "--layer", "1", "--site", "residual", "--strength", "30")
    assert "warning: steering changed no score on dev by more than chance (tone mc2 " in few
    assert "tone any_true_per_token +33.3 [0.0, 100.0] of 3" in few, "one question"


@pytest.fixture
def extracted(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many samples each call of `ExtractionJob.run` was for."""
    counts: list[int] = []
    run = ExtractionJob.run

    def counted(self: ExtractionJob, chosen: Any, advance: Any) -> Any:
        counts.append(len(chosen))
        return run(self, chosen, advance)

    monkeypatch.setattr(ExtractionJob, "run", counted)
    return counts


@pytest.mark.parametrize("command", ["train", "sweep"])
def test_a_fit_extracts_nothing_of_test(here: Path, extracted: list[int], command: str) -> None:
    out = CAA if command == "train" else ["--method", "caa", "--out", "swept"]
    done(command, *DATA, *out, "--layer", "1")
    assert extracted == [2 * (12 + 3)]  # 40 % and 10 % of 30 groups
    (stored,) = [*here.glob("checkpoints/x/.work/activations-*"), *here.glob("swept/activations-*")]
    assert {sample.split for sample in stored_samples(stored)} == {Split.TRAIN, Split.DEV}
    if command == "train":
        counts = checkpoints.load(here / "checkpoints/x/v1").config.training["splits"]["counts"]
        assert {one["split"]: one["positive"] for one in counts} == {"train": 12, "dev": 3, "test": 15}


def test_a_limit_holds_for_the_extraction_and_keeps_both_sides_of_a_prompt(here: Path, extracted: list[int]) -> None:
    done("train", *DATA, *CAA, "--layer", "1", "--limit", "4")
    assert extracted == [2 * (4 + 3)]
    (stored,) = here.glob("checkpoints/x/.work/activations-*")
    sides = {(sample.group, sample.label) for sample in stored_samples(stored) if sample.split is Split.TRAIN}
    groups = {group for group, _ in sides}
    assert sides == {(group, label) for group in groups for label in (True, False)}
    assert len(groups) == 4


def test_a_sweep_of_stored_activations_is_that_of_the_data(here: Path, extracted: list[int]) -> None:
    where = ["--method", "caa", "--layer", "0,1", "--site", "residual"]
    done("sweep", *DATA, *where, "--out", "direct")
    (stored,) = here.glob("direct/activations-*")
    extracted.clear()
    done("sweep", "--activations", str(stored), *DATA, *where, "--out", "swept")
    assert extracted == []
    assert (here / "swept/sweep.json").read_text() == (here / "direct/sweep.json").read_text()


def test_a_checkpoint_of_a_sweeps_activations_is_evaluated_on_what_they_were_not_made_of(here: Path) -> None:
    done("sweep", *DATA, "--method", "caa", "--layer", "1", "--out", "swept")
    (stored,) = here.glob("swept/activations-*")
    done("train", "--activations", str(stored), *DATA, *CAA, "--layer", "1", "--seed", "5")
    done("train", *DATA, *CAA, "--layer", "1")
    first, second = (checkpoints.load(here / "checkpoints/x" / version).config for version in ("v1", "v2"))
    metrics = [[arm["metrics"] for arm in config.evaluation["arms"]] for config in (first, second)]
    assert metrics[0] == metrics[1]


def test_threads_are_those_that_were_asked_for(here: Path) -> None:
    before = torch.get_num_threads()
    try:
        done("extract", *DATA, "--layer", "1", "--threads", "3", "--out", "stored")
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)


def test_an_attribute_that_is_off_by_default_is_measured_alone_all_the_same(here: Path) -> None:
    done("train", *DATA, *CAA, "--layer", "1", "--set", "tone=0", "--data", "more=tone.jsonl")
    arms = checkpoints.load(here / "checkpoints/x/v1").config.evaluation["arms"]
    assert {arm["arm"]: arm["attributes"] for arm in arms if arm["arm"] != "unsteered"} == {
        "steered": {"tone": 0.0, "more": 1.0},
        "tone alone": {"tone": 1.0},
        "more alone": {"more": 1.0},
    }


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """The arms of every evaluation."""
    calls: list[list[str]] = []
    evaluate = Evaluator.evaluate

    def counted(self: Evaluator, base: Any, columns: Any, arms: Any, *rest: Any, **options: Any) -> Any:
        calls.append([arm.name for arm in arms])
        return evaluate(self, base, columns, arms, *rest, **options)

    monkeypatch.setattr(Evaluator, "evaluate", counted)
    return calls


def test_the_unsteered_model_is_measured_once_for_all_places(
    here: Path, measured: list[list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("training.evaluation.search.MULTIPLIERS", (0.5,))
    said = done("train", *DATA, *CAA, "--no-evaluate")
    assert "is best at the largest multiplier" in said
    assert measured == [["unsteered"], *[["all 0.5"]] * 4, ["all 0.75", "all 1"]]
    search = here / "checkpoints/x/.work/search"
    stored = [json.loads(path.read_text())["arms"] for path in sorted(search.glob("**/sites/*.json"))]
    assert len(stored) == 5
    assert all(arms[0] == stored[0][0] and arms[0]["metrics"]["tone mc2"]["count"] == 3 for arms in stored)
    for unsteered, *arms in stored:
        for arm in arms:
            apart = arm["metrics"]["tone mc2"]["value"] - unsteered["metrics"]["tone mc2"]["value"]
            assert arm["differences"]["tone mc2"]["value"] == pytest.approx(apart)
            assert arm["perplexity_ratio"] == pytest.approx(arm["perplexity"] / unsteered["perplexity"])
    assert {json.loads(line)["arm"] for line in (search / "unsteered.jsonl").read_text().splitlines()} == {"unsteered"}


ALONE = [*DATA, "--data", "more=tone.jsonl", "--method", "caa", "--layer", "0,1", "--site", "residual,attn_output",
         "--multipliers", "0.5,1", "--alone", "--sites-each", "2", "--damage", "2"]  # fmt: skip


def test_a_sweep_that_is_interrupted_after_its_places_goes_on_there(
    here: Path, measured: list[list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    done("sweep", *ALONE, "--out", "whole")
    whole = list(measured)
    assert (whole[0], whole[-1]) == (["unsteered"], ["unsteered", "together"])
    assert sum("unsteered" in arms for arms in whole) == 2, "once for all stages, and beside what was chosen"
    assert whole[-2][0].startswith("setting"), "strengths together"
    measured.clear()
    evaluate = Evaluator.evaluate

    def stopped(self: Evaluator, *arguments: Any, **options: Any) -> Any:
        if len(measured) == len(whole) - 2:
            raise KeyboardInterrupt
        return evaluate(self, *arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(Evaluator, "evaluate", stopped)
        assert run("sweep", *ALONE, "--out", "cut").exit_code != 0
    before = len(measured)
    done("sweep", *ALONE, "--out", "cut")
    again = measured[before:]
    assert len(again) == 3, "the unsteered model, what was cut, and what was chosen"
    for name in ("places.json", "beside.json", "sweep.json"):
        assert (here / "cut" / name).read_text() == (here / "whole" / name).read_text()


@pytest.mark.parametrize(
    "arguments", [ALONE, [*DATA, "--method", "caa", "--layer", "0,1", "--site", "residual", "--multipliers", "1,2"]]
)
def test_a_sweep_has_one_bar_that_ends_full(here: Path, arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    bars: list[tuple[int, list[float]]] = []

    @contextmanager
    def bar(title: str, total: int, unit: str, **options: Any) -> Iterator[Any]:
        bars.append((total, []))
        yield bars[-1][1].append

    monkeypatch.setattr("training.evaluation.sweep.progress_bar", bar)
    done("sweep", *arguments, "--out", "swept")
    (total, told), *more = bars
    assert not more
    assert sum(told) == pytest.approx(total)
    assert min(told) >= 0


@pytest.mark.parametrize("command", ["train", "sweep"])
def test_labels_that_exclude_each_other_are_no_goal(here: Path, command: str) -> None:
    classifier(here / "classifier")
    judged = [*DATA, "--method", "caa", "--judge", "hf:classifier", "--max-new-tokens", "3", "--out", "checkpoints/x"]
    judged += ["--no-evaluate", "--limit", "2"] if command == "train" else ["--layer", "1", "--limit", "2"]
    refused = run(command, *judged)
    assert refused.exit_code == 2
    told = " ".join(refused.output.split())
    assert "hf:classifier puts every answer under one of neutral, toxic, so that their mean says nothing" in told
    assert "--goal 'tone neutral', or 'not tone neutral'" in told
    done(command, *judged, "--goal", "not tone toxic")
    points = [point for path in here.glob("checkpoints/x/**/sweep.json") for point in json.loads(path.read_text())]
    assert points
    for point in points:
        assert point["score"] == pytest.approx(1 - point["metrics"]["tone toxic"])


def test_a_place_is_looked_for_by_what_the_judge_calls_as_the_attribute(here: Path) -> None:
    (here / "judge_of_tone.py").write_text(
        "def judge(prompt, text):\n    return {'tone': len(text) % 2 == 0, 'long': len(text) > 5}\n"
        "def other(prompt, text):\n    return {'even': len(text) % 2 == 0, 'long': len(text) > 5}\n"
    )
    judged = [*DATA, *CAA, "--no-evaluate", "--max-new-tokens", "3", "--work", "work", "--judge"]
    quiet = done("train", *judged, "judge_of_tone:judge")
    points = json.loads((here / "work/search/sweep.json").read_text())
    assert all(point["score"] == point["metrics"]["tone tone"] for point in points)
    assert "the score is the mean of" not in quiet
    said = done("train", *judged, "judge_of_tone:other")
    assert "the score is the mean of tone even, tone long; --goal names what counts" in said
    assert "the score is" not in done("train", *judged, "judge_of_tone:other", "--goal", "tone long")


def test_a_goal_without_a_search_is_refused(here: Path) -> None:
    result = run("train", *DATA, *CAA, "--layer", "1", "--goal", "tone mc2")
    assert result.exit_code == 2
    assert "--goal is for a place that is looked for" in result.output


@pytest.mark.parametrize(
    ("given", "told"),
    [
        (["--layer", "1"], "another place (without --layer and --site one is looked for), or more (--strength 3), "
         "or --method caa, which says"),
        (["--layer", "1", "--strength", "5"], "or more (--strength 10), or"),
        (["--layer", "1", "--strength", "tone=-2"], "or more (--strength tone=-4), or"),
        (["--layer", "auto"], "Try more (--strength 3), or --method caa"),
        (["--layer", "1", "--method", "caa"], "or --method probe"),
        (["--layer", "0", "--method", "head-ablation", "--heads", "0.1"], "Try --method caa"),
    ],
)  # fmt: skip
def test_what_is_to_be_tried_is_not_what_is_set(
    here: Path, given: list[str], told: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("training.evaluation.search.MULTIPLIERS", (1.0,))
    monkeypatch.setattr("training.evaluation.search.MOVED", 2.0)
    method = [] if "--method" in given else ["--method", "mat", "--epochs", "1"]
    said = done("train", *DATA, *method, *given, "--out", "checkpoints/x", "--damage", "2")
    assert "warning: steering changed no score on dev by half a point (tone " in said
    assert told in said


def test_a_change_that_may_be_chance_is_no_change(here: Path) -> None:
    (here / "judge_by_length.py").write_text(
        "def judge(prompt, text):\n    return {'even': len(text) % 2 == 0, 'short': len(text) < int(prompt)}\n"
    )
    rows = [{"prompt": str(2 * n), "split": split} for split in ("dev", "test") for n in range(12)]
    (here / "asked.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    judged = [*DATA, *CAA, "--layer", "1", "--site", "residual", "--judge", "judge_by_length:judge"]
    judged += ["--prompts", "asked.jsonl", "--max-new-tokens", "4", "--temperature", "0"]
    said = done("train", *judged, "--strength", "3")
    assert "changed no score" not in done("train", *judged, "--strength", "100")
    told = re.search(
        r"changed no score on dev by more than chance \(even ([+-][\d.]+) \[(-[\d.]+), ([\d.]+)\] of 12", said
    )
    assert told, said
    assert float(told[1])


def test_a_setting_of_an_attribute_that_is_off_is_not_wondered_at(here: Path) -> None:
    assert "changed no score" not in done("train", *DATA, *CAA, "--layer", "1", "--set", "tone=0")


@pytest.mark.parametrize("command", ["train", "sweep"])
def test_that_no_damage_is_measured_is_said(here: Path, command: str) -> None:
    where = ["--layer", "1", "--site", "auto", "--no-evaluate"] if command == "train" else ["--layer", "1"]
    told = "what steering breaks was not measured (--damage 0): no limit on the text holds"
    assert told not in done(command, *DATA, *CAA, *where)
    assert told in done(command, *DATA, *CAA, *where, "--damage", "0")
    (swept,) = here.glob("checkpoints/x/**/sweep.md")
    assert f"- {told}" in swept.read_text()


@pytest.mark.parametrize("limit", [2, None])
def test_a_limit_holds_for_a_method_that_is_trained_through_the_model(
    here: Path, limit: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    counts: set[int] = set()

    def counted(samples: Any, name: str, split: Split) -> Any:
        found = pairs_of(samples, name, split)
        counts.add(len(found))
        return found

    monkeypatch.setattr("training.methods.reps.pairs_of", counted)
    few = [] if limit is None else ["--limit", str(limit)]
    done("sweep", *DATA, "--method", "reps", "--steps", "1", "--layer", "1", "--multipliers", "1", "--out", "s", *few)
    assert counts == ({12, 3} if limit is None else {limit})
