"""Train, dev and test by group: seeded, independent of the order of the rows, checked for leaks, and stored.

`splits.json` beside a checkpoint's `config.json` says which group was in which split when it was trained.
"""

import hashlib
import json
import logging
import random
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from training.data.samples import Sample, Split
from training.errors import DataError

log = logging.getLogger(__name__)

FRACTIONS = (0.4, 0.1, 0.5)
"""Shares of train, dev and test: the split used for TruthfulQA in arXiv 2502.12446."""

SPLITS = "splits.json"
FORMAT_VERSION = 1


def split_samples(
    samples: Sequence[Sample],
    *,
    seed: int = 0,
    fractions: tuple[float, float, float] = FRACTIONS,
    known: Mapping[str, Split] | None = None,
) -> list[Sample]:
    """The samples in their order, each with its split.

    Groups that share a text of one attribute are one group to the split. `known` (group -> split) decides first, then
    an explicit split, each for its whole group. The other groups are shuffled with `seed` and cut by `fractions`,
    separately for every set of attributes that shares groups, so that each attribute gets its shares; where an
    attribute has explicit test samples, the rest goes to train and dev alone, in their proportion. Raises DataError
    for fractions that are no shares and for leaks (see `check_leaks`).
    """
    if min(fractions) < 0 or abs(sum(fractions) - 1) > 1e-6:
        raise DataError(f"Split fractions must be three shares that sum to 1, got {fractions}.")
    tied = _tied_groups(samples)
    chosen = _chosen(samples, tied, known or {})
    for attributes, groups in _strata(samples, tied, chosen).items():
        shares = _shares(fractions, any(s.split is Split.TEST and s.attribute in attributes for s in samples))
        random.Random(seed).shuffle(groups)
        train = round(shares[0] * len(groups))
        dev = train + round(shares[1] * len(groups))
        for position, group in enumerate(groups):
            chosen[group] = Split.TRAIN if position < train else Split.DEV if position < dev else Split.TEST
    placed = [replace(sample, split=chosen[tied[sample.group]]) for sample in samples]
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
        other = texts.setdefault(_text_key(sample), sample)
        if other.split is not sample.split:
            raise DataError(
                f"The text {_short(sample.text)!r} is in two splits, {other.split} and {sample.split} "
                f"(groups {other.group!r} and {sample.group!r}): give both the same group."
            )


def _text_key(sample: Sample) -> tuple[str, str]:
    return sample.attribute, " ".join(sample.text.split()).casefold()


def _tied_groups(samples: Iterable[Sample]) -> dict[str, str]:
    """Group -> the first, by name, of the groups that it is tied to by shared texts (a union-find over groups)."""
    parent: dict[str, str] = {}
    holder: dict[tuple[str, str], str] = {}

    def first(group: str) -> str:
        while parent[group] != group:
            parent[group] = group = parent[parent[group]]
        return group

    for sample in samples:
        parent.setdefault(sample.group, sample.group)
        one, other = sorted((first(sample.group), first(holder.setdefault(_text_key(sample), sample.group))))
        parent[other] = one
    return {group: first(group) for group in parent}


def _chosen(samples: Iterable[Sample], tied: Mapping[str, str], known: Mapping[str, Split]) -> dict[str, Split]:
    chosen: dict[str, tuple[Split, str]] = {}
    for sample in samples:
        split = known.get(sample.group, sample.split)
        if split is None:
            continue
        other, group = chosen.setdefault(tied[sample.group], (split, sample.group))
        if other is not split:
            raise DataError(
                f"Group {group!r} is in two splits, {other} and {split}."
                if group == sample.group
                else f"Groups {group!r} and {sample.group!r} share a text and are in two splits, {other} and {split}."
            )
    return {group: split for group, (split, _) in chosen.items()}


def _strata(
    samples: Iterable[Sample], tied: Mapping[str, str], chosen: Mapping[str, Split]
) -> dict[tuple[str, ...], list[str]]:
    attributes: dict[str, set[str]] = defaultdict(set)
    for sample in samples:
        if tied[sample.group] not in chosen:
            attributes[tied[sample.group]].add(sample.attribute)
    strata: dict[tuple[str, ...], list[str]] = defaultdict(list)
    for group in sorted(attributes):
        strata[tuple(sorted(attributes[group]))].append(group)
    return dict(sorted(strata.items()))


def _shares(fractions: tuple[float, float, float], has_test: bool) -> tuple[float, float]:
    train, dev, _ = fractions
    return (train / (train + dev), dev / (train + dev)) if has_test and train + dev else (train, dev)


def _short(text: str) -> str:
    return text if len(text) <= 80 else text[:77] + "..."


def group_id(group: str) -> str:
    """12 hex digits of the group's sha256: short, and no text of the data travels with a checkpoint."""
    return hashlib.sha256(group.encode()).hexdigest()[:12]


def dump_splits(samples: Sequence[Sample], *, seed: int, fractions: Sequence[float] = FRACTIONS) -> bytes:
    """JSON: seed, fractions and, attribute by attribute, the ids of each split's groups."""
    splits: dict[str, dict[str, set[str]]] = defaultdict(lambda: {split.value: set() for split in Split})
    for sample in samples:
        if sample.split is not None:
            splits[sample.attribute][sample.split.value].add(group_id(sample.group))
    listed = {name: {split: sorted(ids) for split, ids in found.items()} for name, found in splits.items()}
    content = {"format_version": FORMAT_VERSION, "seed": seed, "fractions": list(fractions), "splits": listed}
    return (json.dumps(content, ensure_ascii=False) + "\n").encode()


def read_splits(folder: Path) -> dict[str, Split] | None:
    """Group id -> split, of all attributes; None where the checkpoint has no `splits.json`. Raises DataError."""
    path = folder / SPLITS
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if content["format_version"] != FORMAT_VERSION:
            raise ValueError(f"format_version {content['format_version']!r}")
        listed = [(Split(split), ids) for found in content["splits"].values() for split, ids in found.items()]
        return {str(id): split for split, ids in listed for id in ids}
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{path} does not hold the splits of a checkpoint: {error!r}.") from None


def split_as_trained(samples: Sequence[Sample], folder: Path, *, seed: int = 0) -> list[Sample]:
    """The samples in the splits of the checkpoint in `folder`.

    Groups that it does not know were not trained on: they are split anew, by `seed`, with a warning. Raises DataError.
    """
    stored = read_splits(folder)
    if stored is None:
        if any(sample.split is None for sample in samples):
            log.warning(
                "%s has no %s: the data are split by seed %d, which has to be the seed that it was trained with.",
                folder, SPLITS, seed,
            )  # fmt: skip
        return split_samples(samples, seed=seed)
    groups = {sample.group: group_id(sample.group) for sample in samples}
    known = {group: stored[id] for group, id in groups.items() if id in stored}
    unknown = Counter(attribute for attribute, group in {(s.attribute, s.group) for s in samples} if group not in known)
    for attribute, count in sorted(unknown.items()):
        log.warning(
            "%d groups of %s were not there when the checkpoint was trained: they are split by seed %d.",
            count, attribute, seed,
        )  # fmt: skip
    return split_samples(samples, seed=seed, known=known)
