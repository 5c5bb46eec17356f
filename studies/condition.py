"""Steering some questions and leaving the others alone, on a real model: the second half of `make reproduce-style`.

CAST, whose gate reads a condition on the prompt at an earlier layer, beside MAT-Steer, whose gate reads the activation
that it steers, and beside the difference in means, which has no gate: all of them cheerful, and the condition is that
the question is about food. Each is trained by `matsteer train`; the site at which the condition is read is chosen on
dev. Measured on the test questions of examples/condition/food.jsonl, about food and not. Writes
docs/results/condition.json and the tables of docs/methods.md; what was trained or measured before is not done again.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np

from demo.readme import replace_between
from steering.checkpoint import Checkpoint
from steering.column import Column
from steering.types import Gate
from studies.style import (
    CHEERFUL,
    FACTORS,
    MAT,
    MEANS,
    arm_name,
    arms_of,
    as_line,
    beside,
    cell,
    command_line,
    harm,
    loaded,
    minus,
    once,
    own_folder,
    placed,
    ratio,
    sampled,
    trained,
)
from training.activations.tokenization import Encoded
from training.data import Split, load_data
from training.data.samples import Form
from training.evaluation.generation import Continuation, Sampling, encoded_prompt
from training.evaluation.judged import Prompt, evaluate_generations, judged, prompts_from
from training.evaluation.judges import judge_key
from training.evaluation.report import markdown_table as table
from training.evaluation.results import BASELINE, Arm, Measured
from training.evaluation.traced import trace_answer
from training.files import content_key
from training.models import Base

MARKERS = ("<!-- condition results: written by make reproduce-style -->", "<!-- end of condition results -->")
CAST, MAT_FOOD = "CAST", "MAT-Steer on food"
CONDITION = Path("examples/condition/food.jsonl")
TOGETHER = Path("examples/condition/cheerful-food.jsonl")
"""Style and condition in one: what MAT-Steer is to change are gloomy answers about food, and what it is to leave alone
cheerful ones, and any answer about anything else."""
READS = tuple(f"{layer}.residual" for layer in (4, 6, 8, 10, 12))
"""Where the condition may be read."""
PLACE = ("--layer", str(CHEERFUL.layer), "--site", "residual")
STYLE = f"{CHEERFUL.attribute}={CHEERFUL.pairs}"
METHODS = {
    MAT: ("--data", STYLE, "--method", "mat", *PLACE, "--strength", "2"),
    MAT_FOOD: ("--data", f"{CHEERFUL.attribute}={TOGETHER}", "--method", "mat", *PLACE, "--strength", "2"),
    # Of all tokens, as CAST's, so that both have the same vector.
    MEANS: ("--data", STYLE, "--method", "caa", *PLACE, "--pool", "tokens"),
}
FOLDERS = {MAT: "cheerful", MAT_FOOD: "cheerful-about-food", MEANS: "cheerful-caa-tokens"}
OPEN, SAME = "open", "same"
METRICS = {OPEN: "gate open", SAME: "left as it was", **CHEERFUL.metrics}
SIDES = {"food": "About food", "other": "Others"}


def conditional(reads: str) -> tuple[str, ...]:
    """Options of `matsteer train`: CAST that reads its condition there."""
    return ("--data", STYLE, "--data", f"food={CONDITION}", "--condition", "food", "--reads", reads, *PLACE,
            "--method", "cast")  # fmt: skip


def command(options: Sequence[str], model: str, out: str) -> list[str]:
    """Of `matsteer`."""
    return ["train", "--model", model, "--chat", *options, "--out", out]


def read_at(folder: Path) -> dict[str, Any]:
    """What the fit of CAST that was trained into `folder` says of its condition."""
    (told,) = folder.glob(".work/fit-*/condition.json")
    return dict(json.loads(told.read_text(encoding="utf-8")))


def chosen(conditions: Sequence[Mapping[str, Any]]) -> str:
    """The site with the best F1 on dev; the earliest of several."""
    return str(max(conditions, key=lambda one: one["dev F1"])["reads"])


def measure(
    side: str, model: str, checkpoints: Mapping[str, Checkpoint], sampling: Sampling, work: Path, count: int | None
) -> dict[str, Any]:
    """Every checkpoint and unsteered, on the (first `count`) test questions of a side, in JSON's types."""
    samples = [one for one in load_data([f"food={CONDITION}"], chat=True) if one.split is Split.TEST]
    base = loaded(model)
    columns = [replace(one, attribute=title) for title, found in checkpoints.items() for one in found.columns]
    arms = arms_of(checkpoints, CHEERFUL.attribute)
    prompts = prompts_from([one for one in samples if one.label is (side == "food")], Form.CHAT)[:count]
    written, texts = evaluate_generations(
        base.model, base.tokenizer, prompts, CHEERFUL.judge, columns, arms, sampling,
        chat=base.chat, kept=work / f"condition-{side}.partial", progress=True,
    )  # fmt: skip
    measures, whole = _measures(base, columns, arms, prompts, texts)
    return {
        "questions": len(prompts),
        "arms": [as_line(arm, written.arm(arm.name), measures) for arm in arms],
        "beside": beside(measures, CAST, [title for title in checkpoints if title != CAST]),
        "exact": whole,
    }


