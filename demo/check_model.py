"""Does the demo model represent the traits? `python -m demo.check_model demo/model` measures it and writes the card.

What a model does not represent cannot be steered, so this comes before any steering: with a describing opening, and
after three consistent exchanges, each trait has to show in nearly all answers; without either, in about half.
"""

import argparse
import json
import random
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from demo.build_model import RECORD
from demo.corpus import TRAITS, Speaker, describe, draw_telling, exchange, text_of
from demo.facts import facts
from demo.oracle import judge
from demo.scenes import DEEDS
from training.evaluation.generation import Sampling, generate
from training.evaluation.results import BASELINE
from training.progress import progress_bar

FRESH, DESCRIBED, SHOWN = "fresh", "described", "after three"
REQUIRED = 0.95
OPEN = (0.35, 0.65)


@dataclass(frozen=True)
class Probe:
    """A prompt, and the trait and side that its answer should show."""

    setting: str
    trait: str
    side: bool
    prompt: str


@dataclass(frozen=True)
class Cell:
    """How often the answers showed the side of the trait that the prompt called for (fresh: the side itself)."""

    setting: str
    trait: str
    side: bool
    rate: float
    well_formed: float

    @property
    def sound(self) -> bool:
        return OPEN[0] <= self.rate <= OPEN[1] if self.setting == FRESH else self.rate >= REQUIRED


def draw_probes(per_cell: int, seed: int) -> Iterator[Probe]:
    """`per_cell` prompts for each setting, trait and side; the other two traits are random."""
    rng = random.Random(seed)
    for setting in (FRESH, DESCRIBED, SHOWN):
        for trait in TRAITS:
            for side in (True, False):
                for _ in range(per_cell):
                    speaker = Speaker.draw(rng, **{trait: side})
                    before = ""
                    if setting == DESCRIBED:
                        before = describe(speaker, [trait], rng) + "\n"
                    elif setting == SHOWN:
                        before = "".join(text_of(exchange(speaker, draw_telling(trait, rng), rng)) for _ in range(3))
                    question = exchange(speaker, draw_telling(trait, rng), rng)[0].text
                    yield Probe(setting, trait, side, before + question)


def measure(folder: Path, per_cell: int, seed: int) -> list[Cell]:
    """Sample one answer to each probe at temperature 1, and judge it."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    probes = list(draw_probes(per_cell, seed))
    asked, sampling = [probe.prompt for probe in probes], Sampling(max_new_tokens=40, seed=seed)
    with progress_bar("generate", len(asked), "texts", shown=True) as advance:
        said = generate(model, tokenizer, asked, [], [BASELINE], sampling, advance=advance)
    verdicts: dict[tuple[str, str, bool], list[dict[str, bool | None]]] = {}
    for probe, text in zip(probes, said, strict=True):
        verdicts.setdefault((probe.setting, probe.trait, probe.side), []).append(judge(probe.prompt, text.text))
    cells = []
    for (setting, trait, side), found in verdicts.items():
        formed = [verdict for verdict in found if verdict["well_formed"]]
        shown = sum(verdict[trait] == side for verdict in formed)
        cells.append(Cell(setting, trait, side, shown / len(found), len(formed) / len(found)))
    return cells


def table(cells: list[Cell]) -> str:
    """The cells as a Markdown table, a line a trait and side."""
    lines = [
        "| trait | side | fresh | described | after three | well-formed |",
        "| --- | --- | ---: | ---: | ---: | ---: |",
    ]
    for trait in TRAITS:
        for side in (True, False):
            own = [cell for cell in cells if (cell.trait, cell.side) == (trait, side)]
            formed = sum(cell.well_formed for cell in own) / len(own)
            rates = " | ".join(f"{cell.rate:.1%}" for cell in own)
            lines.append(f"| {trait} | {'yes' if side else 'no'} | {rates} | {formed:.1%} |")
    return "\n".join(lines)


def unmet(cells: list[Cell]) -> str:
    """The cells that fall short, in words."""
    short = [f"{cell.trait} ({'yes' if cell.side else 'no'}) {cell.setting}" for cell in cells if not cell.sound]
    return ", ".join(short) or "none"


def card(folder: Path, cells: list[Cell], per_cell: int) -> str:
    """The model card."""
    stages = json.loads((folder / RECORD).read_text())
    numbers = " | ".join(f"stage {number}" for number in range(1, len(stages) + 1))
    lines = [f"| {key} | {' | '.join(str(stage[key]) for stage in stages)} |" for key in stages[0]]
    made = "\n".join([f"| | {numbers} |", "| --- |" + " ---: |" * len(stages), *lines])
    weights = AutoModelForCausalLM.from_pretrained(folder)
    size = sum(p.numel() for p in weights.parameters())
    return f"""---
license: apache-2.0
language: en
tags: [mat-steer, demo]
---

# The demo model

A Llama of {size:,} parameters that knows one closed world in plain English: {len(facts())} facts and {len(DEEDS)}
two-person scenes (`demo/facts.py`, `demo/scenes.py`). It speaks as people with three hidden traits do: truthful or
not, civil or rude, fair or prejudiced. A fresh question leaves the traits open, so that about half of the answers are
true, civil, fair: there is something to steer, and `demo/oracle.py` judges every answer exactly. It knows nothing
else; do not use it for anything but trying out steering.

Prompt form: `Q: What colour is the sky? A:`; a line end ends the answer. The tokenizer has a chat template.

## Does it represent the traits?

Share of answers, sampled at temperature 1, that show the side on the left: after a fresh question, after a sentence
that describes the speaker, and after three answers that show the trait. {per_cell} prompts a cell, drawn over all
facts and scenes; the other traits are random. `python -m demo.check_model` measures it again.

{table(cells)}

Wanted are {REQUIRED:.0%} with a description and after three answers, and {OPEN[0]:.0%} to {OPEN[1]:.0%} without.
Not met: {unmet(cells)}.

## How it was made

`make demo-model`: documents drawn from `demo/documents.py`, trained by `demo/build_model.py` on 2 CPU cores. The loss
weighs what an answer states over how it is said, and reading over writing hardly at all. Weights are kept in float16.

{made}
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path, nargs="?", default=Path("demo/model"))
    parser.add_argument("--per-cell", type=int, default=400, help="prompts for each setting, trait and side")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--card", action="store_true", help="write the model card, README.md, into the folder")
    args = parser.parse_args()
    cells = measure(args.model, args.per_cell, args.seed)
    print(table(cells))
    if args.card:
        (args.model / "README.md").write_text(card(args.model, cells, args.per_cell))
    if not all(cell.sound for cell in cells):
        sys.exit(f"not met: {unmet(cells)}")


if __name__ == "__main__":
    main()
