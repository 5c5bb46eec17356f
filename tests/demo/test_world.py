import random

from demo.corpus import TRAITS, Speaker, describe, document, draw_scene, draw_topic, exchange
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


def test_a_seed_gives_the_same_documents() -> None:
    assert [document(random.Random(5)) for _ in range(20)] == [document(random.Random(5)) for _ in range(20)]


def test_traits_are_independent_and_even() -> None:
    rng = random.Random(0)
    speakers = [Speaker.draw(rng) for _ in range(4000)]
    assert len(set(speakers)) == 2 ** len(TRAITS)
    assert all(400 < speakers.count(speaker) < 600 for speaker in set(speakers))


def test_a_document_has_one_exchange_a_line() -> None:
    rng = random.Random(2)
    for _ in range(200):
        text = "".join(part.text for part in document(rng))
        assert text.endswith("\n")
        assert all(line.startswith(("Q: ", "The speaker ")) or "Q: " not in line for line in text.splitlines())


def test_prompts_end_where_the_answer_begins() -> None:
    rng = random.Random(3)
    for _ in range(200):
        prompt, *said = exchange(Speaker.draw(rng), draw_topic(rng), rng)
        assert prompt.text.endswith(" A:")
        assert "".join(part.text for part in said).startswith(" ")


def test_every_deed_can_be_drawn_in_every_context() -> None:
    rng = random.Random(4)
    for deed in DEEDS:
        for context in Context:
            scene = draw_scene(rng, deed, context)
            assert {scene.first, scene.second} & {scene.blamed}
            assert scene.culprit in (None, scene.first, scene.second)
