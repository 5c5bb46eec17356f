"""Questions with given answers, scored in many arms: `python -m benchmarks.evaluation --help`.

`training.evaluation` against the usual way (lm-evaluation-harness's, and this project's first): every answer in every
arm is a text of its own, its prompt read again, the longest first, in batches that are padded to their longest. Both
steer alike, and give the same log-likelihoods, which is checked in every round.
"""

import argparse
import json
import random
import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch

from benchmarks.machine import described
from benchmarks.turns import in_turn
from benchmarks.workload import ATTRIBUTES, random_columns
from server.threads import usable_cores
from steering.column import Column
from steering.hook import steered
from steering.sites import layers, site_width
from steering.types import Positions, Site
from training.activations.tokenization import encode, pad_right
from training.data import load_data
from training.evaluation.choices import evaluate_choices
from training.evaluation.likelihood import steered_mask
from training.evaluation.results import BASELINE, Arm
from training.evaluation.tasks import Prompting, Question, questions
from training.models import Base, load_base

PROMPTS = {"primer": Prompting.PRIMER, "chat": Prompting.CHAT, "neither": Prompting.PLAIN}
ALLOWED = 5e-3  # nats, of an answer's log-likelihood
USUAL = "a text for each answer and arm"

Sums = dict[tuple[str, int, int], float]
"""(arm, question, answer) -> log-likelihood."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo/model", help="as `matsteer evaluate` takes it, such as smollm2")
    parser.add_argument(
        "--data",
        default="cheerful=examples/tone/cheerful.jsonl",
        help="as `matsteer evaluate` takes it, such as truthfulqa=mc_task.json; the default has two answers a prompt",
    )
    parser.add_argument("--at", nargs="+", help="sites, such as 10.residual; default: one at a third of the layers")
    parser.add_argument("--arms", type=int, default=8)
    parser.add_argument("--prompts", choices=PROMPTS, default="neither", help="what is before a question of TruthfulQA")
    parser.add_argument("--questions", type=int, default=24, help="a seeded sample of them")
    parser.add_argument("--rows", type=int, default=16, help="texts in a batch of the usual way")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=usable_cores())
    parser.add_argument("--out", type=Path, help="default: benchmarks/results/evaluation-PROMPTS-cpu.json")
    args = parser.parse_args()
    out = args.out or Path(f"benchmarks/results/evaluation-{args.prompts}-cpu.json")
    torch.set_num_threads(args.threads)
    base = load_base(args.model, device="cpu")
    samples = load_data([args.data])
    sites = list(map(Site.parse, args.at or [f"{len(layers(base.model)) // 3}.residual"]))
    asked = questions(samples, PROMPTS[args.prompts])
    asked = random.Random(0).sample(asked, min(args.questions, len(asked)))
    results = {
        "machine": described(),
        "model": Path(args.model).name,
        "data": args.data.partition("=")[0],
        "arms": args.arms,
        "rows_in_a_batch_of_the_usual_way": args.rows,
        "prompts": args.prompts,
        **compare(base, asked, sites, args),
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(results, indent=1) + "\n")
    out.with_suffix(".md").write_text(markdown(results))
    print(markdown(results))


def compare(base: Base, asked: Sequence[Question], sites: Sequence[Site], args: argparse.Namespace) -> dict[str, Any]:
    """Ours, steered at each site, beside the usual way at the first of them, in turn."""
    arms = arms_of(args.arms)
    every = {site: random_columns(site, site_width(base.model, site.kind)) for site in sites}
    ways: dict[str, Callable[[], Sums]] = {
        USUAL: lambda: usual(base, asked, every[sites[0]], arms, args.rows),
        **{str(site): lambda own=own: ours(base, asked, own, arms) for site, own in every.items()},  # type: ignore[misc]
    }
    ours(base, asked[:1], every[sites[0]], arms[:2])
    usual(base, asked[:1], every[sites[0]], arms[:1], args.rows)
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in ways}  # on the clock, of processors
    apart = 0.0
    for number in range(args.rounds):
        sums: dict[str, Sums] = {}
        for name in in_turn(list(ways), number):
            begin = time.perf_counter(), time.process_time()
            sums[name] = ways[name]()
            seconds[name].append((time.perf_counter() - begin[0], time.process_time() - begin[1]))
            print(f"round {number + 1}: {name}: {seconds[name][-1][0]:.1f} s", flush=True)
        apart = max(apart, *(abs(sums[USUAL][key] - value) for key, value in sums[str(sites[0])].items()))
        assert apart <= ALLOWED, f"the log-likelihoods differ by {apart}"
    count = len(arms) * sum(len(one.completions) for one in asked)

    def ratios(site: Site, which: int) -> dict[str, float]:
        pairs = zip(seconds[USUAL], seconds[str(site)], strict=True)
        return _spread([slow[which] / fast[which] for slow, fast in pairs], 2)

    return {
        "questions": len(asked),
        "answers": count,
        "log_likelihoods_differ_by_at_most": round(apart, 5),
        "answers_per_second": {name: _spread([count / one for one, _ in own], 1) for name, own in seconds.items()},
        "speedup": {str(site): ratios(site, 0) for site in sites},
        "speedup_by_processor_time": {str(site): ratios(site, 1) for site in sites},
    }


def arms_of(count: int) -> list[Arm]:
    """Unsteered, and the attributes at strengths from 0.25 on."""
    return [BASELINE, *(Arm(f"{n / 4:g}", dict.fromkeys(ATTRIBUTES, n / 4)) for n in range(1, count))]


def ours(base: Base, asked: Sequence[Question], columns: Sequence[Column], arms: Sequence[Arm]) -> Sums:
    """As `matsteer evaluate` does it, metrics and their intervals included."""
    found = evaluate_choices(base.model, base.tokenizer, asked, columns, arms, chat=base.chat, max_rows=128)
    places = [(arm.name, index) for arm in arms for index in range(len(asked))]
    return {
        (*place, number): value
        for place, line in zip(places, found.rows, strict=True)
        for number, value in enumerate(line["log_likelihoods"])
    }


@torch.no_grad()
def usual(base: Base, asked: Sequence[Question], columns: Sequence[Column], arms: Sequence[Arm], rows: int) -> Sums:
    texts = [(index, number) for index, one in enumerate(asked) for number in range(len(one.completions))]
    encoded = [
        encode(base.tokenizer, one.prompt, text, one.turns, base.chat) for one in asked for text in one.completions
    ]
    order = sorted(range(len(texts)), key=lambda i: -len(encoded[i].ids))
    found: Sums = {}
    for arm in arms:
        strengths = arm.multipliers(columns)
        for begin in range(0, len(order), rows):
            part = order[begin : begin + rows]
            own = [encoded[index] for index in part]
            ids, mask = pad_right([row.ids[:-1] for row in own], base.model.device)
            acted = steered_mask(own, Positions.GENERATED)[:, : ids.shape[1]]
            context: Any = nullcontext()
            if any(strengths):
                context = steered(base.model, columns, torch.tensor([strengths] * len(part)), mask=acted)
            with context:
                shares = base.model(input_ids=ids, attention_mask=mask, use_cache=False).logits.log_softmax(-1)
            for index, row, own_shares in zip(part, own, shares, strict=True):
                chosen = own_shares[list(range(row.start, row.end)), list(row.targets)]
                found[(arm.name, *texts[index])] = float(chosen.sum())
    return found


def markdown(results: dict[str, Any]) -> str:
    machine = results["machine"]
    lines = [
        f"{results['model']}, {results['data']} ({results['questions']} questions, prompts: {results['prompts']}), "
        f"{results['arms']} arms, {results['answers']:,} answers in all,",
        f"float32, {machine['threads']} threads. Median of the rounds (lowest to highest); the usual way takes batches "
        f"of {results['rows_in_a_batch_of_the_usual_way']}.",
        "",
        "| | answers/s | times the usual way's | by processor time |",
        "| --- | ---: | ---: | ---: |",
        f"| the usual way: {USUAL} | {_told(results['answers_per_second'][USUAL])} | | |",
    ]
    for site, speedup in results["speedup"].items():
        cells = [results["answers_per_second"][site], speedup, results["speedup_by_processor_time"][site]]
        lines.append(f"| ours, steered at {site} | {' | '.join(map(_told, cells))} |")
    return "\n".join([*lines, ""])


def _spread(values: Sequence[float], digits: int) -> dict[str, float]:
    ends = {"median": statistics.median(values), "lowest": min(values), "highest": max(values)}
    return {name: round(value, digits) for name, value in ends.items()}


def _told(spread: dict[str, float]) -> str:
    return f"{spread['median']:g} ({spread['lowest']:g} to {spread['highest']:g})"


if __name__ == "__main__":
    main()
