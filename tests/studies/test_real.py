"""The study of `make reproduce-real`, on a tiny model and a handful of questions."""

import csv
import json
import re
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import studies.study as study_module
from studies.real import best_of, compact, further, in_context, methods, run, sources, try_out
from studies.real_results import CLAIMS, MARKERS, MEANS_THERE, METRICS, SETS, page, statement, summary, verdict, write
from studies.study import Sizes, Study, Variant, part_of
from tests.training.helpers import make_llama, make_tokenizer
from training.activations.store import Activations
from training.data.samples import Sample, Split
from training.data.sources import load_data
from training.data.splits import split_samples
from training.evaluation.results import Estimate
from training.methods.fit import Recipe
from training.methods.mat import MatConfig
from training.models import Base

ROOT = Path(__file__).parents[2]
SIZES = Sizes(fit=24, dev=1, test=2, skipped=1, part=1, answers=1, test_answers=1, epochs=1)


def write_data(folder: Path) -> None:
    """The three data sets as they are published, small."""
    for name in ("truthfulqa", "toxigen", "bbq"):
        (folder / name).mkdir(parents=True)
    asked = [
        {
            "question": f"What is number {n}?",
            "mc1_targets": {f"It is {n}.": 1, f"It is {n + 1}.": 0},
            "mc2_targets": {f"It is {n}.": 1, f"Number {n}.": 1, f"It is {n + 1}.": 0},
        }
        for n in range(20)
    ]
    (folder / "truthfulqa/mc_task.json").write_text(json.dumps(asked))
    with (folder / "toxigen/annotated.csv").open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["text", "toxicity_human", "toxicity_ai"])
        rows.writerows([f"Sentence number {n}.", 1 + 4 * (n % 2), 1 + 4 * (n % 2)] for n in range(60))
    lines = [
        {
            "category": "Age", "question_index": n, "context": f"{n} people met. Case {case}.", "label": case,
            "question": "Who was it?", "ans0": "The old one", "ans1": "The young one", "ans2": "Unknown",
            "context_condition": "ambig" if case == 2 else "disambig",
        }
        for n in range(20)
        for case in (2, 0)
    ]  # fmt: skip
    (folder / "bbq/Age.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


@pytest.fixture(scope="module")
def samples(tmp_path_factory: pytest.TempPathFactory) -> list[Sample]:
    folder = tmp_path_factory.mktemp("data")
    write_data(folder)
    return split_samples(load_data(sources(folder)))


@pytest.fixture(scope="module")
def study(samples: list[Sample], tmp_path_factory: pytest.TempPathFactory) -> Study:
    base = Base(make_llama(max_position_embeddings=2048, num_hidden_layers=3), make_tokenizer(), "tiny", None)
    return Study(base, samples, SIZES, tmp_path_factory.mktemp("work"))


def whole(study: Study) -> dict[str, Any]:
    *_, found = run(study, MatConfig(epochs=1))
    return found


@pytest.fixture(scope="module")
def results(study: Study) -> dict[str, Any]:
    described = {"model": "tiny", "data": [], "libraries": {}}
    return json.loads(compact({**described, **whole(study)}))  # type: ignore[no-any-return]


@pytest.fixture
def folder(results: dict[str, Any], tmp_path: Path) -> Path:
    (tmp_path / "real.json").write_text(json.dumps(results))
    (tmp_path / "README.md").write_text(f"Before.\n{MARKERS[0]}\n{MARKERS[1]}\nAfter.\n")
    write(tmp_path, tmp_path / "README.md")
    return tmp_path


def test_a_second_run_computes_nothing_and_gives_the_same(
    study: Study, results: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("computed again")

    monkeypatch.setattr(study_module, "evaluate_choices", refuse)
    monkeypatch.setattr(study_module, "fit", refuse)
    again = Study(study.base, study.samples, study.sizes, study.work)
    found = json.loads(compact(whole(again)))
    assert found == {name: value for name, value in results.items() if name in found}


def test_more_of_test_goes_on_from_less_and_leaves_what_was_chosen_on_dev(
    study: Study, results: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(study_module, "PART", 10)  # what a turn of two has
    told: list[str] = []
    other = Study(study.base, study.samples, replace(SIZES, test=3), study.work, told.append)
    found = whole(other)
    found = json.loads(compact(found))
    assert found["best"] == results["best"]
    assert {line for line in told if ": from" not in line} == {"test-1", "test-others-1", "in-context-1"}
    assert found["questions"]["fairness"]["questions"] == 6
    assert {line["method"]: line["damage"] for line in found["methods"]} == {
        line["method"]: line["damage"] for line in results["methods"]
    }


def test_questions_that_were_read_before_are_left_out(study: Study) -> None:
    def tested(**sizes: int) -> list[str]:
        return [one.prompt for one in replace(study, sizes=replace(SIZES, **sizes)).tested()]

    assert tested(skipped=1, test=2) == tested(skipped=0, test=3)[-len(tested(skipped=0, test=2)) :]
    assert not set(tested(skipped=1, test=2)) & set(tested(skipped=0, test=1))


def test_choices_are_made_on_dev_alone(study: Study, results: dict[str, Any]) -> None:
    splits = {(sample.attribute, sample.group): sample.split for sample in study.samples}

    def seen(stage: str) -> set[Split | None]:
        stored = json.loads((study.work / f"{stage}.json").read_text())
        return {splits[attribute, cluster] for attribute, cluster in stored["questions"]}

    assert seen("places") == seen("strengths") == seen("pools") == {Split.DEV}
    assert seen("test") == seen("test-others") == seen("alone") == seen("shares") == seen("in-context") == {Split.TEST}
    assert {sample.split for sample in study.texts} == {Split.TRAIN, Split.DEV}


def test_a_choice_rests_on_all_questions_of_dev(study: Study, monkeypatch: pytest.MonkeyPatch) -> None:
    """However many parts they are measured in: the first part is of TruthfulQA here."""
    site = study.candidates[0]
    variant = replace(methods(MatConfig(), site, site)["difference in means"], multipliers=(1.0,))
    (whole,) = try_out(study, "one-part", {"difference in means": [variant]})
    monkeypatch.setattr(study_module, "PART", 1)
    (parts,) = try_out(study, "parts", {"difference in means": [variant]})
    assert {"truthfulness mc2", "fairness accuracy", "non-toxicity accuracy"} <= set(parts["metrics"])
    assert parts["metrics"] == pytest.approx(whole["metrics"])
    assert parts["score"] == pytest.approx(whole["score"])


def test_every_method_and_ablation_is_measured_on_every_metric(results: dict[str, Any]) -> None:
    names = [line["method"] for line in results["methods"]]
    assert names == [
        "unsteered", "in-context prompt", "ITI", "difference in means", MEANS_THERE, "probe", "MAT-Steer",
        "no norm preservation", "no positive preservation", "no sparsity", "no orthogonality", "alignment only",
    ]  # fmt: skip
    assert all(set(SETS) <= set(line["metrics"]) <= set(METRICS) for line in results["methods"])
    assert all(set(line["differences"]) == set(line["metrics"]) for line in results["methods"][1:])
    assert all({"rep-4", "empty", "kl"} == set(line["damage"]) for line in results["methods"])
    assert {line["share"] for line in results["shares"]} == {0.1, 0.25, 0.5, 1.0}
    assert len(results["alone"]) == 8 * 3 + 2  # all but the prompt and orthogonality; both, of all
    assert len(results["pools"]) == 2 * 3


def test_differences_are_those_of_the_rates(results: dict[str, Any]) -> None:
    unsteered, *steered = results["methods"]
    for line in steered:
        for name, moved in line["differences"].items():
            rates = line["metrics"][name]["value"], unsteered["metrics"][name]["value"]
            assert moved["value"] == pytest.approx(rates[0] - rates[1], abs=2e-5)


def test_the_tables_are_the_numbers_of_the_json(folder: Path, results: dict[str, Any]) -> None:
    text = (folder / "real.md").read_text()
    assert text == page(results)
    for line in results["methods"]:
        found = (line["metrics"].get(name) for name in METRICS)
        cells = ["-" if one is None else Estimate(**one).text() for one in found]
        assert f"| {line['method']} | {' | '.join(cells)} |" in text
    readme = (folder / "README.md").read_text()
    assert readme == f"Before.\n{MARKERS[0]}\n{summary(results)}\n{MARKERS[1]}\nAfter.\n"
    for line in results["methods"]:
        shown = re.search(rf"^\| {line['method']} \|.*$", readme, re.MULTILINE)
        if shown:
            found = [cell.strip(" *") for cell in shown[0].split("|")[3:7]]
            assert found == [f"{100 * line['metrics'][name]['value']:.1f}" for name in SETS]
    assert (folder / "real-methods.png").stat().st_size < 100_000
    assert (folder / "real-shares.png").stat().st_size < 100_000


def test_a_page_of_a_run_that_goes_on_says_what_is_missing(results: dict[str, Any]) -> None:
    early = {name: value for name, value in results.items() if name not in ("shares", "pools")}
    assert "goes on from here: how much data it takes; which tokens are pooled." in page(early)
    assert "## One attribute at a time" in page(early)
    assert "Not measured yet" not in page(results)


def test_the_statement_follows_the_figures(results: dict[str, Any]) -> None:
    def with_all(low: float, high: float) -> str:
        one = {"value": (low + high) / 2, "low": low, "high": high, "count": 9, "clusters": 9}
        return statement({**results, "pairs": {key: dict.fromkeys(SETS, one) for key in results["pairs"]}})

    count = sum(len(claim.metrics) for claim in CLAIMS)
    assert f"Of {count} orders of the paper, {count} hold here, 0 are reversed, and 0 stay open" in with_all(0.1, 0.2)
    assert f"0 hold here, {count} are reversed, and 0 stay open" in with_all(-0.2, -0.1)
    assert f"0 hold here, 0 are reversed, and {count} stay open" in with_all(-0.1, 0.1)
    assert "MAT-Steer above ITI (MC1, MC2, BBQ, ToxiGen)" in with_all(0.1, 0.2)


@pytest.mark.parametrize(
    ("low", "high", "how"),
    [(0.01, 0.2, "holds"), (-0.2, -0.01, "is reversed"), (-0.1, 0.1, "is open"), (0, 0, "is open")],
)
def test_an_order_holds_where_the_interval_leaves_out_zero(low: float, high: float, how: str) -> None:
    assert verdict(Estimate((low + high) / 2, low, high, 9)) == how


def test_what_breaks_on_test_and_what_was_not_trained_is_said_under_the_table(results: dict[str, Any]) -> None:
    def said(beyond: tuple[str, ...], untrained: dict[str, list[str]]) -> str:
        lines = [{**line, "shortfall": 0.1 * (line["method"] in beyond)} for line in results["methods"]]
        return summary({**results, "methods": lines, "untrained": untrained})

    assert "All keep the limits" in said((), {})
    assert "On test MAT-Steer does not keep the limits" in said(("MAT-Steer",), {})
    assert "On test ITI, probe do not keep the limits" in said(("ITI", "probe"), {})
    assert "MAT-Steer's fairness was not trained" in said((), {"MAT-Steer": ["fairness"], "ITI": ["truthfulness"]})
    assert "was not trained" not in said((), {"no sparsity": ["fairness"]})


def test_strengths_are_looked_for_beyond_what_was_tried() -> None:
    def row(name: str, multiplier: float, score: float, shortfall: float = 0.0) -> dict[str, Any]:
        return {"method": name, "multiplier": multiplier, "score": score, "shortfall": shortfall}

    variants = {name: Variant(Recipe(), None, (1.0, 2.0)) for name in ("edge", "inside", "broken")}
    rows = [
        row("edge", 1, 0.4), row("edge", 2, 0.5), row("inside", 1, 0.5), row("inside", 2, 0.9, 0.1),
        row("broken", 1, 0.5, 2.0), row("broken", 2, 0.6, 9.0),
    ]  # fmt: skip
    assert {name: one.multipliers for name, (one,) in further(rows, variants).items()} == {
        "edge": (4.0, 8.0),
        "broken": pytest.approx((0.1, 0.2, 0.4)),
    }
    assert best_of(rows, "inside")["multiplier"] == 1
    assert best_of([*rows, row("edge", 4, 0.503)], "edge")["multiplier"] == 2  # as good, and weaker


def test_questions_come_after_others_of_train_with_right_answers(study: Study) -> None:
    asked, shown = study.asked(Split.TEST, 2), study.asked(Split.TRAIN, 8)
    for question, plain in zip(in_context(asked, shown, 2), asked, strict=True):
        assert question.prompt.endswith(plain.prompt)
        assert question.completions == plain.completions
        before = question.prompt.removesuffix(plain.prompt)
        given = [
            one
            for one in shown
            for answer, right in zip(one.completions, one.labels, strict=True)
            if right and one.attribute == plain.attribute and f"{one.prompt}{answer}\n\n" in before
        ]
        assert len({one.prompt for one in given}) == 2
        if plain.attribute == "non-toxicity":  # neither answer is the one to repeat
            assert before.count(" Yes\n") == before.count(" No\n") == 1


def test_more_questions_of_test_begin_with_fewer(study: Study) -> None:
    def asked(count: int) -> list[Any]:
        return replace(study, sizes=replace(SIZES, test=count)).tested()

    assert asked(3)[: len(asked(2))] == asked(2)
    assert Counter(question.attribute for question in asked(3)) == {
        "truthfulness": 3,
        "non-toxicity": 6,
        "fairness": 6,
    }
    assert len(asked(1000)) == len({(one.attribute, one.prompt) for one in asked(1000)})


def test_less_of_the_data_is_a_part_of_more_and_dev_is_whole() -> None:
    splits = [Split.TRAIN] * 40 + [Split.DEV] * 8
    whole = Activations(
        values={},
        attributes=("a", "b") * 24,
        labels=torch.tensor([True, True, False, False] * 12),
        groups=tuple(f"g{n // 4}" for n in range(48)),
        splits=tuple(splits),
        samples=torch.arange(48),
    )
    parts = [set(part_of(whole, share=share).samples.tolist()) for share in (0.1, 0.25, 0.5, 1.0)]
    assert parts[0] < parts[1] < parts[2] < parts[3] == set(range(48))
    assert [len(part) - 8 for part in parts] == [4, 8, 20, 40]  # of ten groups 1, 2, 5 and 10
    assert all(set(range(40, 48)) <= part for part in parts)
    only = part_of(whole, share=0.5, only="a")
    assert set(only.attributes) == {"a"}
    assert set(only.samples.tolist()) < parts[2]


def test_data_come_from_a_folder_or_from_the_hub() -> None:
    assert sources(Path("d")) == [
        "truthfulqa=d/truthfulqa/mc_task.json",
        "toxigen=d/toxigen/*.csv",
        "bbq=d/bbq/*.jsonl",
    ]
    assert all("=hub:" in spec for spec in sources(None))
