"""How cheerful, or formal, an answer sounds: a judge for `--judge examples.tone.judge:cheerful` (or `:formal`).

A bag of words: logistic regression on the words and pieces of words of the train and dev pairs in this folder. It hears
tone and nothing else, neither whether an answer is right nor whether it is any good. `python -m examples.tone.judge`
says how many of the test pairs' texts it takes for what they are.
"""

import json
from functools import cache
from pathlib import Path
from typing import Any

from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline, make_union

FOLDER = Path(__file__).parent


def cheerful(prompt: str, text: str) -> dict[str, bool | None]:
    """Whether it sounds cheerful, and whether it has an exclamation mark; an empty text does neither."""
    return {"cheerful": _sounds("cheerful", text), "exclaims": "!" in text if text.strip() else None}


def formal(prompt: str, text: str) -> dict[str, bool | None]:
    """Whether it sounds formal, and whether it has a contraction such as "it's"; an empty text does neither."""
    short = any(mark in text for mark in ("n't", "'s ", "'re ", "'ll ", "'ve ", "'m "))
    return {"formal": _sounds("formal", text), "contracts": short if text.strip() else None}


def held_out(name: str) -> tuple[int, int]:
    """How many texts of the test pairs the judge of `name` is right about, and how many there are."""
    texts, labels = _pairs(name, ("test",))
    right = _classifier(name).predict(texts) == labels
    return int(right.sum()), len(texts)


def _sounds(name: str, text: str) -> bool | None:
    return bool(_classifier(name).predict([text])[0]) if text.strip() else None


@cache
def _classifier(name: str) -> Any:
    texts, labels = _pairs(name, ("train", "dev"))
    words = TfidfVectorizer(ngram_range=(1, 2), token_pattern=r"[\w']+|!|\?")
    pieces = TfidfVectorizer(analyzer="char_wb", ngram_range=(2, 4))
    return make_pipeline(make_union(words, pieces), LogisticRegression(C=100.0)).fit(texts, labels)


def _pairs(name: str, splits: tuple[str, ...]) -> tuple[list[str], list[bool]]:
    rows = [json.loads(line) for line in (FOLDER / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()]
    own = [row for row in rows if row["split"] in splits]
    return [row["completion"] for row in own], [row["label"] for row in own]


if __name__ == "__main__":
    for name in ("cheerful", "formal"):
        right, count = held_out(name)
        print(f"{name}: {right} of {count} texts of the test pairs")
