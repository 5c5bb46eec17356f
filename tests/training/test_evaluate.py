"""Rates are counted as a reader would count them, with intervals that a textbook gives."""

from collections.abc import Mapping
from dataclasses import replace
from math import exp
from typing import Any

import numpy as np
import pytest
import torch

from steering import Column, Gate, Site, SiteKind, steered
from steering.errors import ColumnError
from training.activations.tokenization import encode
from training.data import Sample, Split
from training.errors import DataError, TrainingError
from training.evaluation.choices import evaluate_choices
from training.evaluation.evaluator import Evaluator
from training.evaluation.generation import Continuation, Sampling
from training.evaluation.judged import Prompt, evaluate_generations, judged
from training.evaluation.results import BASELINE, Arm, Estimate, Measured, default_arm, single_arms, wilson
from training.evaluation.tasks import questions
from training.models import Base

SITE = Site(1, SiteKind.RESIDUAL)


def column(attribute: str, seed: int) -> Column:
    vector = 3 * torch.randn(16, generator=torch.Generator().manual_seed(seed))
    return Column(attribute, SITE, Gate.CONSTANT, vector, torch.zeros(16), 0.0, True, default_multiplier=2.0)


COLUMNS = (column("truthfulness", 0), column("civility", 1))


def test_questions_gather_the_answers_to_one_prompt(samples: list[Sample]) -> None:
    found = questions([*samples, Sample("civility", "Q: alone? A:", " yes", True, "g99")])
    assert len(found) == 16
    assert found[0].completions == (" truthfulness is good, it is 0", " bad 0")
    assert found[0].labels == (True, False)
    with pytest.raises(DataError, match="nothing to choose from"):
        questions([sample for sample in samples if sample.label])


def test_choices_equal_a_loop_over_plain_forward_passes(llama: Any, tokenizer: Any, samples: list[Sample]) -> None:
    asked = questions(samples)
    arms = [BASELINE, default_arm(COLUMNS), Arm("away", {"civility": -1.0})]
    found = evaluate_choices(llama, tokenizer, asked, COLUMNS, arms)
    for arm in arms:
        own = [question for question in asked if question.attribute == "civility"]
        hits, per_token, masses = 0, 0, []
        for question in own:
            sums, means = [], []
            for text in question.completions:
                encoded = encode(tokenizer, question.prompt, text)
                mask = torch.zeros(1, len(encoded.ids), dtype=torch.bool)
                mask[0, encoded.start :] = True
                with torch.no_grad(), steered(llama, COLUMNS, list(arm.multipliers(COLUMNS)), mask=mask):
                    logits = llama(torch.tensor([encoded.ids])).logits[0].log_softmax(-1)
                scores = [float(logits[encoded.start + i, t]) for i, t in enumerate(encoded.targets)]
                sums.append(sum(scores))
                means.append(sum(scores) / len(scores))
            hits += question.labels[sums.index(max(sums))]
            per_token += question.labels[means.index(max(means))]
            positive = sum(exp(s) for s, label in zip(sums, question.labels, strict=True) if label)
            masses.append(positive / sum(exp(s) for s in sums))
        metrics = found.arm(arm.name).metrics
        assert metrics["civility any_true"].value == pytest.approx(hits / len(own))
        assert metrics["civility any_true_per_token"].value == pytest.approx(per_token / len(own))
        assert metrics["civility mc2"].value == pytest.approx(sum(masses) / len(masses), rel=1e-3)
        assert metrics["civility mc2"].count == 8


def test_a_limit_is_one_for_each_attribute(llama: Any, tokenizer: Any, samples: list[Sample]) -> None:
    placed = [replace(sample, split=Split.TEST) for sample in samples]
    base = Base(llama, tokenizer, "tiny", None)
    evaluation, _ = Evaluator(limit=3).evaluate(base, COLUMNS, [BASELINE], placed, Split.TEST)
    counts = {name: estimate.count for name, estimate in evaluation.arm(BASELINE.name).metrics.items()}
    assert counts["truthfulness mc2"] == counts["civility mc2"] == 3


def judge(prompt: str, text: str) -> Mapping[str, bool | None]:
    return {"short": len(text) < 12, "asked": prompt.startswith("Q"), "never": None}


