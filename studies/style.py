"""The tutorial of docs/style.md, run and measured: `make reproduce-style`.

Trains what the tutorial trains, and simpler methods on the same pairs, each by `matsteer train`, then measures them
side by side on the questions of the test pairs: which of two given answers the model prefers, how its own answers sound
to `examples/tone/judge.py`, and what steering breaks. Writes docs/results/style.json and the tables of docs/style.md;
what was trained or measured before is not done again.
"""

import argparse
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console

from demo.readme import replace_between
from examples.tone.judge import held_out
from steering.checkpoint import Checkpoint
from studies.real_results import table, verdict
from training.cli import app
from training.data import Split, load_data
from training.data.samples import Form
from training.evaluation.choices import evaluate_choices
from training.evaluation.evaluator import open_checkpoint
from training.evaluation.generation import Continuation, Sampling
from training.evaluation.judged import evaluate_generations, judged, prompts_from
from training.evaluation.judges import load_judge
from training.evaluation.results import BASELINE, Arm, Estimate, Evaluation, Measured
from training.evaluation.tasks import questions
from training.files import content_key, write_json
from training.models import Base, load_base

MARKERS = ("<!-- style results: written by make reproduce-style -->", "<!-- end of style results -->")
MAT, MEANS, CLAMP, REPS = "MAT-Steer", "difference in means", "clamp", "RePS"
PREFERS = "any_true_per_token"
SHOWN = 3  # questions, the first ones, whose answers are shown as they came


ATTRIBUTE = "cheerful"
PAIRS = Path("examples/tone/cheerful.jsonl")
PLACE = ("--layer", "14", "--site", "residual")
METHODS = {
    MAT: ("--method", "mat", *PLACE, "--strength", "2"),
    MEANS: ("--method", "caa", *PLACE),
    CLAMP: ("--method", "clamp", *PLACE),
    REPS: ("--method", "reps", *PLACE, "--steps", "40"),
}
"""Title -> options of `matsteer train`."""
METRICS = {PREFERS: "prefers the pair's answer", "cheerful": "sounds cheerful", "exclaims": "has a !"}
FACTORS = (1.0, 2.0)


def folder(title: str) -> str:
    """The name of a method's checkpoint; MAT-Steer's is the attribute's."""
    return ATTRIBUTE if title == MAT else f"{ATTRIBUTE}-{METHODS[title][1]}"


def command(title: str, model: str, checkpoints: str = "checkpoints") -> list[str]:
    """Of `matsteer`, as the tutorial shows it."""
    out = f"{checkpoints}/{folder(title)}"
    return ["train", "--model", model, "--chat", "--data", f"{ATTRIBUTE}={PAIRS}", *METHODS[title], "--out", out]


def train(title: str, model: str, work: Path, options: Sequence[str] = ()) -> Checkpoint:
    """The method's checkpoint, trained now or by an earlier call."""
    path = work / folder(title) / "v1"
    if not (path / "config.json").exists():
        words = [*command(title, model, str(work)), *options, "--version", "v1"]
        if code := app(words, standalone_mode=False):
            raise SystemExit(code)
    return open_checkpoint(path)[0]


