"""The tutorial of docs/style.md, run and measured: `make reproduce-style`.

Trains what the tutorial trains, the same for the other style that is shipped, and simpler methods on the same pairs,
each by `matsteer train`, then measures them side by side on the questions of the test pairs: which of two given answers
the model prefers, how its own answers sound to `examples/tone/judge.py`, and what steering breaks. Writes
docs/results/style.json and the tables of docs/style.md; what was trained or measured before is not done again.
"""

import argparse
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console

from demo.readme import replace_between
from examples.tone.judge import held_out
from steering.checkpoint import Checkpoint
from studies.real_results import verdict
from training.cli import app
from training.data import Split, load_data
from training.data.samples import Form
from training.evaluation.choices import evaluate_choices
from training.evaluation.evaluator import open_checkpoint
from training.evaluation.generation import Continuation, Sampling
from training.evaluation.judged import evaluate_generations, judged, prompts_from
from training.evaluation.judges import Judge, judge_key, load_judge
from training.evaluation.report import markdown_table as table
from training.evaluation.report import with_range
from training.evaluation.results import BASELINE, Arm, ArmResult, Estimate, Measured
from training.evaluation.tasks import questions
from training.files import content_key, write_json
from training.models import load_base

MARKERS = ("<!-- style results: written by make reproduce-style -->", "<!-- end of style results -->")
MAT, MEANS, CLAMP, REPS = "MAT-Steer", "difference in means", "clamp", "RePS"
PREFERS = "any_true_per_token"
SHOWN = 3  # questions, the first ones, whose answers are shown as they came
FACTORS = (1.0, 2.0)
WEAKER = {REPS: (0.25, 0.5, 1.0)}
"""Of a method whose vector is trained to be strong, and breaks the text at what is 1 to the others."""
SAMPLING = Sampling(temperature=0, max_new_tokens=32)


@dataclass(frozen=True)
class Style:
    """An attribute of examples/tone, and what its judge measures."""

    attribute: str
    layer: int
    """Of the residual stream."""
    metrics: Mapping[str, str]
    """The judge's -> what they are called."""
    reps: bool = False
    """Whether RePS is trained, too, which takes longer than all the rest."""

    @property
    def pairs(self) -> Path:
        return Path(f"examples/tone/{self.attribute}.jsonl")

    @property
    def judge(self) -> Judge:
        return load_judge(f"examples.tone.judge:{self.attribute}")

    @property
    def named(self) -> dict[str, str]:
        """All that is measured -> what it is called."""
        return {PREFERS: "prefers the pair's answer", **self.metrics}

    @property
    def methods(self) -> dict[str, tuple[str, ...]]:
        """Title -> options of `matsteer train`."""
        place = ("--layer", str(self.layer), "--site", "residual")
        found = {
            MAT: ("--method", "mat", *place, "--strength", "2"),
            MEANS: ("--method", "caa", *place),
            CLAMP: ("--method", "clamp", *place),
            REPS: ("--method", "reps", *place, "--steps", "40"),
        }
        return found if self.reps else {title: options for title, options in found.items() if title != REPS}

    def folder(self, title: str) -> str:
        """The name of a method's checkpoint; MAT-Steer's is the attribute's."""
        return self.attribute if title == MAT else f"{self.attribute}-{self.methods[title][1]}"

    def command(self, title: str, model: str, checkpoints: str = "checkpoints") -> list[str]:
        """Of `matsteer`, as the tutorial shows it."""
        data, out = f"{self.attribute}={self.pairs}", f"{checkpoints}/{self.folder(title)}"
        return ["train", "--model", model, "--chat", "--data", data, *self.methods[title], "--out", out]


CHEERFUL = Style("cheerful", 14, {"cheerful": "sounds cheerful", "exclaims": "has a !"}, reps=True)
FORMAL = Style("formal", 10, {"formal": "sounds formal", "contracts": "has a contraction"})
STYLES = (CHEERFUL, FORMAL)


