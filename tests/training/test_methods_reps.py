"""RePS: a vector trained through the model makes it prefer one answer, and its opposite the other."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from steering import Gate, Positions, Site, SiteKind
from training.activations.extraction import extract
from training.activations.tokenization import Encoded, encode
from training.data.samples import Sample, Split
from training.errors import FitError
from training.evaluation.likelihood import log_likelihoods
from training.methods.fit import Recipe, fit
from training.methods.reps import Pair, RepsConfig, _Trainer, pairs_of
from training.models import Base

SITE, NAME = Site(1, SiteKind.RESIDUAL), "kind"


def texts(name: str = NAME) -> list[Sample]:
    return [
        Sample(name, f"Q: {split} {n}? A:", f" {word} {n}", label, f"{split}{n}", split)
        for split, count in ((Split.TRAIN, 4), (Split.DEV, 2))
        for n in range(count)
        for label, word in ((True, "good bees"), (False, "bad cows moo"))
    ]


@pytest.fixture(scope="module")
def base(llama: Any, tokenizer: Any) -> Base:
    return Base(llama, tokenizer, "tiny", None)


def trained(base: Base, config: RepsConfig, folder: Path | None = None) -> Any:
    activations = extract(base.model, base.tokenizer, texts(), [SITE])
    return fit(activations, [SITE], Recipe(config), folder=folder, base=base, samples=texts())


def scores(base: Base, column: Any, multiplier: float) -> list[float]:
    """Mean log-probability per token of positives and of negatives, by the hooks that serve."""
    rows = [encode(base.tokenizer, one.prompt, one.completion) for one in texts()]
    found = log_likelihoods(base.model, rows, columns=[column], multipliers=[[multiplier]] * len(rows),
                            positions=Positions.GENERATED)  # fmt: skip
    means = [float(one.mean()) for one in found]
    return [sum(means[side::2]) / len(means[side::2]) for side in (0, 1)]


def test_training_makes_both_directions_prefer_their_side(base: Base, tmp_path: Path) -> None:
    wants = [one.requires_grad for one in base.model.parameters()]
    (column,) = trained(base, RepsConfig(steps=40, rate=0.05), tmp_path)
    assert (column.gate, column.keep_norm, column.site) == (Gate.CONSTANT, False, SITE)
    assert [one.requires_grad for one in base.model.parameters()] == wants
    assert all(one.grad is None for one in base.model.parameters())
    (start,) = trained(base, RepsConfig(steps=1, rate=0.0))
    gap = {name: [scores(base, one, m)[0] - scores(base, one, m)[1] for m in (1.0, -1.0)]
           for name, one in (("trained", column), ("start", start))}  # fmt: skip
    assert gap["trained"][0] > gap["start"][0]
    assert gap["trained"][1] < gap["start"][1]
    told = [json.loads(line) for line in (tmp_path / "reps.jsonl").read_text().splitlines()]
    assert min(row["dev"] for row in told) < told[0]["dev"]


@torch.no_grad()
def test_the_loss_is_what_the_paper_writes(base: Base) -> None:
    from training.methods.base import FitInputs

    activations = extract(base.model, base.tokenizer, texts(), [SITE])
    inputs = FitInputs(activations, {NAME: [SITE]}, False, base=base, samples=texts())
    trainer = _Trainer(inputs, RepsConfig(), NAME, SITE)
    vector = torch.randn(base.model.config.hidden_size, generator=torch.Generator().manual_seed(1))
    pair = trainer.pairs[Split.TRAIN][0]
    rows = [pair.positive, pair.negative]
    plain = [float(trainer.log_probabilities([row], None, 0.0)) for row in rows]
    assert pair.preference == pytest.approx(plain[0] - plain[1], abs=1e-4)
    expected = 0.0
    for sign, (wanted, other) in ((1, (0, 1)), (-1, (1, 0))):
        found = [float(trainer.log_probabilities([row], vector, sign * 0.5)) / len(row.targets) for row in rows]
        weight = max(plain[other] - plain[wanted], 1.0)
        expected += math.log1p(math.exp(-(weight * found[wanted] - found[other])))
    assert float(trainer.loss([pair], vector, 0.5)) == pytest.approx(expected, rel=1e-4)
    steered = log_likelihoods(base.model, rows, columns=[], multipliers=None)
    assert [float(one.sum()) for one in steered] == pytest.approx(plain, abs=1e-3)


def test_pairs_are_of_one_prompt_and_split() -> None:
    made = [*texts(), Sample(NAME, "Q: train 0? A:", " fine bees", True, "train0", Split.TRAIN),
            Sample(NAME, "alone", " good", True, "x", Split.TRAIN), *texts("other")]  # fmt: skip
    found = pairs_of(made, NAME, Split.TRAIN)
    assert len(found) == 5
    assert all(one.prompt == other.prompt and one.label and not other.label for one, other in found)
    assert Pair(Encoded((1,), 0, 0), Encoded((2,), 0, 0)).preference == 0


def test_an_interrupted_fit_ends_as_if_it_had_not_been(
    base: Base, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the second of two attributes: the first is read, not run, and the log has every row once."""
    samples = [*texts(), *texts("other")]
    activations, config = extract(base.model, base.tokenizer, samples, [SITE]), RepsConfig(steps=12)

    def fitted(folder: Path) -> Any:
        return fit(activations, [SITE], Recipe(config), folder=folder, base=base, samples=samples)

    whole = fitted(tmp_path / "whole")
    steps, loss = 0, _Trainer.loss

    def counted(self: _Trainer, pairs: Any, vector: Any, multiplier: float) -> Any:
        nonlocal steps
        steps += vector.requires_grad
        if steps > limit:
            raise KeyboardInterrupt
        return loss(self, pairs, vector, multiplier)

    monkeypatch.setattr(_Trainer, "loss", counted)
    monkeypatch.setattr("training.methods.state.SECONDS", 0.0)
    limit = 12 + 5
    with pytest.raises(KeyboardInterrupt):
        fitted(tmp_path / "cut")
    steps, limit = 0, 12 - 5
    resumed = fitted(tmp_path / "cut")
    assert [torch.equal(one.vector, other.vector) for one, other in zip(resumed, whole, strict=True)] == [True, True]
    logs = [(tmp_path / name / "reps.jsonl").read_text() for name in ("cut", "whole")]
    assert logs[0] == logs[1]
    steps = limit = 0
    assert torch.equal(fitted(tmp_path / "cut")[1].vector, whole[1].vector)
    assert (tmp_path / "cut/reps.jsonl").read_text() == logs[1]


def test_the_state_of_another_fit_is_refused(base: Base, tmp_path: Path) -> None:
    trained(base, RepsConfig(steps=1), tmp_path)
    with pytest.raises(FitError, match="holds a fit with other settings or data"):
        trained(base, RepsConfig(steps=2), tmp_path)


def test_stored_activations_are_not_enough(base: Base) -> None:
    activations = extract(base.model, base.tokenizer, texts(), [SITE])
    with pytest.raises(FitError, match="--method reps is trained through the model"):
        fit(activations, [SITE], Recipe(RepsConfig()))
