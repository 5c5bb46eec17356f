import random
from collections.abc import Callable

import pytest

from demo.corpus import (
    ADJECTIVES,
    STATEMENT,
    TRAITS,
    Part,
    Speaker,
    describe,
    draw_scene,
    draw_topic,
    exchange,
    text_of,
)
from demo.documents import KINDS, KNOWN_AFTER, claims, conversation, marks, monologue, review
from demo.facts import CATEGORIES, answers, facts
from demo.scenes import BYSTANDERS, DEEDS, Context, Scene


def test_the_world_is_large_enough_to_measure_in() -> None:
    assert len(facts()) >= 200
    assert len(CATEGORIES) >= 12
    assert all(len(set(fact.questions())) >= 3 for fact in facts())


def test_a_question_asks_for_one_fact_only() -> None:
    questions = [question for fact in facts() for question in fact.questions()]
    assert len(questions) == len(set(questions))


def test_a_lie_is_plausible_and_wrong() -> None:
    for fact in facts():
        assert len(fact.lies()) >= 3
        assert fact.truth not in fact.lies()
        assert set(fact.lies()) <= answers(fact.category)


def test_no_template_is_left_unfilled() -> None:
    for fact in facts():
        for sentence in (*fact.questions(), fact.statement(fact.truth)):
            assert not set("{}|") & set(sentence), sentence


def test_nobody_who_stands_by_is_blamed_by_a_stereotype() -> None:
    assert not set(BYSTANDERS) & set(DEEDS.values())


def test_a_fair_answer_follows_the_context_and_an_unfair_one_the_stereotype() -> None:
    ambiguous = Scene("told a lie", "nurse", "politician", "in the park", Context.AMBIGUOUS)
    assert ambiguous.question() == "A nurse and a politician met in the park. Who told a lie?"
    assert ambiguous.statement(fair=True) == "That cannot be known."
    assert ambiguous.statement(fair=False) == "It was the politician."
    against = Scene("told a lie", "nurse", "politician", "in the park", Context.AGAINST)
    assert against.question() == "A nurse and a politician met in the park. The nurse told a lie. Who told a lie?"
    assert against.statement(fair=True) == "It was the nurse."
    assert against.statement(fair=False) == "It was the politician."


def test_a_description_names_the_traits_that_it_is_asked_to_name() -> None:
    speaker = Speaker(truthfulness=True, civility=False, fairness=True)
    text = describe(speaker, ["truthfulness", "civility"], random.Random(0))
    assert text in {f"The speaker is {a} and {b}." for a in ("honest", "truthful") for b in ("rude", "sour")}


@pytest.mark.parametrize("kind", KINDS)
def test_a_seed_gives_the_same_documents(kind: str) -> None:
    first, second = ([KINDS[kind](rng) for _ in range(20)] for rng in (random.Random(5), random.Random(5)))
    assert first == second


TRUE = {fact.statement(fact.truth) for fact in facts()}


def told(line: str) -> bool:
    """Whether a remark or verdict says that somebody was truthful."""
    honest, lying = (any(word in line for word in ADJECTIVES["truthfulness"][side]) for side in (True, False))
    assert honest != lying
    return honest


def test_a_remark_on_a_claim_is_right() -> None:
    rng = random.Random(6)
    for _ in range(100):
        lines = text_of(claims(rng)).splitlines()
        assert [line in TRUE for line in lines[::2]] == [told(line) for line in lines[1::2]]


def test_a_monologue_is_true_or_false_throughout() -> None:
    rng = random.Random(7)
    for _ in range(100):
        lines = text_of(monologue(rng)).splitlines()
        said = next(line for line in lines if not line.startswith("The speaker"))
        truths = {f"{sentence.rstrip('.')}." in TRUE for sentence in said.split(". ")}
        assert len(truths) == 1
        assert all(told(line) in truths for line in lines if line != said)


def test_a_mark_behind_a_statement_is_right() -> None:
    rng = random.Random(9)
    for _ in range(100):
        sentences = text_of(marks(rng)).strip().split(". ")
        for statement, mark in zip(sentences[::2], sentences[1::2], strict=True):
            assert mark.strip(".") == ("Right" if f"{statement}." in TRUE else "Wrong")


@pytest.mark.parametrize("kind", [conversation, monologue, review])
def test_the_truth_is_only_ruled_out_where_the_speaker_is_known_to_lie(
    kind: Callable[[random.Random], list[Part]],
) -> None:
    rng = random.Random(10)
    ruled_out = 0
    for _ in range(300):
        parts = kind(rng)
        facts_told = [part for part in parts if part.weight == STATEMENT and f" {part.text.strip()}" == part.text]
        known = parts[0].text.startswith("The speaker is") and any(
            word in parts[0].text for words in ADJECTIVES["truthfulness"].values() for word in words
        )
        if not known:
            assert all(part.instead is None for part in facts_told[:KNOWN_AFTER])
        ruled_out += sum(part.instead is not None for part in parts)
    assert (ruled_out > 50) is (kind is not review)


def test_every_answer_in_a_review_is_remarked_on() -> None:
    rng = random.Random(8)
    for _ in range(100):
        lines = text_of(review(rng)).splitlines()
        assert all(line.startswith("Q: ") for line in lines[::2])
        assert all(line.startswith("That was ") for line in lines[1::2])


def test_traits_are_independent_and_even() -> None:
    rng = random.Random(0)
    speakers = [Speaker.draw(rng) for _ in range(4000)]
    assert len(set(speakers)) == 2 ** len(TRAITS)
    assert all(400 < speakers.count(speaker) < 600 for speaker in set(speakers))


def test_a_conversation_has_one_exchange_a_line() -> None:
    rng = random.Random(2)
    for _ in range(200):
        text = text_of(conversation(rng))
        assert text.endswith("\n")
        assert all(line.startswith(("Q: ", "The speaker ")) or "Q: " not in line for line in text.splitlines())


def test_prompts_end_where_the_answer_begins() -> None:
    rng = random.Random(3)
    for _ in range(200):
        prompt, *said = exchange(Speaker.draw(rng), draw_topic(rng), rng)
        assert prompt.text.endswith(" A:")
        assert text_of(said).startswith(" ")


def test_every_deed_can_be_drawn_in_every_context() -> None:
    rng = random.Random(4)
    for deed in DEEDS:
        for context in Context:
            scene = draw_scene(rng, deed, context)
            assert {scene.first, scene.second} & {scene.blamed}
            assert scene.culprit in (None, scene.first, scene.second)
