"""Damage is measured beside gain in every arm, and a setting that loops does not win a sweep."""

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from steering import Column, Gate, Reading, Site, SiteKind, steered
from tests.training.helpers import make_llama
from training.data import Sample
from training.errors import TrainingError
from training.evaluation import choices, damage, generation
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
    kept.write_text("\n".join([*lines[:-1], '{"key": "cut sh']))
    done, shares = [], list[float]()
    monkeypatch.setattr(
        choices, "_score", lambda model, rows, *rest: done.append(len(rows)) or score(model, rows, *rest)
    )
    again = evaluate_choices(llama, tokenizer, asked, [column], arms, kept=kept, advance=shares.append)
    assert sum(done) == len(asked) - 7, "one of eight was cut short"
    assert sum(shares) == pytest.approx(1)
    assert not kept.exists()
    for one, other in zip(whole.arms, again.arms, strict=True):
        for name, estimate in one.metrics.items():
            assert estimate.value == pytest.approx(other.metrics[name].value, rel=1e-4)
    rows = [json.dumps(row) for row in again.rows]
    assert len(rows) == len(asked) * len(arms)


def test_damage_goes_on_where_it_stopped_and_the_bar_counts_it(
    llama: Any, tokenizer: Any, samples: list[Sample], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept, shares = tmp_path / "kept", list[float]()
    arms = [BASELINE, Arm("some", {"truthfulness": 0.01}), Arm("more", {"truthfulness": 0.02})]
    measure = partial(
        evaluate_choices, llama, tokenizer, questions(samples), [loop(llama)], arms, damage=4,
        sampling=Sampling(1.0, 6, seed=1),
    )  # fmt: skip
    whole, passes, done = measure(), damage._log_shares, list[float]()

    def third_dies(*given: Any) -> Any:
        done.append(sum(shares))
        if len(done) == 3:
            raise KeyboardInterrupt
        return passes(*given)

    monkeypatch.setattr(damage, "_log_shares", third_dies)
    with pytest.raises(KeyboardInterrupt):
        measure(kept=kept, advance=shares.append)
    assert done == sorted(done)
    assert 0.5 < done[0] < done[-1] < 1

    def refuse(*_: Any) -> None:
        raise AssertionError("measured again")

    monkeypatch.setattr(choices, "_score", refuse)
    monkeypatch.setattr(generation, "_base_costs", refuse)
    monkeypatch.setattr(damage, "_log_shares", lambda *given: done.append(0) or passes(*given))
    done.clear()
    shares.clear()
    again = measure(kept=kept, advance=shares.append)
    assert len(done) == 2, "unsteered, and the arm that was missing"
    assert sum(shares) == pytest.approx(1)
    assert again.arms == whole.arms
    assert not kept.exists()


def test_where_no_prompt_leaves_room_that_is_said_and_the_bar_is_full(tokenizer: Any, samples: list[Sample]) -> None:
    asked, shares = questions(samples), list[float]()
    longest = max(len(tokenizer(one.prompt + text)["input_ids"]) for one in asked for text in one.completions)
    tight = make_llama(max_position_embeddings=longest)
    found = evaluate_choices(tight, tokenizer, asked, [], [BASELINE], damage=4, advance=shares.append)
    assert "damage: no prompt leaves room for an answer of 48 tokens." in found.notes
    assert found.arms[0].damage == {}
    assert sum(shares) == pytest.approx(1)


@pytest.mark.parametrize("holds", [True, False])
def test_a_latched_gate_reads_a_neutral_text_at_the_end_of_its_first_half(
    llama: Any, tokenizer: Any, holds: bool
) -> None:
    """The condition holds there and not at the beginnings of the texts, or the other way round."""
    encoded = [tokenizer(text)["input_ids"][:256] for text in TEXTS]
    ends = [len(ids) // 2 - 1 for ids in encoded]
    with torch.no_grad():
        read = [llama(torch.tensor([ids]), output_hidden_states=True).hidden_states[1][0] for ids in encoded]
    heard = torch.stack(
        [own[place] for places in (ends, [1] * len(ends)) for own, place in zip(read, places, strict=True)]
    )
    heard = torch.nn.functional.normalize(heard.double(), dim=1)
    wanted = torch.tensor([1.0 if holds else -1.0] * len(ends) + [-1.0 if holds else 1.0] * len(ends)).double()
    found = torch.linalg.lstsq(torch.cat([heard, torch.ones(len(heard), 1)], dim=1), wanted[:, None]).solution[:, 0]
    assert torch.equal((heard @ found[:-1] + found[-1]).sign(), wanted)
    weight, bias = found[:-1].float(), float(found[-1])
    vector = torch.linspace(-1, 1, 16)
    reads = Reading(Site(0, SiteKind.RESIDUAL), latched=True)
    steers = Site(1, SiteKind.RESIDUAL)
    gated = Column("gated", steers, Gate.COSINE, vector, weight, bias, False, reads=reads)
    always = Column("always", steers, Gate.CONSTANT, vector, torch.zeros(16), 0.0, False)
    arms = [Arm("gated", {"gated": 1.0}), Arm("always", {"always": 1.0})]
    moved = neutral_divergence(llama, tokenizer, [gated, always], arms)
    for number, (ids, end) in enumerate(zip(encoded, ends, strict=True)):
        means = []
        for first in (end, 1):
            mask = torch.arange(len(ids))[None] >= first
            with torch.no_grad():
                plain = llama(torch.tensor([ids])).logits[0].log_softmax(-1)
                with steered(llama, [always], [1.0], mask=mask):
                    other = llama(torch.tensor([ids])).logits[0].log_softmax(-1)
            means.append(float((plain.exp() * (plain - other)).sum(-1)[first:].mean()))
        assert moved[:, number] == pytest.approx([means[0] if holds else 0, means[1]], rel=1e-3)
        assert means[0] > 0
