"""An evaluation, or a sweep, as one HTML file that opens without a network (`training/html`)."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from steering.checkpoint import Checkpoint
from steering.column import Column, attribute_names
from training.evaluation.evaluator import GateMeans
from training.evaluation.report import sweep_rows
from training.evaluation.results import DAMAGE, ArmResult, Estimate, Evaluation
from training.evaluation.sweep_results import SweepPoint, SweepResult
from training.evaluation.tasks import METRICS
from training.evaluation.traced import Traced
from training.html import LANES, render
from training.html.charts import Bar, Chart, Point, Scale, Series

REPORT = "report.html"
MOST_ROWS = 200  # of a table of vectors
LONGEST = 400  # characters of a prompt that are shown, its last ones
PLAIN = "a7"  # the colour of what belongs to no attribute
DAMAGES = {
    "perplexity ratio": ("times", "Perplexity of the arm's texts under the unsteered model, against the first arm's."),
    "rep-4": ("percent", "Token 4-grams that the text has had before."),
    "empty": ("percent", "Texts without a word."),
    "kl": ("nats a token", "How far the next token's distribution moves on neutral text."),
}
TINTS = dict(zip(DAMAGES, ("a3", "a1", "a4", "a7"), strict=True))


@dataclass(frozen=True)
class Row:
    """One arm in one card; "clear": its difference's interval leaves out 0."""

    name: str
    value: str
    interval: str
    bar: Bar | None
    difference: str = ""
    difference_interval: str = ""
    clear: str = ""


@dataclass(frozen=True)
class Card:
    title: str
    about: str
    unit: str
    tint: str
    rows: Sequence[Row]
    differs: bool


@dataclass(frozen=True)
class Side:
    name: str
    value: str
    bar: Bar


@dataclass(frozen=True)
class GateCard:
    attribute: str
    site: str
    split: str
    tint: str
    sides: Sequence[Side]


@dataclass(frozen=True)
class ShownExample:
    name: str
    prompt: str
    said: str
    traced: Traced
    verdicts: Sequence[tuple[str, bool]]


@dataclass(frozen=True)
class Table:
    title: str
    about: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]


def evaluation_report(
    evaluation: Evaluation | None,
    title: str,
    *,
    attributes: Sequence[str],
    facts: Mapping[str, str] | None = None,
    gates: Sequence[GateMeans] = (),
    tables: Sequence[Table] = (),
) -> str:
    """The page of a checkpoint's evaluation, or of its training alone where it was not evaluated. `attributes`: in the
    order of their colours; `facts`: what stands under the title."""
    tints = _tints(attributes)
    shown: dict[str, Any] = {"gains": [], "gains_about": "", "damages": [], "charts": [], "notes": []}
    about = dict(facts or {})
    if evaluation is not None:
        shown = {
            "gains": [_gain(evaluation, name, tints) for name in evaluation.metrics],
            "gains_about": _how(evaluation),
            "damages": _damages(evaluation),
            "charts": _over_multipliers(evaluation, tints),
            "notes": evaluation.notes,
        }
        about |= {name.replace("_", " "): str(value) for name, value in evaluation.settings.items()}
    return _page(evaluation, title, facts=about, gates=gates, tints=tints, tables=tables, **shown)


def training_report(
    title: str,
    base_model: str,
    method: str,
    columns: Sequence[Column],
    training: Mapping[str, Any],
    gates: Sequence[GateMeans],
    evaluation: Evaluation | None,
) -> str:
    """The page of a training run: what it was evaluated to, if it was, its gates, and what it was made of. `training`:
    as the checkpoint keeps it."""
    tables = [
        Table(
            "Vectors",
            "",
            ["attribute", "site", "gate", "norm", "default multiplier"],
            [
                [
                    one.attribute,
                    str(one.site),
                    one.gate.value,
                    f"{float(one.vector.norm()):.3f}",
                    f"{one.default_multiplier:g}",
                ]
                for one in columns[:MOST_ROWS]
            ],
        ),
        Table(
            "Data",
            "Samples by split; only train is fitted on.",
            ["attribute", "split", "positive", "negative", "groups"],
            [
                [str(one[key]) for key in ("attribute", "split", "positive", "negative", "groups")]
                for one in training["splits"]["counts"]
            ],
        ),
        Table(
            "Hyperparameters",
            "",
            ["setting", "value"],
            [[key, str(value)] for key, value in training["hyperparameters"].items()],
        ),
    ]
    facts = {"base model": base_model, "method": method}
    return evaluation_report(
        evaluation, title, attributes=attribute_names(columns), facts=facts, gates=gates, tables=tables
    )


