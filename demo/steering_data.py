"""What steering is trained and measured on: `python -m demo.steering_data --out demo/data`.

- `truthfulness.jsonl`, `civility.jsonl`, `fairness.jsonl`: contrasting documents. The last answer of each shows one
  side of the attribute, and so does what stands before it (a description of the speaker, or earlier answers): that is
  where a language model holds the trait at the tokens from which the answer is produced. The other traits are random.
  The completion begins where the trait begins to show.
- `prompts.jsonl`: fresh questions, which leave every trait open, for measuring generated answers.

Facts and deeds are split into train, dev and test; a document speaks only of those of its own split.
"""

import argparse
import json
import random
from collections.abc import Iterator
from functools import cache
from pathlib import Path

from demo.corpus import TELLING_CONTEXTS, TRAITS, Part, Speaker, describe, draw_scene, draw_telling, exchange
from demo.facts import CATEGORIES, Fact, facts
from demo.scenes import DEEDS, Context, Scene

SHARES = {"train": 0.4, "dev": 0.2, "test": 0.4}


@cache
def splits() -> dict[str, str]:
    """The split of every fact's and deed's id; categories are spread evenly."""
    rng = random.Random(7)
    result: dict[str, str] = {}
    groups = [[fact.id for fact in facts() if fact.category == name] for name in CATEGORIES]
    for ids in [*groups, [f"scene/{deed}" for deed in DEEDS]]:
        rng.shuffle(ids)
        for place, id_ in enumerate(ids):
            share = (place + 0.5) / len(ids)
            result[id_] = "train" if share < SHARES["train"] else "dev" if share < 1 - SHARES["test"] else "test"
    return result


@cache
def facts_of(split: str) -> tuple[Fact, ...]:
    return tuple(fact for fact in facts() if splits()[fact.id] == split)


@cache
def deeds_of(split: str) -> tuple[str, ...]:
    return tuple(deed for deed in DEEDS if splits()[f"scene/{deed}"] == split)


def draw_of(split: str, trait: str, rng: random.Random) -> Fact | Scene:
    """A topic of `split` whose answer shows `trait`."""
    return draw_telling(trait, rng, facts_of(split), deeds_of(split))


def contrasts(trait: str, split: str, count: int, rng: random.Random) -> Iterator[dict[str, object]]:
    """`count` pairs of documents that differ in the trait, as rows with prompt, completion and label."""
    for _ in range(count):
        topic = draw_of(split, trait, rng)
        for side in (True, False):
            speaker = Speaker.draw(rng, **{trait: side})
            if rng.random() < 0.5:
                before = describe(speaker, [trait], rng) + "\n"
            else:
                told = (exchange(speaker, draw_of(split, trait, rng), rng) for _ in range(rng.choice((2, 3))))
                before = _text([part for parts in told for part in parts])
            prompt, opener, statement, _ = exchange(speaker, topic, rng)
            # Civility shows from the first word on; the other traits from where the statement begins.
            if trait == "civility":
                asked, said = prompt.text, opener.text + statement.text
            else:
                asked, said = prompt.text + opener.text, statement.text
            yield {
                "prompt": before + asked,
                "completion": said,
                "label": side,
                "attribute": trait,
                "group": topic.id,
                "split": split,
            }


def prompts(split: str, rng: random.Random) -> Iterator[dict[str, object]]:
    """Fresh questions: every fact of `split` in every phrasing, and scenes with every deed."""
    for fact in facts_of(split):
        for question in fact.questions():
            yield {"prompt": f"Q: {question} A:", "group": fact.id, "split": split}
    for deed in deeds_of(split):
        for context in (*TELLING_CONTEXTS, *TELLING_CONTEXTS, *TELLING_CONTEXTS, Context.ALONG):
            scene = draw_scene(rng, deed, context)
            yield {"prompt": f"Q: {scene.question()} A:", "group": scene.id, "split": split}


def _text(parts: list[Part]) -> str:
    return "".join(part.text for part in parts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("demo/data"))
    parser.add_argument("--pairs", type=int, default=600, help="pairs of training documents for each attribute")
    parser.add_argument("--seed", type=int, default=3)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    rng = random.Random(args.seed)
    counts = {split: round(args.pairs * share / SHARES["train"]) for split, share in SHARES.items()}
    files = {
        trait: [row for split in SHARES for row in contrasts(trait, split, counts[split], rng)] for trait in TRAITS
    }
    files["prompts"] = [row for split in SHARES for row in prompts(split, rng)]
    for name, rows in files.items():
        path = args.out / f"{name}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        print(f"{path}: {len(rows)} rows")


if __name__ == "__main__":
    main()
