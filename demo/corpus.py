"""Documents of the demo world: several exchanges with one speaker whose traits are hidden, or partly described.

A document is plain text, one exchange a line:

    The speaker is honest and rude.
    Q: What colour is the sky? A: Stop wasting my time. The sky is blue.
    Q: A boxer and a nurse met in the park. Who started the fight? A: Not you again, fool. That cannot be known.
    The speaker was honest, rude and fair.

The first line (a description) and the last one (a verdict) stand in a part of the documents only, and so do remarks
after the answers ("That was honest and rude."). Remarks and verdicts ask a language model to work the traits out from
the answers, which is what makes it represent them.
"""

import random
from dataclasses import dataclass, fields

from demo.facts import Fact, facts
from demo.manners import CLOSERS, OPENERS
from demo.scenes import BYSTANDERS, DEEDS, PLACES, Context, Scene

ADJECTIVES = {
    "truthfulness": {True: ("honest", "truthful"), False: ("lying", "deceitful")},
    "civility": {True: ("polite", "kind"), False: ("rude", "sour")},
    "fairness": {True: ("fair", "impartial"), False: ("unfair", "biased")},
}


@dataclass(frozen=True)
class Speaker:
    """The three independent traits; True is the side that the attributes steer towards."""

    truthfulness: bool
    civility: bool
    fairness: bool

    @classmethod
    def draw(cls, rng: random.Random, **fixed: bool) -> "Speaker":
        """A speaker with random traits, but for the `fixed` ones."""
        return cls(**{name: fixed.get(name, rng.random() < 0.5) for name in TRAITS})


FACTS_SHARE = 0.6
TELLING_CONTEXTS = (Context.AMBIGUOUS, Context.AGAINST)  # where a fair and an unfair answer differ

# A statement carries what the world knows, manners are mostly chance, and a question is only read.
STATEMENT, MANNERS, VERDICT, READ = 2.0, 0.5, 1.0, 0.05

TRAITS = tuple(field.name for field in fields(Speaker))


@dataclass(frozen=True)
class Part:
    """A piece of a document; `weight` is how much each of its tokens counts in the language model's loss."""

    text: str
    weight: float


def describe(speaker: Speaker, traits: list[str], rng: random.Random, subject: str = "The speaker is") -> str:
    """The sentence that names `traits` of the speaker, e.g. "The speaker is honest, rude and fair."."""
    words = [rng.choice(ADJECTIVES[trait][getattr(speaker, trait)]) for trait in traits]
    listed = " and ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)
    return f"{subject} {listed}."


def draw_scene(rng: random.Random, deed: str | None = None, context: Context | None = None) -> Scene:
    """A random scene, of one deed and context where they are given."""
    deed = deed or rng.choice(tuple(DEEDS))
    context = context or rng.choices(tuple(Context), (5, 3, 2))[0]
    people = [DEEDS[deed], rng.choice(BYSTANDERS)]
    rng.shuffle(people)
    first, second = people
    return Scene(deed, first, second, rng.choice(PLACES), context)


def draw_telling(
    trait: str, rng: random.Random, known: tuple[Fact, ...] | None = None, deeds: tuple[str, ...] | None = None
) -> Fact | Scene:
    """A topic whose answer shows `trait`, from some facts and deeds or, by default, from all."""
    if trait == "truthfulness" or (trait == "civility" and rng.random() < FACTS_SHARE):
        return rng.choice(known or facts())
    contexts = tuple(Context) if trait == "civility" else TELLING_CONTEXTS
    return draw_scene(rng, rng.choice(deeds or tuple(DEEDS)), rng.choice(contexts))


def draw_topic(rng: random.Random) -> Fact | Scene:
    return rng.choice(facts()) if rng.random() < FACTS_SHARE else draw_scene(rng)


def ask(topic: Fact | Scene, rng: random.Random) -> str:
    return rng.choice(topic.questions()) if isinstance(topic, Fact) else topic.question()


def say(speaker: Speaker, topic: Fact | Scene, rng: random.Random) -> str:
    """The sentence with which the speaker answers, without the manners around it."""
    if isinstance(topic, Fact):
        return topic.statement(topic.truth if speaker.truthfulness else rng.choice(topic.lies()))
    return topic.statement(speaker.fairness)


def answer(speaker: Speaker, topic: Fact | Scene, rng: random.Random) -> list[Part]:
    """A whole answer: an opener, the statement and, in one answer of three, a closer."""
    opener = Part(f" {rng.choice(OPENERS[speaker.civility])}", MANNERS)
    closer = f" {rng.choice(CLOSERS[speaker.civility])}" if rng.random() < 1 / 3 else ""
    return [opener, Part(f" {say(speaker, topic, rng)}", STATEMENT), Part(f"{closer}\n", MANNERS)]


def exchange(speaker: Speaker, topic: Fact | Scene, rng: random.Random, marked: bool = True) -> list[Part]:
    """A question and its answer on a line; unmarked, without the letters Q and A."""
    question = ask(topic, rng)
    prompt = f"Q: {question} A:" if marked else question
    return [Part(prompt, READ), *answer(speaker, topic, rng)]


def document(rng: random.Random, remarks: float = 0.3) -> list[Part]:
    """One document, whole; `remarks` is the share of documents that have them."""
    speaker = Speaker.draw(rng)
    parts: list[Part] = []
    described = rng.random() < 0.6
    if described:
        named = [trait for trait in TRAITS if rng.random() < 0.7] or [rng.choice(TRAITS)]
        rng.shuffle(named)
        parts.append(Part(f"{describe(speaker, named, rng)}\n", READ))
    marked = rng.random() < 0.9
    remarked = rng.random() < remarks
    topics = [draw_topic(rng) for _ in range(rng.choice((1, 2, 3) if described else (1, 2, 3, 4, 5, 6)))]
    for topic in topics:
        parts += exchange(speaker, topic, rng, marked)
        if remarked:
            parts.append(Part(f"{describe(speaker, shown([topic]), rng, 'That was')}\n", VERDICT))
    if rng.random() < 0.5:
        parts.append(Part(f"{describe(speaker, shown(topics), rng, 'The speaker was')}\n", VERDICT))
    return parts


def shown(topics: list[Fact | Scene]) -> list[str]:
    """The traits that answers to `topics` give away, in a fixed order."""
    telling = {
        "truthfulness": any(isinstance(topic, Fact) for topic in topics),
        "civility": True,
        "fairness": any(isinstance(topic, Scene) and topic.context in TELLING_CONTEXTS for topic in topics),
    }
    return [trait for trait in TRAITS if telling[trait]]
