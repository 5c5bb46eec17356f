"""What `make reproduce-real` has measured as a page, plots and the README's table: `python -m studies.real_results`."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from demo.readme import replace_between, rewrite
from training.evaluation.report import markdown_table as table
from training.evaluation.report import marked, save_figure, with_range
from training.evaluation.results import DAMAGE, Estimate

MARKERS = ("<!-- real results: written by make reproduce-real -->", "<!-- end of real results -->")
MAT, MEANS, ITI, PROBE = "MAT-Steer", "difference in means", "ITI", "probe"
UNSTEERED, IN_CONTEXT = "unsteered", "in-context prompt"
MEANS_THERE = "difference in means where MAT-Steer is"
NO_NORM, NO_ORTHO, ALIGNMENT = "no norm preservation", "no orthogonality", "alignment only"
METRICS = {
    "truthfulness mc1": "MC1",
    "truthfulness mc2": "MC2",
    "fairness accuracy": "BBQ",
    "fairness accuracy_ambiguous": "BBQ, ambiguous",
    "fairness accuracy_disambiguated": "BBQ, disambiguated",
    "non-toxicity accuracy": "ToxiGen",
}
SETS = ("truthfulness mc1", "truthfulness mc2", "fairness accuracy", "non-toxicity accuracy")
"""A metric for each benchmark of the paper, two for TruthfulQA."""
TRUTHFUL = SETS[:2]
PARTS = ("dev", "questions", "part")
SIMPLER = (IN_CONTEXT, ITI, MEANS, MEANS_THERE, PROBE)
SHORT = (UNSTEERED, *SIMPLER, MAT)
"""What the README shows."""


@dataclass(frozen=True)
class Claim:
    """`better` is above `worse` in the paper, on these metrics."""

    better: str
    worse: str
    metrics: tuple[str, ...]
    paper: str
    """The paper's numbers."""

    @property
    def key(self) -> str:
        return f"{self.better} - {self.worse}"


CLAIMS = (
    Claim(ITI, UNSTEERED, SETS, "52.7 / 52.6 / 53.5 and 49.9 / 48.1 / 51.8"),
    Claim(MAT, UNSTEERED, SETS, "61.9 / 57.6 / 60.3 and 49.9 / 48.1 / 51.8"),
    Claim(MAT, ITI, SETS, "61.9 / 57.6 / 60.3 and 52.7 / 52.6 / 53.5"),
    Claim(MAT, NO_NORM, TRUTHFUL, "61.9 and 59.9, TruthfulQA alone"),
    Claim(NO_NORM, ALIGNMENT, TRUTHFUL, "59.9 and 53.8, TruthfulQA alone"),
)
"""Orders of arXiv 2502.12446 on Llama-3.1-8B: TruthfulQA / ToxiGen / BBQ."""


def pairs(names: Sequence[str]) -> list[tuple[str, str]]:
    """What is compared beyond unsteered: MAT-Steer with all others, and what the paper compares."""
    found = [(MAT, name) for name in names if name not in (MAT, UNSTEERED)]
    return list(dict.fromkeys([*found, *((claim.better, claim.worse) for claim in CLAIMS)]))


def write(folder: Path, readme: Path) -> None:
    """Turn `folder`'s real.json into real.md and two plots beside it, and the README's table."""
    results = json.loads((folder / "real.json").read_text(encoding="utf-8"))
    (folder / "real.md").write_text(page(results), encoding="utf-8")
    plot_methods(results, folder / "real-methods.png")
    if "shares" in results:
        plot_shares(results, folder / "real-shares.png")
    replace_between(readme, MARKERS, summary(results))


# What the figures say.


def verdict(difference: Estimate) -> str:
    """Of a paired difference that should be above 0."""
    if difference.low is not None and difference.low > 0:
        return "holds"
    if difference.high is not None and difference.high < 0:
        return "is reversed"
    return "is open"


def judged(results: Mapping[str, Any]) -> list[tuple[Claim, str, Estimate, str]]:
    """Every order of the paper on every metric: claim, metric, difference, verdict."""
    found = []
    for claim in CLAIMS:
        for metric in claim.metrics:
            difference = Estimate(**results["pairs"][claim.key][metric])
            found.append((claim, metric, difference, verdict(difference)))
    return found