def measure(
    base: Base, checkpoints: Mapping[str, Checkpoint], sampling: Sampling, work: Path, count: int | None
) -> dict[str, Any]:
    """Every checkpoint at `FACTORS` of its default multipliers and unsteered, on the (first `count`) questions of the
    test pairs, in JSON's types."""
    pairs = load_data([f"{ATTRIBUTE}={PAIRS}"], chat=True)
    samples = [sample for sample in pairs if sample.split is Split.TEST]
    columns = [replace(one, attribute=title) for title, found in checkpoints.items() for one in found.columns]
    arms = [
        BASELINE,
        *(
            Arm(_arm(title, factor), {title: factor * found.attributes[ATTRIBUTE]})
            for title, found in checkpoints.items()
            for factor in FACTORS
        ),
    ]
    chosen = evaluate_choices(
        base.model, base.tokenizer, questions(samples)[:count], columns, arms, chat=base.chat,
        kept=work / "choices.partial", progress=True,
    )  # fmt: skip
    prompts = prompts_from(samples, Form.CHAT)[:count]
    written, texts = evaluate_generations(
        base.model, base.tokenizer, prompts, load_judge(f"examples.tone.judge:{ATTRIBUTE}"), columns, arms, sampling,
        chat=base.chat, kept=work / "answers.partial", progress=True,
    )  # fmt: skip
    measures = _measures(chosen, texts, [prompt.group for prompt in prompts], arms)
    right, of = held_out(ATTRIBUTE)
    return {
        "model": base.id,
        "questions": len(prompts),
        "sampling": asdict(sampling),
        "judge": {"right": right, "of": of},
        "pairs": {split.value: len({one.group for one in pairs if one.split is split}) for split in Split},
        "places": {title: _placed(found) for title, found in checkpoints.items()},
        "arms": [_line(arm, written, measures) for arm in arms],
        "beside": {
            _arm(title, factor): {
                name: asdict(measures[_arm(MAT, factor)][name].minus(one))
                for name, one in measures[_arm(title, factor)].items()
            }
            for title in checkpoints
            if title != MAT
            for factor in FACTORS
        },
        "texts": [
            {"question": text.asked, "arm": text.arm, "text": text.text}
            for text in texts
            if text.prompt < SHOWN and not text.arm.endswith(" x2")
        ],
    }


def _arm(title: str, factor: float) -> str:
    return f"{title} x{factor:g}"


def _placed(checkpoint: Checkpoint) -> str:
    strength = checkpoint.config.training["hyperparameters"].get("strength", 1.0)
    return f"{', '.join(dict.fromkeys(str(one.site) for one in checkpoint.columns))} x{strength:g}"


def _measures(
    chosen: Evaluation, texts: Sequence[Continuation], clusters: Sequence[str], arms: Sequence[Arm]
) -> dict[str, dict[str, Measured]]:
    """Arm -> metric -> what was measured of every question."""
    found = {}
    for arm in arms:
        rows = [row for row in chosen.rows if row["arm"] == arm.name]
        prefers = Measured(
            np.array([(row["metrics"][PREFERS], 1.0) for row in rows]), tuple(row["cluster"] for row in rows), rate=True
        )
        answers = judged([replace(text, attribute="") for text in texts if text.arm == arm.name], clusters)
        found[arm.name] = {PREFERS: prefers, **answers}
    return found


def _line(arm: Arm, written: Evaluation, measures: Mapping[str, Mapping[str, Measured]]) -> dict[str, Any]:
    result = next(one for one in written.arms if one.arm == arm.name)
    own, before = measures[arm.name], measures[BASELINE.name]
    return {
        "arm": arm.name,
        "metrics": {name: asdict(one.estimate()) for name, one in own.items()},
        "differences": {} if arm == BASELINE else {name: asdict(one.minus(before[name])) for name, one in own.items()},
        "perplexity_ratio": result.perplexity_ratio,
        "perplexity_range": result.perplexity_range,
        "damage": {name: asdict(one) for name, one in result.damage.items()},
    }


# What the tutorial shows of it.


def page(found: Mapping[str, Any]) -> str:
    """The tables, the comparison in words, and the first answers as they came."""
    judge, pairs = found["judge"], found["pairs"]
    places = "; ".join(f"{title} at {place}" for title, place in found["places"].items())
    effect = [
        [line["arm"], *(_cell(line, name) for name in METRICS), _ratio(line),
         *(_harm(line, name, *how) for name, how in {"rep-4": (100, 1), "empty": (100, 1), "kl": (1, 2)}.items())]
        for line in found["arms"]
    ]  # fmt: skip
    beside = "\n".join(f"- {_beside(arm, own)}" for arm, own in found["beside"].items())
    texts = "\n".join(
        _said(found["texts"], question) for question in dict.fromkeys(t["question"] for t in found["texts"])
    )
    return f"""{pairs["train"]} pairs of train, {pairs["dev"]} of dev, {pairs["test"]} of test; x1 is {places}.

{table(["", *METRICS.values(), "perplexity", "rep-4", "empty", "KL"], effect)}
Percent with 95 % intervals, of {found["questions"]} questions; **bold**: the interval of the paired difference to
unsteered leaves out zero. The judge is right about {judge["right"]} of {judge["of"]} texts of the test pairs.
Perplexity: of its own answers under the unsteered model, against that of unsteered answers. KL on neutral text, nats a
token.

{beside}

The answers to the first {SHOWN} test questions, as they came ({_sampled(found["sampling"])}):

{texts}"""


