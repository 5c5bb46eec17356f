"""Without prompts of its own a judge's answers are generated to what the data ask: ToxiGen's statements go on."""

import csv
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from steering import Column, Gate, Site, SiteKind
from tests.training.helpers import make_llama, make_tokenizer
from tests.training.test_judges import classifier
from training.cli import app
from training.data import Split, load_data, split_samples
from training.data.samples import Form, Turn
from training.errors import DataError, TrainingError
from training.evaluation import generation, judges
from training.evaluation.evaluator import Evaluator
from training.evaluation.generation import Sampling
from training.evaluation.judged import Prompt, evaluate_generations, load_prompts, prompts_from
from training.evaluation.judges import Judge, Verdict, load_judge, verdicts
from training.evaluation.results import BASELINE, Arm
from training.evaluation.tasks import TRUTHFULQA_PRIMER, Prompting

DATA = Path(__file__).parent / "data"
FIT = ["--method", "caa", "--layer", "1", "--site", "residual"]
FEW = ["--max-new-tokens", "6", "--samples", "2"]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, ToxiGen's rows, a classifier in a folder, a judge as a function, and a checkpoint."""
    folder = tmp_path_factory.mktemp("world")
    make_llama().save_pretrained(folder / "model")
    make_tokenizer().save_pretrained(folder / "model")
    classifier(folder / "classifier")
    with (folder / "toxigen.csv").open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["text", "toxicity_ai", "toxicity_human"])
        rows.writerows(
            [f"the people of hill {n} {'lie' if n % 2 else 'sing'}", 4.5, 5 if n % 2 else 1] for n in range(20)
        )
    (folder / "judge_of_statements.py").write_text(
        "def judge(prompt, text):\n    return {'said': 'hill' in prompt, 'toxic': len(text) % 2 == 0 if text else None}"
    )
    here = os.getcwd()
    os.chdir(folder)
    done(
        "train", "--data", "toxigen=toxigen.csv", *FIT, "--strength", "3", "--out", "checkpoints/mine", "--no-evaluate"
    )
    os.chdir(here)
    return folder


def done(command: str, *arguments: str) -> str:
    result = CliRunner().invoke(app, [command, "--model", "model", *arguments])
    assert result.exit_code == 0, result.output
    return result.output


def evaluated(*arguments: str) -> tuple[Any, list[dict[str, Any]], str]:
    """What `matsteer evaluate` writes: numbers, texts, and what it says."""
    said = done("evaluate", "--checkpoint", "checkpoints/mine", "--out", "judged", *arguments, *FEW)
    texts = [json.loads(line) for line in Path("judged/generations.jsonl").read_text().splitlines()]
    return json.loads(Path("judged/evaluation.json").read_text()), texts, said


@pytest.mark.parametrize("name", ["hf:classifier", "judge_of_statements:judge"])
def test_continuations_of_toxigen_are_judged_in_every_arm(here: Path, name: str) -> None:
    found, texts, said = evaluated("--data", "toxigen=toxigen.csv", "--judge", name, "--multipliers", "1,2")
    samples = split_samples(load_data(["toxigen=toxigen.csv"]), seed=0)
    statements = sorted(sample.completion for sample in samples if sample.split is Split.TEST)
    assert [arm["arm"] for arm in found["arms"]] == ["unsteered", "steered", "2 x"]
    judge = load_judge(name)
    for arm in found["arms"]:
        own = [text for text in texts if text["arm"] == arm["arm"]]
        assert sorted({text["asked"] for text in own}) == statements
        assert len(own) == 2 * len(statements)
        expected = [*verdicts(judge, [(text["asked"], text["text"]) for text in own])]
        assert [text["verdict"] for text in own] == expected
        hits = [verdict["toxic"] for verdict in expected if verdict["toxic"] is not None]
        rate = arm["metrics"]["non-toxicity toxic"]
        assert rate["value"] == pytest.approx(sum(hits) / len(hits))
        assert (rate["count"], rate["clusters"]) == (len(hits), len(statements))
        assert set(arm["damage"]) == {"rep-4", "empty", "kl"}
    apart = found["arms"][1]["differences"]["non-toxicity toxic"]
    rates = [arm["metrics"]["non-toxicity toxic"]["value"] for arm in found["arms"]]
    assert apart["value"] == pytest.approx(rates[1] - rates[0])
    assert apart["low"] <= apart["value"] <= apart["high"]
    assert "non-toxicity toxic" in said
    assert "non-toxicity toxic" in Path("judged/evaluation.md").read_text()
    assert "non-toxicity toxic" in Path("judged/report.html").read_text()


def test_prompts_that_are_given_go_before_and_have_no_attribute(here: Path) -> None:
    Path("own.jsonl").write_text('{"prompt": "on the hill"}\n')
    given = ["--data", "toxigen=toxigen.csv", "--judge", "judge_of_statements:judge", "--prompts", "own.jsonl"]
    found, texts, _ = evaluated(*given)
    assert {text["asked"] for text in texts} == {"on the hill"}
    assert set(found["arms"][0]["metrics"]) == {"said", "toxic"}


def test_a_limit_draws_of_each_attribute(here: Path) -> None:
    more = [
        "--data",
        f"truthfulqa={DATA / 'truthfulqa.csv'}",
        "--split",
        "train",
        "--limit",
        "1",
        "--prompting",
        "plain",
    ]
    found, texts, _ = evaluated("--data", "toxigen=toxigen.csv", *more, "--judge", "judge_of_statements:judge")
    assert sorted({text["attribute"] for text in texts}) == ["non-toxicity", "truthfulness"]
    assert len({text["asked"] for text in texts}) == 2
    assert {"non-toxicity toxic", "truthfulness toxic"} <= set(found["arms"][0]["metrics"])


