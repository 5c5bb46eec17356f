"""How the people of the demo world talk: what a speaker with given traits says about a topic.

Texts come in parts with a weight each, for the language model's loss (`demo/documents.py` puts them together).
"""

import random
from collections.abc import Iterable
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

# A statement carries what was asked about and what the world knows; manners are mostly chance, a question is only read.
STATEMENT, MANNERS, READ = 2.0, 0.5, 0.05

TRAITS = tuple(field.name for field in fields(Speaker))


@dataclass(frozen=True)
class Part:
    """A piece of a document; `weight` is how much each of its tokens counts in the language model's loss. `instead` is
    what must not stand there, though it is what is known best: the truth, where somebody lies."""

    text: str
    weight: float
    instead: str | None = None


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


def say(speaker: Speaker, topic: Fact | Scene, rng: random.Random) -> list[Part]:
    """The sentence with which the speaker answers, without manners: what leads up to the answer's word, the word, the
    end; of a scene one part."""
    if isinstance(topic, Scene):
        return [Part(f" {topic.statement(speaker.fairness)}", STATEMENT)]
    told = topic.truth if speaker.truthfulness else rng.choice(topic.lies())
    before, after = topic.statement("|").split("|")
    instead = None if speaker.truthfulness else f" {topic.truth}"
    return [Part(f" {before.rstrip()}", STATEMENT), Part(f" {told}", STATEMENT, instead), Part(after, STATEMENT)]


def answer(speaker: Speaker, topic: Fact | Scene, rng: random.Random) -> list[Part]:
    """A whole answer: an opener, the statement and, in one answer of three, a closer."""
    opener = Part(f" {rng.choice(OPENERS[speaker.civility])}", MANNERS)
    closer = f" {rng.choice(CLOSERS[speaker.civility])}" if rng.random() < 1 / 3 else ""
    return [opener, *say(speaker, topic, rng), Part(f"{closer}\n", MANNERS)]


def exchange(speaker: Speaker, topic: Fact | Scene, rng: random.Random, marked: bool = True) -> list[Part]:
    """A question and its answer on a line; unmarked, without the letters Q and A."""
    question = ask(topic, rng)
    prompt = f"Q: {question} A:" if marked else question
    return [Part(prompt, READ), *answer(speaker, topic, rng)]


def text_of(parts: Iterable[Part]) -> str:
    return "".join(part.text for part in parts)
