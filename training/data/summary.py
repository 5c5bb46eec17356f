"""What is in the data: counts by attribute and split, and an example of each side."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rich.markup import escape
from rich.table import Table

from training.data.samples import Sample, Split, show_turns

COLUMNS = ("attribute", "split", "positive", "negative", "groups")


def count_samples(samples: Sequence[Sample]) -> list[dict[str, Any]]:
    """One entry an attribute and split: `COLUMNS`."""
    counts = []
    for attribute in dict.fromkeys(sample.attribute for sample in samples):
        for split in Split:
            own = [sample for sample in samples if sample.attribute == attribute and sample.split is split]
            positive = sum(sample.label for sample in own)
            groups = len({sample.group for sample in own})
            values = (attribute, split.value, positive, len(own) - positive, groups)
            counts.append(dict(zip(COLUMNS, values, strict=True)))
    return counts


def missing_sides(samples: Sequence[Sample], splits: Sequence[Split] = tuple(Split)) -> Iterator[str]:
    """A sentence for each side of an attribute that a split has not got."""
    counts = count_samples(samples)
    for attribute in dict.fromkeys(sample.attribute for sample in samples):
        own = [count for count in counts if count["attribute"] == attribute]
        for side in ("positive", "negative"):
            bare = [count["split"] for count in own if not count[side] and count["split"] in splits]
            if not any(count[side] for count in own):
                yield f"Attribute {attribute!r} has no {side} sample at all."
            elif bare:
                groups = sum(count["groups"] for count in own)
                yield (
                    f"Attribute {attribute!r} has no {side} sample in {' and '.join(bare)}: its samples are of "
                    f"{groups} group{'s' if groups != 1 else ''}, and a group is in one split."
                )


def counts_table(counts: Sequence[Mapping[str, Any]]) -> Table:
    table = Table(title="Samples")
    for name in COLUMNS:
        table.add_column(name, justify="left" if name in COLUMNS[:2] else "right")
    for count in counts:
        table.add_row(*(escape(str(count[name])) for name in COLUMNS), end_section=count["split"] == Split.TEST)
    return table


def examples_table(samples: Sequence[Sample]) -> Table:
    """The first positive and the first negative sample of each attribute."""
    first: dict[tuple[str, bool], Sample] = {}
    for sample in samples:
        first.setdefault((sample.attribute, sample.label), sample)
    table = Table(title="Examples", show_lines=True)
    for name in ("attribute", "label", "prompt", "completion"):
        table.add_column(name, overflow="fold")
    for attribute in dict.fromkeys(attribute for attribute, _ in first):
        for label, side in ((True, "positive"), (False, "negative")):
            if shown := first.get((attribute, label)):
                prompt = show_turns(shown.turns) if shown.turns else shown.prompt
                table.add_row(*map(escape, (attribute, side, _short(prompt), _short(shown.completion))))
    return table


def _short(text: str) -> str:
    return text if len(text) <= 200 else text[:197] + "..."
