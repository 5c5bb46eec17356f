"""Damage is measured beside gain in every arm, and a setting that loops does not win a sweep."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from steering import Column, Gate, Site, SiteKind, steered
from training.data import Sample
from training.errors import TrainingError
from training.evaluation.choices import evaluate_choices
from training.evaluation.damage import neutral_divergence, repetition
from training.evaluation.generation import Sampling
from training.evaluation.neutral import TEXTS
from training.evaluation.report import markdown
from training.evaluation.results import BASELINE, Arm, ArmResult, Estimate
from training.evaluation.sweep_results import Goal
from training.evaluation.tasks import questions

SITE = Site(2, SiteKind.RESIDUAL)


def loop(llama: Any) -> Column:
    """Whatever stands there, the next token is the one with the longest row in the head: what the last layer puts out
    becomes that row."""
    rows = llama.get_output_embeddings().weight.detach()
    vector = 1000 * rows[rows.norm(dim=1).argmax()]
    return Column("truthfulness", SITE, Gate.CONSTANT, vector, torch.zeros(16), 0.0, False)


def test_rep_4_is_the_share_of_4_grams_that_were_there_before() -> None:
    assert repetition([1, 2, 3, 4, 5, 6]) == 0
    assert repetition([7] * 10) == pytest.approx(6 / 7)
    assert repetition([1, 2, 3, 4, 1, 2, 3, 4]) == pytest.approx(1 / 5)
    assert repetition([1, 2]) == 0


def test_what_neutral_text_suffers_is_that_of_plain_forward_passes(llama: Any, tokenizer: Any) -> None:
    column = Column(
        "truthfulness", Site(1, SiteKind.RESIDUAL), Gate.CONSTANT, torch.ones(16), torch.zeros(16), 0.0, False
    )
    found = neutral_divergence(llama, tokenizer, [column], [BASELINE, Arm("one", {"truthfulness": 1.0})])
    assert (found[0] == 0).all()
    for number in (0, len(TEXTS) - 1):
        ids = torch.tensor([tokenizer(TEXTS[number])["input_ids"][:256]])
        mask = torch.ones_like(ids, dtype=torch.bool)
        mask[0, 0] = False
        with torch.no_grad():
            plain = llama(ids).logits[0].log_softmax(-1)
            with steered(llama, [column], [1.0], mask=mask):
                moved = llama(ids).logits[0].log_softmax(-1)
        expected = (plain.exp() * (plain - moved)).sum(-1)[1:].mean()
        assert found[1, number] == pytest.approx(float(expected), rel=1e-4)
        assert expected > 0


def test_an_arm_that_loops_is_damaged_and_ranks_last(llama: Any, tokenizer: Any, samples: list[Sample]) -> None:
    column = loop(llama)
    arms = [
        BASELINE,
        Arm("gentle", {"truthfulness": 1e-9}),
        Arm("loop", {"truthfulness": 1.0}),
        Arm("half", {"truthfulness": 0.5}),
    ]
    found = evaluate_choices(
        llama, tokenizer, questions(samples), [column], arms, damage=6, sampling=Sampling(1.0, 40, seed=1)
    )
    plain, gentle, looping, _ = found.arms
    assert (looping.damage["rep-4"].value or 0) > 0.9
    assert (looping.differences["rep-4"].low or 0) > (plain.damage["rep-4"].value or 0) + 0.2
    assert (looping.damage["kl"].value or 0) > 1
    assert gentle.differences["kl"].value == pytest.approx(0, abs=1e-5)
    assert gentle.perplexity_ratio == pytest.approx(1, rel=1e-3)
    assert gentle.perplexity_range == pytest.approx((1, 1), rel=1e-3)
    low, high = looping.perplexity_range or (0, 0)
    assert low <= (looping.perplexity_ratio or 0) <= high
    assert f"{looping.perplexity_ratio:.2f} [{low:.2f}, {high:.2f}]" in markdown(found)
    assert plain.differences == {}
    flattered = ArmResult(**{**vars(looping), "metrics": dict.fromkeys(looping.metrics, Estimate(1.0, 1, 1, 8))})
    goal = Goal(max_perplexity_ratio=1e9)
    assert goal.score(flattered) == 1
    assert goal.rank(gentle) > goal.rank(flattered)
    shown = markdown(found)
    assert "Difference to unsteered." in shown
    assert "Damage." in shown
    assert "differences are shown" in shown


def test_an_interrupted_evaluation_goes_on(
    llama: Any, tokenizer: Any, samples: list[Sample], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked, column, kept = questions(samples), loop(llama), tmp_path / "kept"
    arms = [BASELINE, Arm("some", {"truthfulness": 0.01})]
    whole = evaluate_choices(llama, tokenizer, asked, [column], arms)
    monkeypatch.setattr("training.evaluation.choices.BLOCK", 8)
    from training.evaluation import choices

    score, calls = choices._score, []

    def dies(rows: Any, *rest: Any) -> Any:
        raise TrainingError("killed")

    def counted(model: Any, tokenized: Any, rows: Any, *rest: Any) -> Any:
        calls.append(len(rows))
        return score(model, rows, *rest) if len(calls) < 3 else dies(rows)

    monkeypatch.setattr(choices, "_score", lambda model, rows, *rest: counted(model, None, rows, *rest))
    with pytest.raises(TrainingError, match="killed"):
        evaluate_choices(llama, tokenizer, asked, [column], arms, kept=kept)
    lines = kept.read_text().splitlines()
    assert len(lines) == 2 * 8
    kept.write_text("\n".join([*lines, '{"key": "cut sh']))
    done = []
    monkeypatch.setattr(
        choices, "_score", lambda model, rows, *rest: done.append(len(rows)) or score(model, rows, *rest)
    )
    again = evaluate_choices(llama, tokenizer, asked, [column], arms, kept=kept)
    assert sum(done) == len(asked) - 8
    assert not kept.exists()
    for one, other in zip(whole.arms, again.arms, strict=True):
        for name, estimate in one.metrics.items():
            assert estimate.value == pytest.approx(other.metrics[name].value, rel=1e-4)
    rows = [json.dumps(row) for row in again.rows]
    assert len(rows) == len(asked) * len(arms)