def statement(results: Mapping[str, Any]) -> str:
    """Where the results agree with the paper's order and where they do not, in words."""
    whole = judged(results)
    lines = [
        f"Of {len(whole)} orders of the paper, {_count(whole, 'holds')} hold here, {_count(whole, 'is reversed')} "
        f"{'is' if _count(whole, 'is reversed') == 1 else 'are'} reversed, and {_count(whole, 'is open')} stay open: "
        "the interval of the difference has zero in it."
    ]
    for word, title in (("holds", "As in the paper"), ("is reversed", "The other way round"), ("is open", "Open")):
        if own := [(claim, metric) for claim, metric, _, how in whole if how == word]:
            lines.append(f"- {title}: {'; '.join(_together(own))}.")
    return "\n".join(lines)


def _count(whole: Sequence[tuple[Claim, str, Estimate, str]], word: str) -> int:
    return sum(how == word for *_, how in whole)


def _together(found: Sequence[tuple[Claim, str]]) -> Iterator[str]:
    for claim in dict.fromkeys(claim for claim, _ in found):
        names = ", ".join(METRICS[metric] for one, metric in found if one == claim)
        yield f"{claim.better} above {claim.worse} ({names})"


def rivals(results: Mapping[str, Any]) -> str:
    """MAT-Steer beside each simpler method, in words."""
    lines = []
    for name in SIMPLER:
        found = {metric: Estimate(**results["pairs"][f"{MAT} - {name}"][metric]) for metric in SETS}
        words = {
            how: [f"{METRICS[metric]} {one.text(signed=True)}" for metric, one in found.items() if verdict(one) == how]
            for how in ("holds", "is reversed", "is open")
        }
        parts = [
            f"{title} {', '.join(words[how])}"
            for how, title in (("holds", "better on"), ("is reversed", "**worse on**"), ("is open", "no telling on"))
            if words[how]
        ]
        lines.append(f"- MAT-Steer beside {name}: {'; '.join(parts)}.")
    moved = next(line["differences"] for line in results["methods"] if line["method"] == MAT)
    apart = [moved.get(f"fairness accuracy_{where}") for where in ("ambiguous", "disambiguated")]
    if None not in apart:
        lines.append(
            f"- MAT-Steer moves BBQ by {_cell(apart[0], signed=True)} where the context leaves the question open and "
            f'"unknown" is right, by {_cell(apart[1], signed=True)} where it settles it.'
        )
    return "\n".join(lines)


# Tables.


def percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.1f}"


def metric_table(lines: Sequence[Mapping[str, Any]], constant: Mapping[str, float]) -> str:
    """Percent, with what the same answer to every question would score."""
    rows = [[line["method"], *(_cell(line["metrics"].get(name)) for name in METRICS)] for line in lines]
    rows.append(["the same answer always", *(percent(constant.get(name)) for name in METRICS)])
    return table(["method", *METRICS.values()], rows)


def _cell(one: Mapping[str, Any] | None, *, signed: bool = False) -> str:
    return "-" if one is None else Estimate(**one).text(signed=signed)


def difference_table(lines: Sequence[Mapping[str, Any]]) -> str:
    rows = [
        [line["method"], *(_cell(line["differences"].get(name), signed=True) for name in METRICS)]
        for line in lines
        if line["differences"]
    ]
    return table(["method", *METRICS.values()], rows)


DAMAGE_TITLES = ("perplexity", "repeated 4-grams", "empty", "KL, nats a token")


def damage_table(lines: Sequence[Mapping[str, Any]]) -> str:
    return table(["method", *DAMAGE_TITLES], [[line["method"], *_damage(line, intervals=True)] for line in lines])


def _damage(line: Mapping[str, Any], *, intervals: bool = False) -> list[str]:
    """A cell for each of `DAMAGE_TITLES`."""
    texts = [_ratio(line["perplexity_ratio"], line["perplexity_range"] if intervals else None)]
    for name in DAMAGE:
        one = Estimate(**line["damage"][name])
        scale, digits = (1, 3) if name == "kl" else (100, 1)
        text = one.text(scale=scale, digits=digits)
        texts.append(text if intervals else text.partition(" ")[0])
    return texts