def _cell(line: Mapping[str, Any], name: str) -> str:
    if name not in line["metrics"]:
        return "-"
    moved = line["differences"].get(name)
    sign = "**" if moved and verdict(Estimate(**moved)) != "is open" else ""
    value, _, interval = Estimate(**line["metrics"][name]).text().partition(" ")
    return f"{sign}{value}{sign} {interval}"


def _ratio(line: Mapping[str, Any]) -> str:
    ends = line["perplexity_range"]
    return f"{line['perplexity_ratio']:.2f}x" + (" [{:.2f}, {:.2f}]".format(*ends) if ends else "")


def _harm(line: Mapping[str, Any], name: str, scale: float, digits: int) -> str:
    return f"{scale * line['damage'][name]['value']:.{digits}f}"


def _beside(arm: str, found: Mapping[str, Any]) -> str:
    """MAT-Steer minus another method at the same factor, in words."""
    parts = []
    for how, title in (("holds", "more"), ("is reversed", "**less**"), ("is open", "no telling")):
        own = [(said, one) for name, said in METRICS.items() if verdict(one := Estimate(**found[name])) == how]
        if own:
            parts.append(f"{title}: {', '.join(f'{said} {one.text(signed=True)}' for said, one in own)}")
    return f"{MAT} {arm.rpartition(' ')[2]} minus {arm}: {'; '.join(parts)}."


def _said(texts: Sequence[Mapping[str, str]], question: str) -> str:
    rows = [
        [text["arm"].removesuffix(" x1"), " ".join(text["text"].split()).replace("|", "\\|") or "(nothing)"]
        for text in texts
        if text["question"] == question
    ]
    return table([f"*{question}*", ""], rows, 2)


def _sampled(sampling: Mapping[str, Any]) -> str:
    how = "greedy" if sampling["temperature"] == 0 else f"temperature {sampling['temperature']:g}"
    return f"{how}, at most {sampling['max_new_tokens']} tokens"


def write(results: Path, document: Path) -> None:
    """Turn style.json into the tables of the tutorial."""
    replace_between(document, MARKERS, page(json.loads(results.read_text(encoding="utf-8"))))


def run(model: str, work: Path, sampling: Sampling, count: int | None = None, options: Sequence[str] = ()) -> Any:
    """Train and measure; the results in JSON's types."""
    work.mkdir(parents=True, exist_ok=True)
    checkpoints = {title: train(title, model, work, ("--no-evaluate", *options)) for title in METHODS}
    hashes = {title: one.config.sha256 for title, one in checkpoints.items()}
    key = content_key([hashes, asdict(sampling), count, FACTORS, PAIRS.read_text(encoding="utf-8")])
    path = work / f"measured-{key}.json"
    if not path.exists():
        write_json(path, measure(load_base(model), checkpoints, sampling, work, count))
    return json.loads(path.read_text(encoding="utf-8"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--work", type=Path, default=Path("runs/style"))
    parser.add_argument("--folder", type=Path, default=Path("docs/results"))
    parser.add_argument("--document", type=Path, default=Path("docs/style.md"))
    parser.add_argument("--threads", type=int, default=0)
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    results = run(args.model, args.work, Sampling(temperature=0, max_new_tokens=32))
    write_json(args.folder / "style.json", results)
    write(args.folder / "style.json", args.document)
    Console().print(f"wrote {args.folder / 'style.json'} and {args.document}")


if __name__ == "__main__":
    main()