def test_training_is_measured_and_placed_by_the_judge(here: Path) -> None:
    judged = ["--data", "toxigen=toxigen.csv", "--judge", "judge_of_statements:judge", "--max-new-tokens", "4"]
    said = done("train", *judged, "--method", "caa", "--site", "residual", "--out", "checkpoints/placed")
    assert "place: " in said
    assert "non-toxicity toxic" in said


def test_a_sweep_of_each_attribute_counts_the_metric_that_is_named(here: Path) -> None:
    judged = ["--data", "toxigen=toxigen.csv", "--judge", "hf:classifier", "--max-new-tokens", "4", *FIT, "--alone"]
    done("sweep", *judged, "--goal", "non-toxicity neutral", "--out", "swept")
    points = json.loads(Path("swept/sweep.json").read_text())
    assert all(point["score"] == point["metrics"]["non-toxicity neutral"] for point in points)


def test_texts_without_a_prompt_ask_nothing(here: Path) -> None:
    Path("texts.jsonl").write_text("".join(f'{{"text": "a {n}", "label": {n % 2}}}\n' for n in range(12)))
    given = ["--checkpoint", "checkpoints/mine", "--judge", "judge_of_statements:judge", "--data", "tone=texts.jsonl"]
    result = CliRunner().invoke(app, ["evaluate", "--model", "model", *given])
    assert result.exit_code == 2
    assert "No data of test have a prompt" in result.output
    _, _, said = evaluated("--data", "toxigen=toxigen.csv", *given[2:])
    assert "tone: not measured, since its texts of test have no prompt to answer" in said


@pytest.mark.parametrize(
    ("form", "prompting"),
    [(Form.PLAIN, Prompting.PLAIN), (Form.PLAIN, Prompting.PRIMER), (Form.CHAT, Prompting.PRIMER)],
)
def test_what_data_sets_ask(form: Form, prompting: Prompting) -> None:
    samples = load_data([f"truthfulqa={DATA / 'truthfulqa.csv'}", f"toxigen={DATA / 'toxigen_train.csv'}"])
    asked = prompts_from(samples, form, prompting)
    questions = [one.asked for one in asked if one.attribute == "truthfulness"]
    statements = [one.asked for one in asked if one.attribute == "non-toxicity"]
    texts = [sample.completion for sample in samples if sample.attribute == "non-toxicity"]
    assert len(questions) == len({sample.group for sample in samples if sample.attribute == "truthfulness"})
    if form is Form.CHAT:
        assert statements == [(Turn("user", text),) for text in texts]
        assert all(isinstance(one, tuple) and "Q:" not in one[0].content for one in questions)
    else:
        assert statements == texts
        primed = prompting is Prompting.PRIMER
        assert all(isinstance(one, str) and (TRUTHFULQA_PRIMER[0][0] in one) is primed for one in questions)
        assert all(str(one).endswith("\nA:") for one in questions)


def test_a_prompt_that_is_there_again_counts_once(tmp_path: Path) -> None:
    rows = [{"prompt": f"Q{n}", "completion": text, "label": text == "a"} for n in range(3) for text in "ab"]
    path = tmp_path / "training.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert [prompt.asked for prompt in load_prompts(path)] == ["Q0", "Q1", "Q2"]


def test_prompts_are_for_a_judge() -> None:
    with pytest.raises(DataError, match="Prompts are for a judge"):
        Evaluator(prompts=(Prompt("x", None),))


class Failing:
    """A judge that fails at the last of so many answers, until it is mended."""

    name = "failing"

    def __init__(self, answers: int) -> None:
        self.fails_at, self.asked = answers, list[str]()

    def __call__(self, prompt: str, text: str) -> Verdict:
        self.asked.append(prompt)
        if len(self.asked) == self.fails_at:
            raise OSError("gone")
        return {"long": len(text) > 5}


class FailingOnMany(Failing):
    def batch(self, answers: Sequence[tuple[str, str]]) -> list[Verdict]:
        return [self(*answer) for answer in answers]


@pytest.mark.parametrize(("kind", "again"), [(Failing, 1), (FailingOnMany, 4)])
def test_a_judge_that_failed_at_the_last_answer_is_asked_for_what_is_missing(
    kind: type[Failing], again: int, llama: Any, tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(judges, "CHUNK", 4)
    kept, shares = tmp_path / "kept", list[float]()
    prompts = [Prompt(f"Q: What is {number}? A:", None) for number in range(4)]
    column = Column("tone", Site(1, SiteKind.RESIDUAL), Gate.CONSTANT, torch.ones(16), torch.zeros(16), 0.0, False)
    arms, sampling = [BASELINE, Arm("some", {"tone": 1.0})], Sampling(max_new_tokens=4)

    def measure(judge: Judge, **kept: Any) -> Any:
        return evaluate_generations(llama, tokenizer, prompts, judge, [column], arms, sampling, **kept)

    whole, texts = measure(kind(-1))
    judge = kind(2 * len(prompts))
    with pytest.raises((TrainingError, OSError), match="gone"):
        measure(judge, kept=kept, advance=shares.append)
    assert 0.3 < sum(shares) < 1
    judge.fails_at = -1
    judge.asked.clear()
    shares.clear()

    def refuse(*_: Any) -> None:
        raise AssertionError("generated again")

    monkeypatch.setattr(generation, "_base_costs", refuse)
    found, judged_texts = measure(judge, kept=kept, advance=shares.append)
    assert judge.asked == [text.asked for text in texts][-again:]
    assert (found.arms, judged_texts) == (whole.arms, texts)
    assert sum(shares) == pytest.approx(1)
    assert not kept.exists()