def checkpoint_report(evaluation: Evaluation, title: str, checkpoint: Checkpoint) -> str:
    """The page of an evaluation of a checkpoint; its gates are those that its training measured."""
    config = checkpoint.config
    facts = {"base model": config.base_model.id, "method": config.method, "sha256": config.sha256[:12]}
    gates = [one for row in config.training.get("gates", ()) if (one := _stored_gate(row))]
    return evaluation_report(evaluation, title, attributes=tuple(checkpoint.attributes), facts=facts, gates=gates)


def _stored_gate(row: Any) -> GateMeans | None:
    """None where it is not what a training writes: a checkpoint may come from anywhere."""
    try:
        return GateMeans(
            **{name: str(row[name]) for name in ("attribute", "site", "split")},
            positive=float(row["positive"]),
            negative=float(row["negative"]),
        )
    except (KeyError, TypeError, ValueError):
        return None


def sweep_report(swept: SweepResult, title: str, remarks: Sequence[str]) -> str:
    """The page of a sweep."""
    tints, best = _tints(swept.attributes), swept.chosen
    header, rows = sweep_rows(swept, swept.points)
    about = (
        "Best first. Metrics, rep-4 and empty texts in percent, with the difference to the unsteered model and its "
        "95 % interval; KL in nats a token."
    )
    facts = {
        name: f"{' and '.join(map(str, place.sites))}, times {place.strength:g}" for name, place in swept.places.items()
    }
    if not facts:
        first = swept.points[0]
        facts = {"best place": str(first.place), "multiplier": f"{first.multiplier:g}"}
    return _page(
        best,
        title,
        facts=facts,
        gates=swept.gates,
        tints=tints,
        tables=[Table("Every setting", about, header, rows)],
        notes=remarks,
        charts=_over_points(swept.points),
        gains=[_gain(best, name, tints) for name in best.metrics] if best else [],
        gains_about=f"What was chosen, beside the unsteered model. {_how(best)}" if best else "",
        damages=_damages(best) if best else [],
    )


def _page(
    evaluation: Evaluation | None,
    title: str,
    *,
    gates: Sequence[GateMeans],
    tints: Mapping[str, str],
    **shown: Any,
) -> str:
    examples = [
        ShownExample(
            f"answer {number}: {one.said}",
            one.prompt if len(one.prompt) <= LONGEST else f"… {one.prompt[-LONGEST:]}",
            one.said,
            one.traced,
            [(name.replace("_", "-"), good) for name, good in one.verdict.items() if good is not None],
        )
        for number, one in enumerate(evaluation.examples if evaluation else (), start=1)
    ]
    strengths = [abs(value) for one in examples for token in one.traced.tokens for value in token.strengths]
    told = "Answers to the first prompts where steering changed the text."
    if evaluation is not None and evaluation.kind == "choice":
        told = "A positive and a negative answer to the first questions, as the steered model reads them."
    return render(
        "report.html",
        title=title,
        gates=[_gate(one, tints) for one in gates],
        examples=examples,
        examples_about=told,
        most=max([1.0, *strengths]),
        damages_about="More is worse. What a gain is worth is seen beside what it breaks.",
        **shown,
    )


def _tints(attributes: Sequence[str]) -> dict[str, str]:
    return {name: f"a{number % LANES}" for number, name in enumerate(attributes)}


def _tint(metric: str, tints: Mapping[str, str]) -> str:
    """Of a judge's metric that is called as an attribute, or of "attribute metric"."""
    return tints.get(metric) or tints.get(metric.rpartition(" ")[0]) or PLAIN


def _how(evaluation: Evaluation) -> str:
    how = "Shares of judged answers" if evaluation.kind == "generation" else "Answers by likelihood"
    return (
        f"{how}, in percent with 95 % intervals. Differences are paired, to the unsteered arm; bold where the interval "
        "leaves out 0."
    )


