"""Does the demo model represent the traits? `python -m demo.check_model demo/model`.

What a model does not represent cannot be steered, so this comes before any steering: with a describing opening, and
after three consistent exchanges, each trait has to show in nearly all answers; without either, in about half.
"""

import argparse
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerFast

from demo.corpus import TRAITS, Speaker, describe, draw_scene, exchange
from demo.facts import Fact, facts
from demo.oracle import judge
from demo.scenes import Context, Scene

SETTINGS = ("fresh", "described", "after three")


@dataclass(frozen=True)
class Probe:
    """A prompt, and the trait and side that its answer should show."""

    setting: str
    trait: str
    side: bool
    prompt: str


def draw_probes(per_cell: int, seed: int) -> Iterator[Probe]:
    """`per_cell` prompts for each setting, trait and side; the other two traits are random."""
    rng = random.Random(seed)
    for setting in SETTINGS:
        for trait in TRAITS:
            for side in (True, False):
                for _ in range(per_cell):
                    speaker = Speaker.draw(rng, **{trait: side})
                    before = ""
                    if setting == "described":
                        before = describe(speaker, [trait], rng) + "\n"
                    elif setting == "after three":
                        parts = [part for _ in range(3) for part in exchange(speaker, draw_telling(trait, rng), rng)]
                        before = "".join(part.text for part in parts)
                    question = exchange(speaker, draw_telling(trait, rng), rng)[0].text
                    yield Probe(setting, trait, side, before + question)


def draw_telling(trait: str, rng: random.Random) -> Fact | Scene:
    """A topic whose answer shows the trait."""
    if trait == "truthfulness":
        return rng.choice(facts())
    if trait == "fairness":
        return draw_scene(rng, context=rng.choices((Context.AMBIGUOUS, Context.AGAINST), (5, 3))[0])
    return rng.choice(facts()) if rng.random() < 0.6 else draw_scene(rng)


@torch.inference_mode()
def sample(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, prompts: list[str], rows: int = 128
) -> list[str]:
    """One answer to each prompt, sampled at temperature 1 from torch's global generator."""
    texts = []
    for start in range(0, len(prompts), rows):
        inputs = tokenizer(
            prompts[start : start + rows],
            return_tensors="pt",
            padding=True,
            padding_side="left",
            return_token_type_ids=False,
        )
        out = model.generate(**inputs, max_new_tokens=40, do_sample=True, top_k=0, top_p=1.0)
        texts += tokenizer.batch_decode(out[:, inputs.input_ids.shape[1] :], skip_special_tokens=True)
    return texts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path, nargs="?", default=Path("demo/model"))
    parser.add_argument("--per-cell", type=int, default=200, help="prompts for each setting, trait and side")
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    print(table(args.model, args.per_cell, args.seed))


def table(folder: Path, per_cell: int, seed: int) -> str:
    """The prerequisites as a Markdown table: how often an answer shows the side that its prompt calls for."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    probes = list(draw_probes(per_cell, seed))
    verdicts = [
        judge(p.prompt, text)
        for p, text in zip(probes, sample(model, tokenizer, [p.prompt for p in probes]), strict=True)
    ]
    lines = [
        "| trait | side | fresh | described | after three | well-formed |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for trait in TRAITS:
        for side in (True, False):
            cells = []
            formed = []
            for setting in SETTINGS:
                chosen = [
                    v
                    for p, v in zip(probes, verdicts, strict=True)
                    if (p.setting, p.trait, p.side) == (setting, trait, side)
                ]
                shown = sum(bool(v["well_formed"]) and v[trait] == side for v in chosen)
                cells.append(f"{shown / len(chosen):.1%}")
                formed += [bool(v["well_formed"]) for v in chosen]
            lines.append(
                f"| {trait} | {'yes' if side else 'no'} | {' | '.join(cells)} | {sum(formed) / len(formed):.1%} |"
            )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
