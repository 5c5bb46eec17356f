"""Train, dev and test by group: seeded, independent of the order of the rows, checked for leaks."""

import random
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import replace

from training.data.records import Sample, Split
from training.errors import DataError

FRACTIONS = (0.4, 0.1, 0.5)
"""Shares of train, dev and test: the split used for TruthfulQA in arXiv 2502.12446."""


def split_samples(
    samples: Sequence[Sample], *, seed: int = 0, fractions: tuple[float, float, float] = FRACTIONS
) -> list[Sample]:
    """The samples in their order, each with its split.

    An explicit split decides for its whole group. The other groups are shuffled with `seed` and cut by `fractions`,
    separately for every set of attributes that shares groups, so that each attribute gets its shares. Raises
    DataError for fractions that are no shares and for leaks (see `check_leaks`).
    """
    if min(fractions) < 0 or abs(sum(fractions) - 1) > 1e-6:
        raise DataError(f"Split fractions must be three shares that sum to 1, got {fractions}.")
    chosen = _explicit(samples)
    for groups in _strata(samples, chosen):
        random.Random(seed).shuffle(groups)
        train = round(fractions[0] * len(groups))
        dev = train + round(fractions[1] * len(groups))
        for position, group in enumerate(groups):
            chosen[group] = Split.TRAIN if position < train else Split.DEV if position < dev else Split.TEST
    placed = [replace(sample, split=chosen[sample.group]) for sample in samples]
    check_leaks(placed)
    return placed


def check_leaks(samples: Iterable[Sample]) -> None:
    """Raise DataError when one group, or one and the same labelled text of an attribute, is in two splits."""
    groups: dict[str, Sample] = {}
    texts: dict[tuple[str, str], Sample] = {}
    for sample in samples:
        other = groups.setdefault(sample.group, sample)
        if other.split is not sample.split:
            raise DataError(f"Group {sample.group!r} is in two splits, {other.split} and {sample.split}.")
        other = texts.setdefault((sample.attribute, " ".join(sample.text.split()).casefold()), sample)
        if other.split is not sample.split:
            raise DataError(
                f"The text {_short(sample.text)!r} is in two splits, {other.split} and {sample.split} "
                f"(groups {other.group!r} and {sample.group!r}): give both the same group."
            )


def _explicit(samples: Iterable[Sample]) -> dict[str, Split]:
    chosen: dict[str, Split] = {}
    for sample in samples:
        if sample.split is None:
            continue
        if chosen.setdefault(sample.group, sample.split) is not sample.split:
            raise DataError(f"Group {sample.group!r} is in two splits, {chosen[sample.group]} and {sample.split}.")
    return chosen


def _strata(samples: Iterable[Sample], chosen: dict[str, Split]) -> list[list[str]]:
    attributes: dict[str, set[str]] = defaultdict(set)
    for sample in samples:
        if sample.group not in chosen:
            attributes[sample.group].add(sample.attribute)
    strata: dict[tuple[str, ...], list[str]] = defaultdict(list)
    for group in sorted(attributes):
        strata[tuple(sorted(attributes[group]))].append(group)
    return [strata[key] for key in sorted(strata)]


def _short(text: str) -> str:
    return text if len(text) <= 80 else text[:77] + "..."