def trained(command: Sequence[str], options: Sequence[str] = ()) -> Checkpoint:
    """The checkpoint of a `train` command, in `own_folder`: made now or by an earlier call."""
    folder = own_folder(command, options)
    if not (folder / "v1/config.json").exists():
        words = [*command[:-1], str(folder), *options, "--version", "v1"]
        if code := app(words, standalone_mode=False):
            raise SystemExit(code)
    return open_checkpoint(folder / "v1")[0]


def own_folder(command: Sequence[str], options: Sequence[str] = ()) -> Path:
    """The folder in which a `train` command ends, with a hash of the command, the options and the data behind its name:
    what was trained in another way is in another folder."""
    files = [Path(word.partition("=")[2]) for word in command if word.endswith(".jsonl")]
    key = content_key([[*command, *options], [file.read_text(encoding="utf-8") for file in files]])
    return Path(f"{command[-1]}-{key}")


loaded = cache(load_base)


def once(path: Path, make: Callable[..., Any], *arguments: Any) -> Any:
    """What `make` gives, in JSON's types; kept in a file, and read from it by later calls."""
    if not path.exists():
        write_json(path, make(*arguments))
    return json.loads(path.read_text(encoding="utf-8"))


def arms_of(checkpoints: Mapping[str, Checkpoint], attribute: str) -> list[Arm]:
    """Unsteered, and every checkpoint at its `factors`."""
    return [
        BASELINE,
        *(
            Arm(arm_name(title, factor), {title: factor * found.attributes[attribute]})
            for title, found in checkpoints.items()
            for factor in factors(title)
        ),
    ]


def factors(title: str) -> tuple[float, ...]:
    """Of the default multiplier, from weak to strong."""
    return WEAKER.get(title, FACTORS)


def arm_name(title: str, factor: float) -> str:
    return f"{title} x{factor:g}"


def measure(
    style: Style, title: str, model: str, checkpoint: Checkpoint, sampling: Sampling, work: Path, count: int | None
) -> dict[str, Any]:
    """A method's checkpoint at its `factors` beside the unsteered model, on the (first `count`) questions of the test
    pairs, question by question, in JSON's types."""
    samples = [one for one in load_data([f"{style.attribute}={style.pairs}"], chat=True) if one.split is Split.TEST]
    base = loaded(model)
    columns = [replace(one, attribute=title) for one in checkpoint.columns]
    arms = arms_of({title: checkpoint}, style.attribute)
    kept = str(work / style.folder(title))
    chosen = evaluate_choices(
        base.model, base.tokenizer, questions(samples)[:count], columns, arms, chat=base.chat,
        kept=Path(f"{kept}-choices.partial"), progress=True,
    )  # fmt: skip
    written, texts = evaluate_generations(
        base.model, base.tokenizer, prompts_from(samples, Form.CHAT)[:count], style.judge, columns, arms, sampling,
        chat=base.chat, kept=Path(f"{kept}-answers.partial"), progress=True,
    )  # fmt: skip
    return {
        "model": base.id,
        "choices": [*chosen.rows],
        "answers": [asdict(text) for text in texts],
        "results": {arm.arm: asdict(arm) for arm in written.arms},
    }


def summary(
    style: Style, checkpoints: Mapping[str, Checkpoint], found: Mapping[str, Any], sampling: Sampling
) -> dict[str, Any]:
    """What `measure` found of each method as rates, intervals and paired differences, in JSON's types."""
    pairs = load_data([f"{style.attribute}={style.pairs}"], chat=True)
    clusters = [one.group for one in prompts_from([one for one in pairs if one.split is Split.TEST], Form.CHAT)]
    lines: dict[str, dict[str, Any]] = {}
    measures: dict[str, Mapping[str, Measured]] = {}
    texts = []
    for title, own in found.items():
        arms = arms_of({title: checkpoints[title]}, style.attribute)
        measured = _measures(own, clusters, arms)
        for arm in arms:
            if arm.name not in lines:
                lines[arm.name] = as_line(arm, ArmResult.from_dict(own["results"][arm.name]), measured)
                if arm.name in (BASELINE.name, arm_name(title, min(factors(title)))):
                    texts += [text for text in own["answers"] if text["arm"] == arm.name and text["prompt"] < SHOWN]
        measures |= measured
    one = next(iter(found.values()))
    right, of = held_out(style.attribute)
    return {
        "model": one["model"],
        "questions": len(one["answers"]) // len(one["results"]),
        "sampling": asdict(sampling),
        "judge": {"right": right, "of": of},
        "pairs": {split.value: len({one.group for one in pairs if one.split is split}) for split in Split},
        "places": {title: placed(checkpoint) for title, checkpoint in checkpoints.items()},
        "arms": [*lines.values()],
        "beside": beside(measures, MAT, [title for title in found if title != MAT]),
        "texts": [{"question": text["asked"], "arm": text["arm"], "text": text["text"]} for text in texts],
    }


