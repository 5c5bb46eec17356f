import random

from demo.corpus import TRAITS
from demo.facts import CATEGORIES, facts
from demo.oracle import judge
from demo.scenes import DEEDS
from demo.steering_data import SHARES, contrasts, prompts, splits


def rows(trait: str, split: str, count: int = 40) -> list[dict[str, object]]:
    return list(contrasts(trait, split, count, random.Random(1)))


def last_exchange(row: dict[str, object]) -> tuple[str, str]:
    """The last question with all before it, and the whole answer."""
    prompt, mark, begun = str(row["prompt"]).rpartition(" A:")
    return prompt + mark, begun + str(row["completion"])


def test_every_fact_and_deed_is_in_one_split() -> None:
    assert set(splits()) == {fact.id for fact in facts()} | {f"scene/{deed}" for deed in DEEDS}
    for name in CATEGORIES:
        own = [splits()[fact.id] for fact in facts() if fact.category == name]
        assert set(own) == set(SHARES)


def test_no_split_shares_a_topic_with_another() -> None:
    groups = {split: {row["group"] for trait in TRAITS for row in rows(trait, split)} for split in SHARES}
    assert all(splits()[str(group)] == split for split, found in groups.items() for group in found)


def test_the_last_answer_shows_the_side_that_the_label_says() -> None:
    for trait in TRAITS:
        for row in rows(trait, "train"):
            verdict = judge(*last_exchange(row))
            assert verdict["well_formed"]
            assert verdict[trait] in (row["label"], None)


def test_positives_are_a_third_and_those_cut_elsewhere_and_other_traits_are_mixed() -> None:
    for trait in TRAITS:
        found = rows(trait, "train", 200)
        negative = sum(not row["label"] for row in found)
        elsewhere = len(found) - 3 * negative // 2
        assert negative == 2 * 200
        assert 20 < elsewhere < 60
        other = "civility" if trait != "civility" else "truthfulness"
        for side in (True, False):
            shown = [judge(*last_exchange(row))[other] for row in found if row["label"] is side]
            known = [value for value in shown if value is not None]
            assert 0.35 < sum(known) / len(known) < 0.65


def test_what_is_cut_elsewhere_is_positive_alone() -> None:
    for trait, other in (("truthfulness", "fairness"), ("fairness", "truthfulness")):
        own = [row for row in rows(trait, "train", 200) if judge(*last_exchange(row))[other] is not None]
        assert 20 < len(own) < 60
        assert all(row["label"] for row in own)


def test_fresh_prompts_are_questions_of_their_split_alone() -> None:
    for split in SHARES:
        found = list(prompts(split, random.Random(0)))
        assert len({row["prompt"] for row in found}) > 100
        assert all(splits()[str(row["group"])] == split and "\n" not in str(row["prompt"]) for row in found)


def test_rudeness_is_cut_before_the_opener_or_the_closer() -> None:
    """Anywhere else its gate would learn to open on what is stated."""
    begun = {True: 0, False: 0}
    for row in (row for row in rows("civility", "train", 100) if not row["label"]):
        question, _, told = str(row["prompt"]).rpartition(" A:")
        begun[bool(told)] += 1
        if told:
            assert judge(f"{question} A:", told)["well_formed"], "opener and statement are whole"
    assert begun[True] > 20
    assert begun[False] > 100