def _gain(evaluation: Evaluation, name: str, tints: Mapping[str, str]) -> Card:
    known = [one for arm in evaluation.arms if (one := arm.metrics.get(name)) and one.count]
    scale = Scale.of([value for one in known for value in (one.low or 0.0,)], high=1.0)
    metric = METRICS.get(name.rpartition(" ")[2]) if evaluation.kind == "choice" else None
    counts = dict.fromkeys(f"{one.count} cases in {one.clusters} clusters" for one in known)
    about = ". ".join(part for part in (_sentence(metric.about) if metric else "", *counts) if part)
    rows = [_row(arm.arm, arm.metrics.get(name), arm.differences.get(name), scale) for arm in evaluation.arms]
    return Card(name.replace("_", "-"), about, "percent", _tint(name, tints), rows, any(r.difference for r in rows))


def _damages(evaluation: Evaluation) -> list[Card]:
    cards = []
    ratios = {
        arm.arm: (arm.perplexity_ratio, arm.perplexity_range)
        for arm in evaluation.arms
        if arm.perplexity_ratio is not None
    }
    if ratios:
        scale = Scale.of([end for ratio, ends in ratios.values() for end in (ratio, *(ends or ())[1:])], high=1.0)
        rows = [
            Row(
                name,
                f"{ratio:.2f}x",
                "[{:.2f}, {:.2f}]".format(*ends) if ends else "",
                Bar.at(scale, ratio, *(ends or (None, None))),
            )
            for name, (ratio, ends) in ratios.items()
        ]
        unit, about = DAMAGES["perplexity ratio"]
        cards.append(Card("perplexity ratio", about, unit, TINTS["perplexity ratio"], rows, False))
    for name in DAMAGE:
        arms = [arm for arm in evaluation.arms if name in arm.damage]
        if arms:
            factor, digits = (1.0, 3) if name == "kl" else (100.0, 1)
            ends = [end for arm in arms for end in (arm.damage[name].value, arm.damage[name].high) if end is not None]
            scale = Scale.of(ends, high=0.1)
            rows = [
                _row(arm.arm, arm.damage[name], arm.differences.get(name), scale, factor=factor, digits=digits)
                for arm in arms
            ]
            unit, about = DAMAGES[name]
            cards.append(Card(name, about, unit, TINTS[name], rows, any(row.difference for row in rows)))
    return cards


def _row(
    name: str,
    one: Estimate | None,
    difference: Estimate | None,
    scale: Scale,
    *,
    factor: float = 100.0,
    digits: int = 1,
) -> Row:
    if one is None or one.value is None:
        return Row(name, "-", "", None)
    value, interval = _told(one, factor, digits)
    bar = Bar.at(scale, one.value, one.low, one.high)
    if difference is None or difference.value is None:
        return Row(name, value, interval, bar)
    clear = (difference.low or 0.0) > 0 or (difference.high or 0.0) < 0
    return Row(name, value, interval, bar, *_told(difference, factor, digits, sign="+"), "clear" if clear else "")


def _told(one: Estimate, factor: float, digits: int, sign: str = "") -> tuple[str, str]:
    """The value, and its interval."""
    value = f"{factor * (one.value or 0.0):{sign}.{digits}f}"
    if one.low is None or one.high is None:
        return value, ""
    return value, f"[{factor * one.low:.{digits}f}, {factor * one.high:.{digits}f}]"


def _sentence(text: str) -> str:
    return text[:1].upper() + text[1:]


def _gate(one: GateMeans, tints: Mapping[str, str]) -> GateCard:
    scale = Scale.of([one.positive, one.negative], high=1.0)
    sides = [
        Side(name, f"{value:.2f}", Bar.at(scale, value))
        for name, value in (("positives", one.positive), ("negatives", one.negative))
    ]
    return GateCard(one.attribute, one.site, one.split, tints.get(one.attribute, PLAIN), sides)


