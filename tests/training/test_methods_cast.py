"""CAST: a condition that tells prompts apart, and a vector that acts where it holds."""

import json
from pathlib import Path

import pytest
import torch

from steering import Gate, Reading, Site, SiteKind
from tests.training.planted import unit_vector
from training.activations import Pool
from training.activations.store import Activations
from training.data.samples import Split
from training.errors import FitError
from training.methods.base import Direction
from training.methods.cast import CastConfig, Hold, best_threshold, fit_condition
from training.methods.fit import Recipe, fit

READ, STEERED, WIDTH = Site(1, SiteKind.RESIDUAL), Site(2, SiteKind.RESIDUAL), 24
ASKS, TONE = unit_vector(WIDTH, 1), unit_vector(WIDTH, 2)


def activations(
    gap: float = 6.0, *, tokens: int = 3, splits: tuple[Split, ...] = (Split.TRAIN, Split.DEV)
) -> Activations:
    """Every sample has `tokens` rows, of which the first alone says at READ whether the prompt is one to steer."""
    random = torch.Generator().manual_seed(0)
    splits, sides = (Split.TRAIN, Split.DEV), (True, False)
    rows = [(name, label, split, n) for name in ("tone", "asks") for split in splits for n in range(30)
            for label in sides]  # fmt: skip
    common = 4 * unit_vector(WIDTH, 9)
    values: dict[Site, list[torch.Tensor]] = {READ: [], STEERED: []}
    for name, label, _, _ in rows:
        for token in range(tokens):
            sign = 1 if label else -1
            for site, direction, acts in ((READ, ASKS, name == "asks" and token == 0), (STEERED, TONE, name == "tone")):
                noise = 0.5 * torch.randn(WIDTH, generator=random)
                values[site].append(common + noise + sign * acts * gap / 2 * direction)
    owners = torch.arange(len(rows)).repeat_interleave(tokens)
    return Activations(
        {site: torch.stack(own) for site, own in values.items()},
        tuple(rows[i][0] for i in owners),
        torch.tensor([rows[i][1] for i in owners]),
        tuple(f"{rows[i][2]}{rows[i][3]}" for i in owners),
        tuple(rows[i][2] for i in owners),
        owners,
        Pool.TOKENS,
    )


@pytest.mark.parametrize("direction", [Direction.MEAN, Direction.PCA])
@pytest.mark.parametrize("hold", Hold)
def test_one_column_for_what_is_steered_and_none_for_the_condition(
    direction: Direction, hold: Hold, tmp_path: Path
) -> None:
    planted = activations()
    recipe = Recipe(CastConfig("asks", READ, hold, direction))
    (column,) = fit(planted, [STEERED], recipe, folder=tmp_path)
    assert (column.attribute, column.site, column.gate, column.keep_norm) == ("tone", STEERED, Gate.COSINE, False)
    assert column.reads == Reading(READ, latched=hold is Hold.PROMPT)
    assert float(torch.cosine_similarity(column.vector, TONE, dim=0)) > 0.9
    assert float(torch.cosine_similarity(column.gate_weight, ASKS, dim=0)) > 0.9
    told = json.loads((tmp_path / "condition.json").read_text())
    assert (told["condition"], told["reads"]) == ("asks", "1.residual")
    assert told["train F1"] == told["dev F1"] == 1
    assert told["threshold"] == pytest.approx(-column.gate_bias)


def test_the_condition_is_of_last_prompt_tokens_alone() -> None:
    """Other tokens say nothing: with them no threshold would do."""
    condition = fit_condition(activations(), "asks", READ)
    prompts = activations(tokens=1)
    rows = [prompts.rows(attribute="asks", label=label, split=Split.DEV) for label in (True, False)]
    assert [float(condition.holds(prompts.at(READ)[own]).float().mean()) for own in rows] == [1.0, 0.0]


@pytest.mark.parametrize(
    ("positive", "negative", "threshold", "f1"),
    [
        ([0.5, 0.6], [0.1, 0.2], 0.35, 1.0),
        ([0.5, 0.15], [0.1, 0.2, 0.05], 0.125, 0.8),
        ([0.3], [0.9], 0.299, 2 / 3),
        ([0.2, 0.2], [0.2], 0.199, 0.8),
    ],
)
def test_the_threshold_has_the_best_f1(
    positive: list[float], negative: list[float], threshold: float, f1: float
) -> None:
    found = best_threshold(torch.tensor(positive), torch.tensor(negative))
    assert found == (pytest.approx(threshold, abs=2e-3), pytest.approx(f1))
    grid = torch.linspace(-1, 1, 2001)
    hits, alarms = ((torch.tensor(side)[None] > grid[:, None]).sum(1) for side in (positive, negative))
    assert f1 == pytest.approx(float((2 * hits / (len(positive) + hits + alarms)).max()))


def test_a_condition_that_tells_nothing_apart_is_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    fit(activations(0.0), [STEERED], Recipe(CastConfig("asks", READ)))
    assert "the condition 'asks' is told apart badly at 1.residual" in caplog.text


@pytest.mark.parametrize(
    ("config", "sites", "message"),
    [
        (("wants", READ), [STEERED], "--condition names 'wants'; the data have tone, asks"),
        (("asks", STEERED), [READ], "--reads 2.residual has to come before 1.residual"),
    ],
)
def test_what_does_not_fit_is_refused(config: tuple[str, Site], sites: list[Site], message: str) -> None:
    with pytest.raises(FitError, match=message):
        fit(activations(), sites, Recipe(CastConfig(*config)))


def test_a_condition_is_needed() -> None:
    with pytest.raises(FitError, match="needs --condition"):
        CastConfig()