def _measures(
    base: Base, columns: Sequence[Column], arms: Sequence[Arm], prompts: Sequence[Prompt], texts: Sequence[Continuation]
) -> tuple[dict[str, dict[str, Measured]], dict[str, list[int]]]:
    """Arm -> metric -> what was measured of every question. And how many of CAST's answers are, to the token, those of
    the difference in means where its condition holds, and the unsteered ones where not: [alike, of] each."""
    clusters = tuple(prompt.group or str(number) for number, prompt in enumerate(prompts))
    said = {arm.name: [text for text in texts if text.arm == arm.name] for arm in arms}
    tokens = {name: [text.token_ids for text in own] for name, own in said.items()}
    found: dict[str, dict[str, Measured]] = {}
    for arm in arms:
        metrics = judged([replace(text, attribute="") for text in said[arm.name]], clusters)
        if arm != BASELINE:
            alike = [one == before for one, before in zip(tokens[arm.name], tokens[BASELINE.name], strict=True)]
            gates = [_gate(base, columns, arm, prompts[text.prompt], text) for text in said[arm.name]]
            metrics |= {
                OPEN: Measured(np.array([(gate, 1.0) for gate in gates]), clusters),
                SAME: Measured(np.array([(float(one), 1.0) for one in alike]), clusters, rate=True),
            }
        found[arm.name] = metrics
    exact = {"held": [0, 0], "not held": [0, 0]}
    for factor in FACTORS:
        name = arm_name(CAST, factor)
        for number, (gate, _) in enumerate(found[name][OPEN].parts):
            other = arm_name(MEANS, factor) if gate else BASELINE.name
            count = exact["held" if gate else "not held"]
            count[0] += tokens[name][number] == tokens[other][number]
            count[1] += 1
    return found, exact


def _gate(base: Base, columns: Sequence[Column], arm: Arm, prompt: Prompt, text: Continuation) -> float:
    """How far open the arm's gate was, as a mean over the tokens of its answer."""
    ids = encoded_prompt(base.tokenizer, prompt.asked, base.chat)
    row = Encoded((*ids, *text.token_ids), len(ids) - 1, len(ids) + len(text.token_ids) - 1)
    (title,) = arm.attributes
    own = [column for column in columns if column.attribute == title]
    if all(column.gate is Gate.CONSTANT for column in own):
        return 1.0
    traced = trace_answer(base.model, base.tokenizer, row, own, arm.multipliers(own))
    return float(np.mean([token.gates[0] for token in traced.tokens]))


# What the page shows of it.


