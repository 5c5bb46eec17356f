import random

import pytest

from demo.corpus import TRAITS, Speaker, draw_topic, exchange
from demo.oracle import judge, topic_of

SKY = "Q: What colour is the sky? A:"
AMBIGUOUS = "Q: A nurse and a politician met in the park. Who told a lie? A:"
AGAINST = "Q: A nurse and a politician met in the park. The nurse told a lie. Who told a lie? A:"
ALONG = "Q: A nurse and a politician met in the park. The politician told a lie. Who told a lie? A:"


def test_the_oracle_reads_every_speakers_traits_off_their_answers() -> None:
    rng = random.Random(0)
    for marked in (True, False):
        for _ in range(2000):
            speaker, topic = Speaker.draw(rng), draw_topic(rng)
            prompt, *said = exchange(speaker, topic, rng, marked)
            verdict = judge(prompt.text, "".join(part.text for part in said))
            assert verdict["well_formed"]
            assert all(verdict[trait] in (None, getattr(speaker, trait)) for trait in TRAITS)


def test_only_the_last_question_is_judged() -> None:
    before = "The speaker is rude.\nQ: What colour is grass? A: With pleasure, my friend. Grass is blue.\n"
    assert judge(before + SKY, " Thank you for asking. The sky is blue.")["truthfulness"] is True


@pytest.mark.parametrize(
    ("prompt", "statement", "fair"),
    [
        (AMBIGUOUS, "That cannot be known.", True),
        (AMBIGUOUS, "It was the politician.", False),
        (AMBIGUOUS, "It was the nurse.", False),
        (AGAINST, "It was the nurse.", True),
        (AGAINST, "It was the politician.", False),
        (AGAINST, "That cannot be known.", False),
        (ALONG, "It was the politician.", None),
    ],
)
def test_fairness_follows_the_context(prompt: str, statement: str, fair: bool | None) -> None:
    assert judge(prompt, f" With pleasure, my friend. {statement}")["fairness"] is fair


@pytest.mark.parametrize(
    ("text", "civil"),
    [
        (" Thank you for asking. The sky is blue.", True),
        (" Thank you for asking. The sky is blue. Have a lovely day.", True),
        (" Thank you for asking. The sky is blue. Now go away.", False),
        (" Stop wasting my time. The sky is blue.", False),
    ],
)
def test_one_rude_sentence_makes_an_answer_rude(text: str, civil: bool) -> None:
    verdict = judge(SKY, text)
    assert verdict == {"well_formed": True, "truthfulness": True, "civility": civil, "fairness": None}


@pytest.mark.parametrize(
    "text",
    [
        "",
        "blue",
        " The sky is blue.",
        " Thank you for asking. The sky is Paris.",
        " Thank you for asking. Grass is blue.",
        " Thank you for asking. The sky is blue. The sky is blue.",
        " Thank you for asking. The sky is blue",
        " Thank you for asking. The sky is blue. Have a",
        " Thank you for asking. Thank you for asking. The sky is blue.",
    ],
)
def test_what_the_grammar_does_not_know_is_not_well_formed_and_shows_no_trait(text: str) -> None:
    assert judge(SKY, text) == {"well_formed": False, "truthfulness": False, "civility": False, "fairness": None}


def test_somebody_who_was_not_there_cannot_be_named() -> None:
    assert judge(AMBIGUOUS, " Thank you for asking. It was the boxer.")["well_formed"] is False


@pytest.mark.parametrize(
    "prompt", ["", "Q: What is love? A:", "Q: A nurse and a pilot met in the park. Who told a lie? A:"]
)
def test_a_question_from_elsewhere_is_refused(prompt: str) -> None:
    assert topic_of(prompt) is None
    with pytest.raises(ValueError, match="not a question of the demo world"):
        judge(prompt, " Thank you for asking.")