def test_generations_are_judged_in_every_arm(llama: Any, tokenizer: Any) -> None:
    prompts = [Prompt(text, None) for text in ("Q: What do cows say? A:", "The sky", "Q: Bees? A:")]
    arms = [BASELINE, *single_arms(COLUMNS)]
    found, texts = evaluate_generations(llama, tokenizer, prompts, judge, COLUMNS, arms, Sampling(1.0, 6, 4))
    assert [arm.arm for arm in found.arms] == ["unsteered", "truthfulness alone", "civility alone"]
    assert found.arms[1].attributes == {"truthfulness": 2.0}
    for arm in found.arms:
        own = [text for text in texts if text.arm == arm.arm]
        assert len(own) == 12
        assert arm.metrics["short"].value == pytest.approx(sum(len(t.text) < 12 for t in own) / 12)
        assert arm.metrics["asked"].value == pytest.approx(2 / 3)
        assert arm.metrics["never"] == Estimate(None, None, None, 0)
        assert (arm.metrics["short"].count, arm.metrics["short"].clusters) == (12, 3)
        assert arm.damage["empty"].value == pytest.approx(sum(not t.text.strip() for t in own) / 12)
        assert all(text.verdict["short"] == (len(text.text) < 12) for text in own)
        assert arm.perplexity == pytest.approx(exp(sum(t.nll for t in own) / sum(len(t.token_ids) for t in own)))
        assert arm.perplexity_ratio == pytest.approx((arm.perplexity or 0) / (found.arms[0].perplexity or 1))
    with pytest.raises(DataError, match="no prompts"):
        evaluate_generations(llama, tokenizer, [], judge, COLUMNS, arms, Sampling())


def test_what_was_measured_unsteered_may_be_of_an_earlier_call(llama: Any, tokenizer: Any) -> None:
    prompts = [Prompt(text, None) for text in ("Q: What do cows say? A:", "The sky", "Q: Bees? A:")]
    arms = single_arms(COLUMNS)
    settings = (llama, tokenizer, prompts, judge, COLUMNS)
    whole, texts = evaluate_generations(*settings, [BASELINE, *arms], Sampling(1.0, 6, 4))
    alone, before = evaluate_generations(*settings, [BASELINE], Sampling(1.0, 6, 4))
    found, others = evaluate_generations(*settings, arms, Sampling(1.0, 6, 4), before=alone.measures[0])
    assert [text.token_ids for text in (*before, *others)] == [text.token_ids for text in texts]
    for arm, reference in zip(found.arms, whole.arms, strict=True):
        assert arm.metrics == reference.metrics
        assert arm.perplexity_ratio == pytest.approx(reference.perplexity_ratio)
        assert arm.damage == reference.damage
        assert [*arm.differences] == [*reference.differences]


def test_a_judge_that_fails_is_named(llama: Any, tokenizer: Any) -> None:
    def broken(prompt: str, text: str) -> Mapping[str, bool | None]:
        raise KeyError("sky")

    with pytest.raises(TrainingError, match=r"The judge failed on an answer to 'The sky': KeyError\('sky'\)"):
        evaluate_generations(llama, tokenizer, [Prompt("The sky", None)], broken, (), [BASELINE], Sampling(1.0, 2))


def test_a_metric_counts_only_where_it_applies() -> None:
    verdicts: list[Mapping[str, bool | None]] = [{"a": True, "b": None}, {"a": False, "b": True}, {"a": True}]
    texts = [Continuation("arm", number, 0, (1,), "x", True, 1.0, verdict) for number, verdict in enumerate(verdicts)]
    rates = {name: measured.estimate() for name, measured in judged(texts, ["0", "1", "2"]).items()}
    assert rates["a"] == replace(wilson(2, 3), clusters=3)
    assert rates["b"] == replace(wilson(1, 1), clusters=1)


def test_arms_name_attributes_that_exist() -> None:
    assert default_arm(COLUMNS, 0.5).multipliers(COLUMNS) == (1.0, 1.0)
    assert Arm("x", {"civility": -1}).multipliers(COLUMNS) == (0.0, -1.0)
    with pytest.raises(ColumnError, match="no attribute 'kindness'; there are truthfulness, civility"):
        Arm("x", {"kindness": 1}).multipliers(COLUMNS)


@pytest.mark.parametrize(
    ("hits", "count", "low", "high"), [(8, 10, 0.4902, 0.9433), (0, 10, 0.0, 0.2775), (10, 10, 0.7225, 1.0)]
)
def test_wilson_intervals(hits: int, count: int, low: float, high: float) -> None:
    estimate = wilson(hits, count)
    assert (estimate.value, estimate.count) == (hits / count, count)
    assert estimate.low == pytest.approx(low, abs=1e-4)
    assert estimate.high == pytest.approx(high, abs=1e-4)


def test_bootstrap_intervals_shrink_with_the_square_root_of_the_count() -> None:
    values = np.random.default_rng(0).normal(size=400)
    measured = Measured(np.stack([values, np.ones(400)], 1), tuple(map(str, range(400))))
    estimate = measured.estimate()
    assert estimate.value == pytest.approx(values.mean())
    assert (estimate.high or 0) - (estimate.low or 0) == pytest.approx(2 * 1.96 / 20, rel=0.15)
    assert measured.estimate() == estimate
    assert Measured(np.zeros((0, 2)), ()).estimate().value is None