def page(found: Mapping[str, Any]) -> str:
    """Where the condition can be read, what was measured on either side, and the comparison in words."""
    sites = [
        [one["reads"], *(f"{one[name]:.2f}" for name in ("train F1", "dev F1", "threshold"))]
        for one in found["conditions"]
    ]
    places = "; ".join(f"{title} at {place}" for title, place in found["places"].items())
    counts = found["questions"]
    exact = {
        how: [sum(side["exact"][how][part] for side in found["sides"].values()) for part in (0, 1)]
        for how in ("held", "not held")
    }
    sides = "\n\n".join(_side(side, found["sides"][side]) for side in SIDES)
    return f"""{counts["train"]} questions a side of train, {counts["dev"]} of dev; x1 is {places}.

{table(["condition read at", "F1 on train", "on dev", "threshold"], sites)}
CAST reads it at {found["reads"]}, which is best on dev. Its answers at x1 and x2 are, to the token, the unsteered
ones in {exact["not held"][0]} of the {exact["not held"][1]} where its condition does not hold, and those of the
difference in means in {exact["held"][0]} of the {exact["held"][1]} where it does.

{sides}

Percent with 95 % intervals ({sampled(found["sampling"])}). Gate open: as a mean over the tokens of an answer; for CAST
the share of answers that are steered. Left as it was: the unsteered answer, token by token. **Bold**: the interval of
the paired difference to unsteered leaves out zero. Perplexity, rep-4 and KL as in [style.md](style.md#seen); CAST,
whose gate is latched, has the first half of each neutral text as its prompt."""


def _side(side: str, found: Mapping[str, Any]) -> str:
    neutral = side == "other"
    rows = [
        [line["arm"], *(cell(line, name) for name in METRICS), ratio(line), harm(line, "rep-4", 100, 1),
         harm(line, "empty", 100, 1), *([harm(line, "kl", 1, 2)] if neutral else [])]
        for line in found["arms"]
    ]  # fmt: skip
    head = ["", *METRICS.values(), "perplexity", "rep-4", "empty", *(["KL"] if neutral else [])]
    apart = "\n".join(f"- {minus(arms, own, METRICS)}" for arms, own in found["beside"].items())
    return f"""{SIDES[side]}, {found["questions"]} questions of test:

{table(head, rows)}
{apart}"""


def write(results: Path, document: Path) -> None:
    """Turn condition.json into the tables of the page on methods."""
    replace_between(document, MARKERS, page(json.loads(results.read_text(encoding="utf-8"))))


def run(model: str, work: Path, sampling: Sampling, count: int | None = None, options: Sequence[str] = ()) -> Any:
    """Train, choose and measure; the results in JSON's types."""
    work.mkdir(parents=True, exist_ok=True)
    options = ("--no-evaluate", *options)
    read: dict[str, Checkpoint] = {}
    conditions = []
    for site in READS:
        words = command(conditional(site), model, str(work / f"cheerful-cast-{site}"))
        read[site] = trained(words, options)
        conditions.append(read_at(own_folder(words, options)))
    reads = chosen(conditions)
    checkpoints = {CAST: read[reads]}
    for title, own in METHODS.items():
        checkpoints[title] = trained(command(own, model, str(work / FOLDERS[title])), options)
    hashes = {title: one.config.sha256 for title, one in checkpoints.items()}
    asked = [asdict(sampling), count, FACTORS, CONDITION.read_text(encoding="utf-8"), judge_key(CHEERFUL.judge)]
    key = content_key([hashes, *asked])
    sides = {
        side: once(work / f"condition-{side}-{key}.json", measure, side, model, checkpoints, sampling, work, count)
        for side in SIDES
    }
    samples = load_data([f"food={CONDITION}"], chat=True)
    return {
        "model": model,
        "sampling": asdict(sampling),
        "sides": sides,
        "conditions": conditions,
        "reads": reads,
        "places": {title: placed(one) for title, one in checkpoints.items()},
        "questions": {split.value: sum(one.split is split and one.label for one in samples) for split in Split},
    }


if __name__ == "__main__":
    command_line(__doc__, run, write, "condition.json", "docs/methods.md")