def placed(checkpoint: Checkpoint) -> str:
    strength = checkpoint.config.training["hyperparameters"].get("strength", 1.0)
    return f"{', '.join(dict.fromkeys(str(one.site) for one in checkpoint.columns))} x{strength:g}"


Measures = Mapping[str, Mapping[str, Measured]]
"""Arm -> metric -> what was measured of every question."""


def _measures(own: Mapping[str, Any], clusters: Sequence[str], arms: Sequence[Arm]) -> dict[str, dict[str, Measured]]:
    found = {}
    for arm in arms:
        rows = [row for row in own["choices"] if row["arm"] == arm.name]
        prefers = Measured(
            np.array([(row["metrics"][PREFERS], 1.0) for row in rows]), tuple(row["cluster"] for row in rows), rate=True
        )
        texts = [Continuation(**{**text, "attribute": ""}) for text in own["answers"] if text["arm"] == arm.name]
        found[arm.name] = {PREFERS: prefers, **judged(texts, clusters)}
    return found


def as_line(arm: Arm, result: ArmResult, measures: Measures) -> dict[str, Any]:
    """One of a table, in JSON's types."""
    own, before = measures[arm.name], {} if arm == BASELINE else measures[BASELINE.name]
    return {
        "arm": arm.name,
        "metrics": {name: asdict(one.estimate()) for name, one in own.items()},
        "differences": {name: asdict(own[name].minus(one)) for name, one in before.items()},
        "perplexity_ratio": result.perplexity_ratio,
        "perplexity_range": result.perplexity_range and [*result.perplexity_range],
        "damage": {name: asdict(one) for name, one in result.damage.items()},
    }


def beside(measures: Measures, title: str, others: Sequence[str]) -> dict[str, Any]:
    """`title` minus each of the others, the weakest arms of both and so on: difference -> metric -> paired estimate."""
    pairs = [
        (arm_name(title, own), arm_name(other, its))
        for other in others
        for own, its in zip(factors(title), factors(other), strict=False)
    ]
    return {
        f"{own} minus {other}": {name: asdict(measures[own][name].minus(one)) for name, one in measures[other].items()}
        for own, other in pairs
    }


# What the tutorial shows of it.


def page(results: Mapping[str, Any]) -> str:
    """Style by style the tables, the comparison in words, and the first answers as they came."""
    return "\n\n".join(_section(style, results[style.attribute]) for style in STYLES)


def _section(style: Style, found: Mapping[str, Any]) -> str:
    judge, pairs = found["judge"], found["pairs"]
    places = "; ".join(f"{title} at {place}" for title, place in found["places"].items())
    effect = [
        [line["arm"], *(cell(line, name) for name in style.named), ratio(line),
         *(harm(line, name, *how) for name, how in {"rep-4": (100, 1), "empty": (100, 1), "kl": (1, 2)}.items())]
        for line in found["arms"]
    ]  # fmt: skip
    apart = "\n".join(f"- {minus(arms, own, style.named)}" for arms, own in found["beside"].items())
    texts = "\n".join(
        _said(found["texts"], question) for question in dict.fromkeys(t["question"] for t in found["texts"])
    )
    return f"""### {style.attribute.capitalize()}

{pairs["train"]} pairs of train, {pairs["dev"]} of dev, {pairs["test"]} of test; x1 is {places}.

{table(["", *style.named.values(), "perplexity", "rep-4", "empty", "KL"], effect)}
Percent with 95 % intervals, of {found["questions"]} questions; **bold**: the interval of the paired difference to
unsteered leaves out zero. The judge is right about {judge["right"]} of {judge["of"]} texts of the test pairs.
Perplexity: of its own answers under the unsteered model, against that of unsteered answers. KL on neutral text, nats a
token.

{apart}

The answers to the first {SHOWN} test questions, as they came ({sampled(found["sampling"])}):

{texts}"""