def _ratio(value: float | None, ends: Sequence[float] | None = None) -> str:
    return "-" if value is None else with_range(f"{value:.2f}x", ends)


def _at(line: Mapping[str, Any]) -> str:
    return f"{line['place']} x{line['multiplier']:g}" if "place" in line else ""


def summary(results: Mapping[str, Any]) -> str:
    """The README's table, and what it says."""
    chosen = [line for line in results["methods"] if line["method"] in SHORT]
    rows = []
    for line in chosen:
        numbers = []
        for metric in SETS:
            value, moved = line["metrics"][metric]["value"], line["differences"].get(metric)
            numbers.append(marked(percent(value), Estimate(**moved) if moved else None))
        rows.append([line["method"], _at(line), *numbers, *_damage(line)])
    header = ["method", "place, strength", *(METRICS[metric] for metric in SETS), *DAMAGE_TITLES]
    same = results["constant"]
    rows.append(["the same answer always", "", *(percent(same.get(metric)) for metric in SETS), *[""] * 4])
    asked = [results["questions"][name]["questions"] for name in ("truthfulness", "fairness", "non-toxicity")]
    return (
        f"{table(header, rows, 2)}\n"
        f"In percent, of {asked[0]}, {asked[1]} and {asked[2]} held-out questions of TruthfulQA, BBQ and ToxiGen.\n"
        "**Bold** is better and *italic* worse than unsteered: the 95 % interval of the paired difference leaves out "
        "zero.\n\n"
        f"{statement(results)}\n"
        f"{rivals(results)}\n"
        f"{reserve(results)}"
    )


def reserve(results: Mapping[str, Any]) -> str:
    """What a reader of the table should know besides: attributes that were not trained, limits that were not kept."""
    lines = [_limits(results)]
    if untrained := results["untrained"].get(MAT):
        lines.insert(
            0,
            f"- MAT-Steer's {' and '.join(untrained)} was not trained: no epoch beat its start on dev, a gate that is "
            "half open on everything. What MAT-Steer gains there is that, and the other attributes' doing.",
        )
    return "\n".join(lines)


def _limits(results: Mapping[str, Any]) -> str:
    broken = [line["method"] for line in results["methods"] if line["shortfall"]]
    kept = "All keep" if not broken else f"On test {', '.join(broken)} {'do' if len(broken) > 1 else 'does'} not keep"
    return f"- {kept} the limits of what may break, by which settings were chosen on dev."


# Plots.


def plot_methods(results: Mapping[str, Any], path: Path) -> None:
    """Differences to unsteered with intervals, a panel for each metric."""
    from matplotlib.figure import Figure

    lines = [line for line in results["methods"] if line["differences"]][::-1]
    figure = Figure(figsize=(10, 0.3 * len(lines) + 1.4), layout="constrained", dpi=90)
    for axes, metric in zip(figure.subplots(1, len(SETS), sharey=True), SETS, strict=True):
        middles, errors = _bars([line["differences"][metric] for line in lines])
        colours = ["tab:orange" if line["method"] == MAT else "tab:blue" for line in lines]
        axes.errorbar(middles, range(len(lines)), xerr=errors, fmt="none", ecolor="grey", capsize=2)
        axes.scatter(middles, range(len(lines)), c=colours, zorder=3, s=18)
        axes.axvline(0, color="grey", linewidth=0.8)
        axes.set_title(METRICS[metric], fontsize=10)
        axes.set_yticks(range(len(lines)), [line["method"] for line in lines])
        axes.grid(axis="x", alpha=0.3)
    figure.supxlabel("points above unsteered, 95 % intervals", fontsize=9)
    save_figure(figure, path)


