"""Goals rank settings; strengths are found alone first, then beside each other."""

import json
from collections.abc import Sequence
from dataclasses import asdict, replace
from math import exp

import numpy as np
import pytest

from training.errors import TrainingError
from training.evaluation.results import BASELINE, Arm, ArmMeasures, ArmResult, Estimate, Measured, compared
from training.evaluation.sweep import best_alone, combine
from training.evaluation.sweep_results import Goal


def result(arm: str = "arm", ratio: float | None = 1.0, **metrics: float) -> ArmResult:
    return ArmResult(arm, {}, {name: Estimate(value, 0, 1, 10) for name, value in metrics.items()}, 5.0, ratio)


def test_a_goal_counts_the_metrics_that_it_names() -> None:
    arm = result(truth=0.8, tone=0.6, formed=0.1)
    assert Goal(("truth", "tone")).score(arm) == pytest.approx(0.7)
    assert Goal().score(arm) == pytest.approx(0.5)
    assert Goal(("truth",)).score(arm, "tone") == 0.6


def test_multiple_choice_counts_mc2() -> None:
    arm = ArmResult("arm", {}, {f"truth {name}": Estimate(x, 0, 1, 9) for name, x in (("mc1", 0.2), ("mc2", 0.4))})
    assert Goal().score(arm) == 0.4
    assert Goal().score(arm, "truth") == 0.4


@pytest.mark.parametrize(
    ("ratio", "formed", "sound"), [(1.5, 0.9, True), (1.51, 0.9, False), (1.0, 0.89, False), (None, 1.0, True)]
)
def test_a_setting_beyond_the_limits_is_not_sound(ratio: float | None, formed: float, sound: bool) -> None:
    assert (Goal(keep={"formed": 0.9}).shortfall(result(ratio=ratio, formed=formed)) == 0) is sound


@pytest.mark.parametrize(("name", "most"), [("rep-4", 0.1), ("empty", 0.1), ("kl", 1.0)])
def test_damage_has_limits_by_default(name: str, most: float) -> None:
    def damaged(value: float, before: float = 0.0) -> ArmResult:
        damage, moved = Estimate(value, 0, 1, 90), Estimate(value - before, 0, 1, 90)
        return replace(result(truth=1.0), damage={name: damage}, differences={name: moved} if before else {})

    assert Goal().shortfall(damaged(most)) == 0
    assert Goal().shortfall(damaged(2 * most)) == pytest.approx(1)
    assert Goal().shortfall(damaged(2 * most, before=most)) == pytest.approx(0)
    assert Goal().rank(damaged(2 * most)) < Goal().rank(result(truth=0.1))


@pytest.mark.parametrize("name", ["rep-4", "empty"])
@pytest.mark.parametrize(
    ("answers", "bad", "before", "sound"),
    [(8, 1, 0, True), (8, 2, 0, False), (8, 2, 1, True), (8, 3, 1, False), (40, 4, 0, True), (40, 5, 0, False)],
)
def test_one_answer_of_few_is_no_reason_to_leave_a_setting_out(
    name: str, answers: int, bad: int, before: int, sound: bool
) -> None:
    arms = [
        ArmMeasures(arm, {}, {name: Measured(np.array([(float(i < count), 1.0) for i in range(answers)]), ids)})
        for ids in [tuple(map(str, range(answers)))]
        for arm, count in ((BASELINE, before), (Arm("steered", {"truth": 1.0}), bad))
    ]
    assert (Goal().shortfall(compared(arms)[1]) == 0) is sound


@pytest.mark.parametrize(("costs", "sound"), [([150] * 8, False), ([100] * 7 + [350], True), ([100] * 8, True)])
def test_a_perplexity_that_few_answers_cannot_tell_from_the_unsteered_one_is_no_reason(
    costs: list[float], sound: bool
) -> None:
    ids = tuple(map(str, range(8)))
    arms = []
    for arm, own in ((BASELINE, [100.0] * 8), (Arm("steered", {"truth": 1.0}), costs)):
        surprise = Measured(np.array([(cost, 50.0) for cost in own]), ids)
        arms.append(ArmMeasures(arm, {}, perplexity=exp(sum(own) / 400), surprise=surprise))
    plain, found = compared(arms)
    assert plain.perplexity_range is None
    low, high = found.perplexity_range or (0, 0)
    assert low <= (found.perplexity_ratio or 0) <= high
    assert (found.perplexity_ratio or 0) > 1.5 or costs == [100] * 8
    assert (Goal().shortfall(found) == 0) is sound
    assert ArmResult.from_dict(json.loads(json.dumps(asdict(found)))) == found


def test_a_sound_setting_goes_before_a_better_one_that_is_not() -> None:
    goal = Goal(keep={"formed": 0.9})
    assert goal.rank(result(formed=0.9)) > goal.rank(result(formed=0.8, truth=1.0))


def test_of_settings_that_are_not_sound_the_nearest_to_the_limits_goes_first() -> None:
    goal = Goal(keep={"formed": 0.9})
    assert goal.rank(result(formed=0.8)) > goal.rank(result(formed=0.5, truth=1.0))
    assert goal.rank(result(formed=0.9, ratio=1.6)) > goal.rank(result(formed=0.9, ratio=3.0))
    assert goal.shortfall(result(formed=0.45, ratio=3.0)) == pytest.approx(1.5)