def cell(line: Mapping[str, Any], name: str) -> str:
    """A metric with its interval, bold where it differs from unsteered."""
    if name not in line["metrics"]:
        return "-"
    moved = line["differences"].get(name)
    sign = "**" if moved and verdict(Estimate(**moved)) != "is open" else ""
    value, _, interval = Estimate(**line["metrics"][name]).text().partition(" ")
    return f"{sign}{value}{sign} {interval}"


def ratio(line: Mapping[str, Any]) -> str:
    return with_range(f"{line['perplexity_ratio']:.2f}x", line["perplexity_range"])


def harm(line: Mapping[str, Any], name: str, scale: float, digits: int) -> str:
    return f"{scale * line['damage'][name]['value']:.{digits}f}"


def minus(arms: str, found: Mapping[str, Any], metrics: Mapping[str, str]) -> str:
    """The difference of two arms in words."""
    parts = []
    for how, said_how in (("holds", "more"), ("is reversed", "**less**"), ("is open", "no telling")):
        own = [(said, one) for name, said in metrics.items() if verdict(one := Estimate(**found[name])) == how]
        if own:
            parts.append(f"{said_how}: {', '.join(f'{said} {one.text(signed=True)}' for said, one in own)}")
    return f"{arms}: {'; '.join(parts)}."


def _said(texts: Sequence[Mapping[str, str]], question: str) -> str:
    rows = [
        [text["arm"], " ".join(text["text"].split()).replace("|", "\\|") or "(nothing)"]
        for text in texts
        if text["question"] == question
    ]
    return table([f"*{question}*", ""], rows, 2)


def sampled(sampling: Mapping[str, Any]) -> str:
    how = "greedy" if sampling["temperature"] == 0 else f"temperature {sampling['temperature']:g}"
    return f"{how}, at most {sampling['max_new_tokens']} tokens"


def write(results: Path, document: Path) -> None:
    """Turn style.json into the tables of the tutorial."""
    replace_between(document, MARKERS, page(json.loads(results.read_text(encoding="utf-8"))))


def run(model: str, work: Path, sampling: Sampling, count: int | None = None, options: Sequence[str] = ()) -> Any:
    """Train and measure; the results in JSON's types."""
    work.mkdir(parents=True, exist_ok=True)
    found = {}
    for style in STYLES:
        checkpoints, measured = {}, {}
        asked = [asdict(sampling), count, style.pairs.read_text(encoding="utf-8"), judge_key(style.judge)]
        for title in style.methods:
            own = checkpoints[title] = trained(style.command(title, model, str(work)), ("--no-evaluate", *options))
            path = work / f"{style.folder(title)}-{content_key([own.config.sha256, factors(title), *asked])}.json"
            measured[title] = once(path, measure, style, title, model, own, sampling, work, count)
        found[style.attribute] = summary(style, checkpoints, measured, sampling)
    return found


Run = Callable[[str, Path, Sampling], Any]


def command_line(description: str | None, run: Run, write: Callable[[Path, Path], None], name: str, page: str) -> None:
    """The command of a study: what it has found goes to the file `name` of the results, and from there to a page."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--work", type=Path, default=Path("runs/style"))
    parser.add_argument("--folder", type=Path, default=Path("docs/results"))
    parser.add_argument("--document", type=Path, default=Path(page))
    parser.add_argument("--threads", type=int, default=0)
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    write_json(args.folder / name, run(args.model, args.work, SAMPLING))
    write(args.folder / name, args.document)
    Console().print(f"wrote {args.folder / name} and {args.document}")


if __name__ == "__main__":
    command_line(__doc__, run, write, "style.json", "docs/style.md")