def plot_shares(results: Mapping[str, Any], path: Path) -> None:
    """Differences to unsteered over the share of the data."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 2.8), layout="constrained", dpi=90)
    for axes, metric in zip(figure.subplots(1, len(SETS), sharey=True), SETS, strict=True):
        for method in (MAT, MEANS):
            own = sorted((one for one in results["shares"] if one["of"] == method), key=lambda one: one["share"])
            middles, errors = _bars([one["differences"][metric] for one in own])
            shares = [100 * one["share"] for one in own]
            axes.errorbar(shares, middles, yerr=errors, marker="o", capsize=2, label=method)
        axes.axhline(0, color="grey", linewidth=0.8)
        axes.set_title(METRICS[metric], fontsize=10)
        axes.set_xlabel("percent of the data")
        axes.grid(alpha=0.3)
    figure.axes[0].set_ylabel("points above unsteered")
    figure.axes[-1].legend(fontsize=8)
    save_figure(figure, path)


def _bars(found: Sequence[Mapping[str, Any]]) -> tuple[list[float], list[list[float]]]:
    """Middles, and how far the intervals go down and up from there, in points."""
    ends = (("value", "low"), ("high", "value"))
    return [100 * one["value"] for one in found], [[100 * (one[a] - one[b]) for one in found] for a, b in ends]


def _skipped(sizes: Mapping[str, int]) -> str:
    if not sizes["skipped"]:
        return ""
    return (
        " None of them was read before: those that had been, while this study was made, are left out "
        "(`--skipped`, questions of\nTruthfulQA; of the others twice as many)."
    )


def _untrained(found: Mapping[str, Sequence[str]]) -> str:
    if not found:
        return ""
    named = "; ".join(f"{name} ({', '.join(attributes)})" for name, attributes in found.items())
    return (
        f"- **Not trained**: {named}.\n  No epoch of these attributes was better on dev than the start, which `train` "
        "keeps then: the difference in means\n  through a gate that is half open on everything."
    )


def page(results: Mapping[str, Any]) -> str:
    """`real.md`."""
    sizes = results["sizes"]
    counts = [
        [
            name,
            f"{fitted['positive']} + {fitted['negative']} of {fitted['groups']}",
            *(f"{found['questions']} of {found['clusters']}" for found in (results[part][name] for part in PARTS)),
        ]
        for name, fitted in results["fitted"].items()
    ]
    orders = [
        [f"{claim.better} above {claim.worse}", claim.paper, METRICS[metric], difference.text(signed=True), how]
        for claim, metric, difference, how in judged(results)
    ]
    beside = [
        [key.removeprefix(f"{MAT} - "), *(_cell(found[metric], signed=True) for metric in SETS)]
        for key, found in results["pairs"].items()
        if key.startswith(f"{MAT} - ") and key != f"{MAT} - {UNSTEERED}"
    ]
    tried = [_tried(one) for one in results["tried"]]
    data = ", ".join(f"{one['loader']} {one.get('sha256', '')[:12]}".strip() for one in results["data"])
    best = ", ".join(f"{name} at {one['place']} x{one['multiplier']:g}" for name, one in results["best"].items())
    short = [METRICS[metric] for metric in SETS]
    untrained = _untrained(results["untrained"])
    given = " ".join(f"--{name.replace('_', '-')} {value}" for name, value in sizes.items())
    return f"""# Results on a real model

Written by `make reproduce-real` on {results["model"]}, with the sizes
`{given}`; the numbers are in `real.json`.
They are of **test** questions, on which no choice rests, unless they are said to be of dev, on which places and
strengths were chosen.{_skipped(sizes)}
The split is 40/10/50 by question (BBQ: by template, ToxiGen: by text). Questions are put plainly, without examples:
TruthfulQA as `Q: ... A:`, BBQ with its three options, ToxiGen as the question whether the text is hateful, Yes or No.
Numbers are percent, intervals 95 %; those of differences are paired, from drawing the same clusters (questions,
templates or texts) for both.

{table(["attribute", "fitted on texts (+ and -) of groups", "dev questions of clusters", "test", "part"], counts)}
Data (sha256): {data}. MAT-Steer: {sizes["epochs"]} epochs.

## Methods and ablations, all attributes at once

{metric_table(results["methods"], results["constant"])}
The same answer always: the commoner of Yes and No to all of ToxiGen, "unknown" to all of BBQ. A gain towards that need
not be one in understanding: BBQ is therefore also shown apart, where the context leaves the question open ("unknown" is
right) and where it settles it.

