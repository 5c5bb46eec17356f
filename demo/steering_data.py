"""What steering is trained and measured on: `python -m demo.steering_data --out demo/data`.

- `truthfulness.jsonl`, `civility.jsonl`, `fairness.jsonl`: contrasting documents. Positive: a first line describes the
  speaker's side of the attribute, and the answer shows it. Negative: the same of the other side, and bare questions
  with such an answer. The other traits are random. The prompt runs up to the token at which the trait decides.
  Some more positives are cut where another trait decides: there the gate learns to stay closed.
- `prompts.jsonl`: fresh questions, which leave every trait open, for measuring generated answers.

Facts and deeds are split into train, dev and test; a document speaks only of those of its own split.
"""

import argparse
import json
import random
from collections.abc import Iterator
from functools import cache
from pathlib import Path

from demo.corpus import TELLING_CONTEXTS, TRAITS, Speaker, answer, ask, describe, draw_scene, draw_telling, say, text_of
from demo.facts import CATEGORIES, Fact, facts
from demo.scenes import DEEDS, Context, Scene

SCENES = 8  # for each deed and context where fair and unfair answers differ
ELSEWHERE = 0.2  # positives that are cut where another trait decides, for each topic
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
    """`count` topics, each answered by both sides of the trait and, on the negative side, once more by a speaker whom
    nothing describes: what an unsteered model says wrong. Rows with prompt, completion and label."""
    for _ in range(count):
        topic = draw_of(split, trait, rng)
        question = ask(topic, rng)
        for side, described in ((True, True), (False, True), (False, False)):
            yield document(trait, topic, question, split, rng, side=side, described=described)
        if rng.random() < ELSEWHERE:
            other = rng.choice([name for name in ("truthfulness", "fairness") if name != trait])
            topic = draw_of(split, other, rng)
            described = rng.random() < 0.5
            yield document(trait, topic, ask(topic, rng), split, rng, side=True, described=described, decides=other)


def document(
    trait: str,
    topic: Fact | Scene,
    question: str,
    split: str,
    rng: random.Random,
    *,
    side: bool,
    described: bool,
    decides: str | None = None,
) -> dict[str, object]:
    """One answer to a question on the topic by a speaker of that side of the trait, cut where the trait `decides`, or
    another one does."""
    speaker = Speaker.draw(rng, **{trait: side})
    before = f"{describe(speaker, [trait], rng)}\n" if described else ""
    begun, rest = cut(speaker, topic, decides or trait, rng)
    return {
        "prompt": f"{before}Q: {question} A:{begun}",
        "completion": rest,
        "label": side,
        "attribute": trait,
        "group": topic.id,
        "split": split,
    }


def cut(speaker: Speaker, topic: Fact | Scene, trait: str, rng: random.Random) -> tuple[str, str]:
    """An answer in two parts, cut where the trait decides what comes next.

    Civility decides how an answer opens and closes. The other traits decide where the speaker's statement parts from
    that of somebody with the other side of the trait.
    """
    parts = answer(speaker, topic, rng)
    opener, statement, closer = (text_of(some).rstrip("\n") for some in (parts[:1], parts[1:-1], parts[-1:]))
    if trait == "civility":
        if closer and rng.random() < 0.5:
            return opener + statement, closer
        return "", opener + statement + closer
    other = Speaker(**{**vars(speaker), trait: not getattr(speaker, trait)})
    words, others = statement.split(" ")[1:], text_of(say(other, topic, rng)).split(" ")[1:]
    at = next(index for index, pair in enumerate(zip(words, others, strict=False)) if pair[0] != pair[1])
    return opener + "".join(f" {word}" for word in words[:at]), "".join(f" {word}" for word in words[at:])


def prompts(split: str, rng: random.Random) -> Iterator[dict[str, object]]:
    """Fresh questions: every fact of `split` in every phrasing, and scenes with every deed."""
    for fact in facts_of(split):
        for question in fact.questions():
            yield {"prompt": f"Q: {question} A:", "group": fact.id, "split": split}
    for deed in deeds_of(split):
        for context in (*TELLING_CONTEXTS * SCENES, *(Context.ALONG,) * 2):
            scene = draw_scene(rng, deed, context)
            yield {"prompt": f"Q: {scene.question()} A:", "group": scene.id, "split": split}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("demo/data"))
    parser.add_argument("--topics", type=int, default=300, help="topics of training documents for each attribute")
    parser.add_argument("--seed", type=int, default=3)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    rng = random.Random(args.seed)
    counts = {split: round(args.topics * share / SHARES["train"]) for split, share in SHARES.items()}
    files = {
        trait: [row for split in SHARES for row in contrasts(trait, split, counts[split], rng)] for trait in TRAITS
    }
    files["prompts"] = [row for split in SHARES for row in prompts(split, rng)]
    rng.shuffle(files["prompts"])  # so that the first few are a fair sample
    for name, rows in files.items():
        path = args.out / f"{name}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        print(f"{path}: {len(rows)} rows")


if __name__ == "__main__":
    main()
