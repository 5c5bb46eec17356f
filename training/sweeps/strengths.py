"""How strong each attribute should be: by itself, and beside the others."""

from collections.abc import Callable, Mapping, Sequence

from training.evaluation.arms import Arm
from training.evaluation.results import ArmResult
from training.sweeps.goal import Goal

Run = Callable[[Sequence[Arm]], Sequence[ArmResult]]
"""Measures arms, and gives their results in order."""
SCALES = (0.6, 0.8, 1.0, 1.2)


def arms_alone(names: Sequence[str], factors: Sequence[float]) -> list[Arm]:
    """Every attribute by itself at every factor."""
    return [Arm(f"{name} {factor:g}", {name: factor}) for name in names for factor in factors]


def best_alone(run: Run, names: Sequence[str], factors: Sequence[float], goal: Goal) -> dict[str, float]:
    """The factor at which each attribute by itself does best."""
    arms = arms_alone(names, factors)
    results = dict(zip([(name, factor) for name in names for factor in factors], run(arms), strict=True))
    return {name: max(factors, key=lambda factor: goal.rank(results[name, factor], name)) for name in names}


def combine(
    run: Run, alone: Mapping[str, float], goal: Goal, scales: Sequence[float] = SCALES, rounds: int = 2
) -> dict[str, float]:
    """Strengths for all attributes at once, from those that are best alone: first the best scale for all of them,
    then each in turn takes the scale that is best beside the others as they stand (coordinate ascent)."""

    def best(tried: Sequence[dict[str, float]]) -> dict[str, float]:
        results = run([Arm(f"setting {number}", setting) for number, setting in enumerate(tried)])
        sums = [sum(value / alone[name] for name, value in setting.items() if alone[name]) for setting in tried]
        return tried[goal.best([goal.rank(result) for result in results], sums, len(alone))]

    found = best([{name: scale * value for name, value in alone.items()} for scale in sorted(scales, reverse=True)])
    for _ in range(rounds):
        before = found
        for name in alone:
            found = best([found, *({**found, name: scale * alone[name]} for scale in scales)])
        if found == before:
            break
    return found