def test_what_an_attribute_does_to_the_others_counts_beyond_the_limit() -> None:
    goal = Goal(("truth", "tone"), keep={"formed": 0.5}, max_side_effect=0.05)
    unsteered = result(truth=0.5, tone=0.5, formed=1.0)
    quiet, loud = result(truth=0.8, tone=0.46, formed=0.7), result(truth=0.9, tone=0.6, formed=1.0)
    assert goal.shortfall(quiet, "truth", unsteered) == 0
    assert goal.shortfall(loud, "truth", unsteered) == pytest.approx(0.05)
    assert goal.rank(quiet, "truth", unsteered) > goal.rank(loud, "truth", unsteered)
    assert goal.rank(quiet) < goal.rank(loud)  # all at once: every change is wanted


def test_the_weakest_of_those_that_are_as_good_is_taken() -> None:
    ranks = [(0.0, 0.95), (0.0, 0.99), (0.0, 0.985), (-0.1, 1.0)]
    assert Goal().best(ranks, [0.5, 2.0, 1.0, 0.1]) == 1
    assert Goal(tolerance=0.01).best(ranks, [0.5, 2.0, 1.0, 0.1]) == 2
    assert Goal(tolerance=0.05).best(ranks, [0.5, 2.0, 1.0, 0.1]) == 0
    assert Goal(tolerance=0.05).best(ranks[:2], [1.0, 1.0]) == 1
    assert Goal(tolerance=0.05).best(ranks, [0.5, 2.0, 1.0, 0.1], metrics=4) == 2


@pytest.mark.parametrize("goal", [Goal(("truht",)), Goal(keep={"truht": 1})])
def test_an_unknown_metric_is_named(goal: Goal) -> None:
    with pytest.raises(TrainingError, match="no metric 'truht'; there are truth"):
        goal.rank(result(truth=1.0))


def test_a_metric_that_should_be_low_counts_the_other_way() -> None:
    arm = result(tone=0.8, rude=0.1)
    goal = Goal(("tone", "not rude"), keep={"not rude": 0.95})
    assert goal.score(arm) == pytest.approx(0.85)
    assert goal.shortfall(arm) == pytest.approx(1 - 0.9 / 0.95)
    moved = {"tone": Estimate(0.2, 0.1, 0.3, 9), "rude": Estimate(-0.3, -0.4, -0.1, 9)}
    assert goal.gains(arm, moved) == {"tone": moved["tone"], "not rude": Estimate(0.3, 0.1, 0.4, 9)}
    with pytest.raises(TrainingError, match="no metric 'ruod'; there are tone, rude"):
        Goal(("not ruod",)).score(arm)


def test_a_metric_may_be_called_not_something() -> None:
    arm = replace(result(truth=0.2), metrics={"not hate": Estimate(0.9, 0, 1, 9), "hate": Estimate(0.3, 0, 1, 9)})
    assert Goal(metrics=("not hate",)).score(arm) == pytest.approx(0.9)
    assert Goal(metrics=("not hate", "hate")).score(arm) == pytest.approx(0.6)


def test_judged_metrics_that_are_named_after_what_is_steered_count_alone() -> None:
    found = {"tone": 0.9, "tone tone": 0.6, "tone long": 0.1, "truth long": 0.2}
    arm = ArmResult("arm", {}, {name: Estimate(value, 0, 1, 10) for name, value in found.items()})
    assert Goal(attributes=("tone", "truth")).counted(arm) == ["tone", "tone tone"]
    assert Goal(attributes=("truth",)).counted(arm) == [*found]
    assert Goal(("tone long",), attributes=("tone",)).score(arm, "tone") == 0.1
    assert Goal(attributes=("tone",)).score(arm, "tone") == pytest.approx(0.75)


def test_an_attribute_without_a_metric_is_named() -> None:
    with pytest.raises(TrainingError, match="named after 'tone'; there are truth"):
        Goal().score(result(truth=1.0), "tone")


def crowded(arms: Sequence[Arm]) -> list[ArmResult]:
    """Each attribute is best at 2 by itself; together they break the text beyond a sum of 3."""
    found = []
    for arm in arms:
        values = {name: 1 - abs(arm.attributes.get(name, 0.0) - 2) / 4 for name in ("truth", "tone")}
        found.append(result(arm.name, formed=1.0 if sum(arm.attributes.values()) <= 3 else 0.5, **values))
    return found


def test_the_best_strength_alone() -> None:
    goal = Goal(keep={"formed": 0.9})
    assert best_alone(crowded, ("truth", "tone"), (1.0, 2.0, 3.0), goal) == {"truth": 2.0, "tone": 2.0}


def test_strengths_together_stay_within_the_limits() -> None:
    goal = Goal(("truth", "tone"), keep={"formed": 0.9})
    found = combine(crowded, {"truth": 2.0, "tone": 2.0}, goal)
    assert sum(found.values()) <= 3
    assert goal.score(crowded([Arm("found", found)])[0]) >= 0.8


def test_strengths_that_go_together_stay_as_they_are() -> None:
    assert combine(crowded, {"truth": 2.0}, Goal()) == {"truth": 2.0}