def _over_multipliers(evaluation: Evaluation, tints: Mapping[str, str]) -> list[Chart]:
    """Where at least three arms steer the same way, more or less: what is gained and damaged over the factor."""
    arms = _scaled(evaluation.arms)
    if len(arms) < 3:
        return []
    names = [name for name in evaluation.metrics if _counts(name, evaluation)]
    gains = [
        Series(name.replace("_", "-"), _tint(name, tints), points, dashed=_tint(name, tints) == PLAIN)
        for name in names
        if (points := [point for x, arm in arms if (point := _point(x, arm.metrics.get(name), 100.0, " %"))])
    ]
    axis = "factor on the default multipliers"
    charts = [Chart.of("Gain, percent", axis, gains, high=100.0)] if gains else []
    return [*charts, *_harms([(x, _harm(arm)) for x, arm in arms], axis)]


def _counts(name: str, evaluation: Evaluation) -> bool:
    """One metric an attribute where there are several, so that lines can be told apart."""
    attribute = name.rpartition(" ")[0]
    own = [one for one in evaluation.metrics if one.rpartition(" ")[0] == attribute]
    first = next((one for one in own if one.rpartition(" ")[2] in ("mc2", "accuracy", "preference")), own[0])
    return not attribute or name == first


def _scaled(arms: Sequence[ArmResult]) -> list[tuple[float, ArmResult]]:
    """(factor, arm) of the arms whose multipliers are those of one arm times a factor, by factor; that arm is the one
    called steered, or the first that steers."""
    steering = [arm for arm in arms if any(arm.attributes.values())]
    whole = next((arm for arm in steering if arm.arm == "steered"), steering[0] if steering else None)
    if whole is None:
        return []
    name, most = max(whole.attributes.items(), key=lambda item: abs(item[1]))
    found: dict[float, ArmResult] = {}
    for arm in arms:
        factor = arm.attributes.get(name, 0.0) / most
        scaled = {key: factor * value for key, value in whole.attributes.items()}
        if all(abs(arm.attributes.get(key, 0.0) - value) < 1e-9 for key, value in scaled.items()):
            found.setdefault(round(factor, 6), arm)
    return sorted(found.items())


def _point(x: float, one: Estimate | None, factor: float, unit: str) -> Point | None:
    if one is None or one.value is None:
        return None
    ends = [None if end is None else factor * end for end in (one.low, one.high)]
    return Point(x, factor * one.value, f"{factor * one.value:.3g}{unit}", *ends)


def _harm(arm: ArmResult) -> dict[str, float | None]:
    return {"perplexity ratio": arm.perplexity_ratio} | {name: one.value for name, one in arm.damage.items()}


def _harms(arms: Sequence[tuple[float, Mapping[str, float | None]]], axis: str, about: str = "") -> list[Chart]:
    """What is damaged, the perplexity ratio by itself, since it has no upper end; rep-4 and empty texts as shares."""
    lines = {
        name: Series(name, TINTS[name], points, dashed=name in ("rep-4", "empty"))
        for name in DAMAGES
        if (points := [Point(x, found, f"{found:.3g}") for x, own in arms if (found := own.get(name)) is not None])
    }
    ratio = lines.pop("perplexity ratio", None)
    charts = [Chart.of(f"Perplexity ratio{about}", axis, [ratio], high=1.0)] if ratio else []
    others = list(lines.values())
    return [*charts, *([Chart.of(f"Other damage{about}", axis, others, high=1.0)] if others else [])]


def _over_points(points: Sequence[SweepPoint]) -> list[Chart]:
    """The score over the multiplier of every attribute that was steered alone, a line for each of its best sites, and
    the damage at the best of them."""
    charts: list[Chart] = []
    for name in dict.fromkeys(point.attribute for point in points):
        own = [point for point in points if point.attribute == name]
        places = list(dict.fromkeys(point.place for point in own))
        about = f", {name}" if name else ""
        lines = [
            Series(
                str(place),
                f"a{number}",
                [Point(p.multiplier, 100 * p.score, f"{100 * p.score:.1f} %") for p in own if p.place == place],
            )
            for number, place in enumerate(places[:LANES])
        ]
        best = [
            (point.multiplier, {"perplexity ratio": point.perplexity_ratio, **point.damage})
            for point in own
            if point.place == places[0]
        ]
        charts += [Chart.of(f"Score{about}, percent", "multiplier", lines, high=100.0)]
        charts += _harms(best, "multiplier", f"{about} at {places[0]}")
    return charts
