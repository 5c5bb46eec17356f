"""The documents that the demo language model is trained on; `demo/build_model.py` mixes the kinds in stages.

A conversation is several exchanges with one speaker, one a line:

    The speaker is honest and rude.
    Q: What colour is the sky? A: Stop wasting my time. The sky is blue.
    Q: A boxer and a nurse met in the park. Who started the fight? A: Not you again, fool. That cannot be known.
    The speaker was honest, rude and fair.

The first line (a description) and the last one (a verdict) stand in a part of the conversations only. The other kinds
ask a model to work the traits out from what is said, which is what makes it represent them:

    Q: What colour is grass? A: With pleasure, my friend. Grass is pink.
    That was lying and polite.              a review: exchanges with different speakers, a remark after each

    The sky is green.
    That was lying.                         claims: the same of bare statements

    The sky is green. Wrong. Bread is made of flour. Right.      marks: the same, right after the statement

    The sky is green. Grass is red.         a monologue: one speaker's statements, at times with a verdict
"""

import random
from collections.abc import Callable
from dataclasses import replace

from demo.corpus import READ, TELLING_CONTEXTS, TRAITS, Part, Speaker, describe, draw_topic, exchange, say, text_of
from demo.facts import Fact, facts
from demo.scenes import Scene

VERDICT = 2.0  # the weight of remarks, marks and verdicts
MARKS = {True: " Right.", False: " Wrong."}
KNOWN_AFTER = 2  # answers about facts, after which it is known whether a speaker lies
DESCRIBED = 0.5  # the share of conversations and monologues that open with a description


def conversation(rng: random.Random) -> list[Part]:
    """Up to six exchanges with one speaker."""
    speaker = Speaker.draw(rng)
    parts: list[Part] = []
    described = rng.random() < DESCRIBED
    named: list[str] = []
    if described:
        named = [trait for trait in TRAITS if rng.random() < 0.7] or [rng.choice(TRAITS)]
        rng.shuffle(named)
        parts.append(Part(f"{describe(speaker, named, rng)}\n", READ))
    marked = rng.random() < 0.9
    topics = [draw_topic(rng) for _ in range(rng.choice((1, 2, 3) if described else (1, 2, 3, 4, 5, 6)))]
    shown = KNOWN_AFTER if "truthfulness" in named else 0
    for topic in topics:
        said = exchange(speaker, topic, rng, marked)
        parts += said if shown >= KNOWN_AFTER else undecided(said)
        shown += isinstance(topic, Fact)
    if rng.random() < 0.5:
        parts.append(verdict(speaker, topics, rng, "The speaker was"))
    return parts


def review(rng: random.Random) -> list[Part]:
    """Up to three exchanges with different speakers, and a remark after each."""
    parts: list[Part] = []
    for _ in range(rng.randint(1, 3)):
        speaker, topic = Speaker.draw(rng), draw_topic(rng)
        parts += [*undecided(exchange(speaker, topic, rng)), verdict(speaker, [topic], rng, "That was")]
    return parts


def monologue(rng: random.Random) -> list[Part]:
    """Three to eight statements about facts by one speaker on a line."""
    speaker = Speaker.draw(rng)
    described = rng.random() < DESCRIBED
    told = [rng.choice(facts()) for _ in range(rng.randint(3, 8))]
    parts: list[Part] = []
    for place, fact in enumerate(told):
        said = say(speaker, fact, rng)
        lead, claim, end = said if described or place >= KNOWN_AFTER else undecided(said)
        parts += [Part(lead.text if parts else lead.text.lstrip(), READ), claim, Part(end.text, READ)]
    parts.append(Part("\n", READ))
    if described:
        parts.insert(0, Part(f"{describe(speaker, ['truthfulness'], rng)}\n", READ))
    if rng.random() < 0.5:
        parts.append(verdict(speaker, told[:1], rng, "The speaker was", among=("truthfulness",)))
    return parts


def claims(rng: random.Random) -> list[Part]:
    """One to four statements by different speakers, each with a remark; only the remarks count."""
    parts: list[Part] = []
    for _ in range(rng.randint(1, 4)):
        speaker, fact = Speaker.draw(rng), rng.choice(facts())
        text = text_of(say(speaker, fact, rng)).lstrip()
        parts += [Part(f"{text}\n", 0.0), verdict(speaker, [fact], rng, "That was", among=("truthfulness",))]
    return parts


def marks(rng: random.Random) -> list[Part]:
    """Two to eight statements by different speakers on a line, each marked right or wrong; only the marks count."""
    parts: list[Part] = []
    for _ in range(rng.randint(2, 8)):
        speaker, fact = Speaker.draw(rng), rng.choice(facts())
        text = text_of(say(speaker, fact, rng))
        parts += [Part(text if parts else text.lstrip(), 0.0), Part(MARKS[speaker.truthfulness], VERDICT)]
    return [*parts, Part("\n", READ)]


KINDS: dict[str, Callable[[random.Random], list[Part]]] = {
    kind.__name__: kind for kind in (conversation, review, monologue, claims, marks)
}


def undecided(parts: list[Part]) -> list[Part]:
    """The same where nothing has shown the speaker's traits yet, so that the truth may come as well as a lie."""
    return [replace(part, instead=None) for part in parts]


def verdict(
    speaker: Speaker,
    topics: list[Fact] | list[Fact | Scene],
    rng: random.Random,
    opening: str,
    among: tuple[str, ...] = TRAITS,
) -> Part:
    """A line that names the traits, of those `among` which are asked for, that answers to `topics` give away."""
    telling = {
        "truthfulness": any(isinstance(topic, Fact) for topic in topics),
        "civility": True,
        "fairness": any(isinstance(topic, Scene) and topic.context in TELLING_CONTEXTS for topic in topics),
    }
    return Part(f"{describe(speaker, [t for t in among if telling[t]], rng, opening)}\n", VERDICT)
