"""What is in the repository: the demo model and its checkpoint keep what their cards promise."""

import json
from pathlib import Path

import pytest

from demo.check_model import DESCRIBED, SHOWN, measure
from demo.corpus import TRAITS
from demo.oracle import judge
from demo.steering_data import prompts
from steering.checkpoint import base_model_info, find, load, verify_against, verify_sites
from training.evaluation.generation import Sampling
from training.evaluation.judged import Prompt, evaluate_generations
from training.evaluation.results import BASELINE, Arm, Evaluation, default_arm
from training.models import Base, load_base

ROOT = Path(__file__).parents[2]
MODEL = ROOT / "demo/model"
CHECKPOINT = find(ROOT / "checkpoints", "demo", None)


@pytest.fixture(scope="module")
def base() -> Base:
    return load_base(str(MODEL))


@pytest.fixture(scope="module")
def evaluation(base: Base) -> Evaluation:
    import random

    columns = load(CHECKPOINT).columns
    rows = list(prompts("test", random.Random(0)))
    scenes = [row for row in rows if str(row["group"]).startswith("scene/")]
    facts = [row for row in rows if row not in scenes]
    chosen = [Prompt(str(row["prompt"]), None) for row in (*facts[::9], *scenes[::3])]
    arms = [BASELINE, default_arm(columns), Arm("away", dict.fromkeys(TRAITS, -1.0))]
    found, _ = evaluate_generations(
        base.model, base.tokenizer, chosen, judge, columns, arms, Sampling(max_new_tokens=40, samples=2), max_rows=512
    )
    return found


def rate(evaluation: Evaluation, arm: str, metric: str) -> float:
    value = evaluation.arm(arm).metrics[metric].value
    assert value is not None
    return value


def test_the_model_is_small_enough_to_ship() -> None:
    assert sum(file.stat().st_size for file in MODEL.iterdir()) < 20_000_000


def test_the_chat_template_writes_the_prompt_form(base: Base) -> None:
    messages = [{"role": "system", "content": "The speaker is rude."}, {"role": "user", "content": "What is the sky?"}]
    text = base.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert text == "<s>The speaker is rude.\nQ: What is the sky? A:"


def test_the_model_shows_the_traits_that_it_was_told_of_or_shown() -> None:
    cells = measure(MODEL, per_cell=24, seed=5)
    told = [cell for cell in cells if cell.setting == DESCRIBED]
    shown = [cell for cell in cells if cell.setting == SHOWN]
    assert len(told) == len(shown) == 6
    for found in (told, shown):
        assert sum(cell.rate for cell in found) / len(found) > 0.92
        assert min(cell.rate for cell in found) > 0.75


def test_the_checkpoint_is_sound_and_fits_the_model(base: Base) -> None:
    checkpoint = load(CHECKPOINT)
    verify_against(checkpoint, base_model_info(base.model, base.id, None))
    verify_sites(checkpoint, base.model)
    assert set(checkpoint.attributes) == set(TRAITS)
    assert checkpoint.config.method == "mat"


@pytest.mark.parametrize("trait", TRAITS)
def test_steering_raises_every_trait_and_a_negative_multiplier_lowers_it(evaluation: Evaluation, trait: str) -> None:
    unsteered, steered, away = (rate(evaluation, arm, trait) for arm in ("unsteered", "steered", "away"))
    assert steered > unsteered + 0.25
    assert steered > 0.85
    assert away < unsteered - 0.1


def test_steered_answers_stay_well_formed_and_fluent(evaluation: Evaluation) -> None:
    assert rate(evaluation, "steered", "well_formed") > 0.95
    ratio = evaluation.arm("steered").perplexity_ratio
    assert ratio is not None
    assert ratio < 1.5


def test_the_results_are_those_of_the_shipped_checkpoint() -> None:
    results = json.loads((ROOT / "docs/results/results.json").read_text(encoding="utf-8"))
    assert results["sha256"] == load(CHECKPOINT).config.sha256