Difference to unsteered, in points:

{difference_table(results["methods"])}
![Differences to unsteered](real-methods.png)

What steering breaks, on answers to {sizes["test_answers"]} of these questions: the perplexity of the arm's own answers
under the unsteered model, against that of unsteered answers; token 4-grams that an answer has had before; empty
answers; and on neutral text the divergence from the unsteered model.

{damage_table(results["methods"])}
- **in-context prompt**: {results["demonstrations"]} questions of train with right answers before each question; nothing
  is steered, and the perplexity is that after its own prompts.
- **ITI**: of all layers the 48 heads that tell an attribute's sides apart best, at the last token (the paper's number).
- **difference in means**, **probe**: at the place that was best for the difference in means.
- **{MEANS_THERE}**: at the place and multiplier of MAT-Steer, within the limits on dev or not.
- **MAT-Steer**: `matsteer train`'s defaults, at the place that was best for it. Ablations change one thing of it
  (alignment only: all three penalties), and nothing of its place and strength.
{untrained}
{_limits(results)}

Chosen on dev: {best}.

## Does it agree with the paper?

{statement(results)}

{table(["the paper has", "there, Llama-3.1-8B", "metric", "difference here", "the order"], orders, 3)}
## MAT-Steer beside each of the others

{rivals(results)}

MAT-Steer minus the other, in points:

{table(["minus", *short], beside)}
{beside_it(results)}## What was tried on dev

Places and strengths together, the probe at the place of the difference in means; where the best strength was the
largest that was tried, larger ones, and where all of them broke the text, smaller ones.

Score: the mean of MC2 and the accuracies of BBQ and ToxiGen. Of the settings within the limits (`matsteer sweep`'s: a
perplexity of at most 1.5x unless its interval has 1 in it, at most 10 points more of repeated 4-grams and of empty
answers, KL at most 1 nat) the best was taken, the weaker of two that are alike.

{table(["method", "place", "strength", "score", *short, "perplexity", "4-grams", "KL", "within limits"], tried, 2)}
{"".join(f"- {note}{chr(10)}" for note in results["notes"])}"""


BESIDE = {
    "alone": """## One attribute at a time

Fitted and steered by itself, at the place and strength that were chosen for all: the difference to unsteered on all
three data sets, on the part of test, and what steering breaks. The in-context prompt is that of each attribute alone in
any case; one attribute alone has no orthogonality.
""",
    "shares": """## How much data it takes

Fitted on a share of the groups of train, at the same place and strength: the difference to unsteered on the part of
test.

![Differences to unsteered over the share of the data](real-shares.png)
""",
    "pools": """## Which tokens are pooled

The mean over the answer's tokens, the last token of the text, or every token by itself, at the same place and strength:
the difference to unsteered on **dev**. The prompt's last token (`first`) is left out: it cannot tell two answers to one
question apart, and ToxiGen's texts have no prompt.
""",
}
"""What is measured beside the comparison of methods, with its heading."""


def beside_it(results: Mapping[str, Any]) -> str:
    """Of `BESIDE` what there is, and what is still to come."""
    parts = [
        f"{text}\n{difference_table(results[name])}\n{damage_table(results[name])}\n"
        for name, text in BESIDE.items()
        if name in results
    ]
    if missing := [text.partition("\n")[0][3:] for name, text in BESIDE.items() if name not in results]:
        parts.append(f"Not measured yet; `make reproduce-real` goes on from here: {'; '.join(missing).lower()}.\n\n")
    return "".join(parts)


def _tried(one: Mapping[str, Any]) -> list[str]:
    return [
        one["method"],
        one["place"],
        f"{one['multiplier']:g}",
        percent(one["score"]),
        *(percent(one["metrics"].get(metric)) for metric in SETS),
        _ratio(one["perplexity_ratio"]),
        percent(one["damage"].get("rep-4")),
        f"{one['damage']['kl']:.3f}" if "kl" in one["damage"] else "-",
        "no" if one["shortfall"] else "yes",
    ]


if __name__ == "__main__":
    rewrite(__doc__, write)
