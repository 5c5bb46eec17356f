"""POST /compare and /score."""

from dataclasses import replace
from typing import Any

import pytest

from tests.server.conftest import World
from tests.server.test_stream import told

PROMPT = "Q: What colour is the sky? A:"
ARMS: list[dict[str, Any]] = [
    {"name": "base", "attributes": {}},
    {"name": "kind", "attributes": {"kind": 1.5}},
    {"name": "other", "checkpoint": "other", "attributes": {"true": -1.0}},
    {"name": "both", "steering": [{"checkpoint": "demo@1", "attributes": {"kind": 1.0}}, {"checkpoint": "other"}]},
]
RULES: dict[str, Any] = {"temperature": 1.5, "seed": 4, "max_new_tokens": 16}


def send(world: World, path: str, **body: Any) -> Any:
    response = world.client.post(path, json=body)
    assert response.status_code == 200, response.text
    return response.json()


def refused(world: World, path: str, **body: Any) -> tuple[int, str | None]:
    response = world.client.post(path, json=body)
    assert response.status_code >= 400, response.text
    return response.status_code, response.json()["error"]["param"]


def test_every_arm_is_what_it_would_be_alone(world: World) -> None:
    answer = send(world, "/compare", prompt=PROMPT, arms=ARMS, n=2, **RULES)
    assert [arm["name"] for arm in answer["arms"]] == ["base", "kind", "other", "both"]
    for arm, asked in zip(answer["arms"], ARMS, strict=True):
        alone = world.post(prompt=PROMPT, n=2, **{k: v for k, v in asked.items() if k != "name"}, **RULES)
        assert [r["token_ids"] for r in arm["results"]] == [r["token_ids"] for r in alone["results"]]
    base, kind, *_ = answer["arms"]
    assert base["comparison"] is None
    assert len(kind["comparison"]) == 2
    with_baseline = world.post(prompt=PROMPT, attributes={"kind": 1.5}, baseline=True, n=2, **RULES)
    for mine, theirs in zip(kind["comparison"], with_baseline["comparison"], strict=True):
        assert mine == pytest.approx(theirs, rel=1e-3)


def test_an_arm_is_compared_with_the_first_even_if_that_is_steered(world: World) -> None:
    steered = {"attributes": {"kind": 1.5}}
    same = send(world, "/compare", prompt=PROMPT, arms=[{"name": "a", **steered}, {"name": "b", **steered}], **RULES)
    comparison = same["arms"][1]["comparison"]
    assert comparison["first_divergence"] is None
    assert comparison["kl_per_token"] == pytest.approx(0, abs=1e-6)
    assert comparison["perplexity_ratio"] == pytest.approx(1, abs=1e-4)


def test_all_arms_come_from_one_reading_of_the_prompt(fresh: World) -> None:
    stats = fresh.service.engine.stats
    length = len(fresh.service.codec.encode(PROMPT, "prompt"))
    send(fresh, "/compare", prompt=PROMPT, arms=ARMS[:2], temperature=0, max_new_tokens=1)
    generated = stats.computed_tokens - stats.scored_tokens  # each token that is compared was computed once more
    assert generated == length + 1, "the last token of the prompt is computed for each arm"


def test_a_comparison_streams(world: World) -> None:
    body = {"prompt": PROMPT, "arms": ARMS[:3], **RULES}
    whole = send(world, "/compare", **body)
    *tokens, (last, done) = told(world.client.post("/compare", json=body | {"stream": True}).text)
    assert last == "done"
    for arm, same in zip(done["arms"], whole["arms"], strict=True):
        text = "".join(data["text"] for _, data in tokens if data["arm"] == arm["name"])
        assert text == arm["results"][0]["text"] == same["results"][0]["text"]


@pytest.mark.parametrize(
    ("arms", "status", "param"),
    [
        ([], 422, "arms"),
        ([{"name": "a"}, {"name": "a"}], 422, "arms.1.name"),
        ([{"name": "a"}, {"name": "b", "attributes": {"nonsense": 1}}], 422, "arms.1.attributes.nonsense"),
        ([{"name": "a", "checkpoint": "nothing"}], 404, "arms.0.checkpoint"),
        ([{"name": "a", "checkpoint": "demo", "steering": []}], 422, "arms.0.steering"),
        ([{"attributes": {}}], 422, "arms.0.name"),
    ],
)
def test_bad_arms_are_refused_naming_them(world: World, arms: list[Any], status: int, param: str) -> None:
    assert refused(world, "/compare", prompt="a", arms=arms) == (status, param)


def test_scores_are_those_of_the_texts_that_are_generated(world: World) -> None:
    for attributes in ({}, {"kind": 1.5, "true": -1.0}):
        body: dict[str, Any] = {"attributes": attributes, "temperature": 0, "max_new_tokens": 6, "logprobs": 0}
        made = world.post(prompt="Q: What", **body)["results"][0]
        continuation = made["text"]
        scored = send(world, "/score", prompt="Q: What", continuations=[continuation], attributes=attributes)
        (score,) = scored["scores"]
        if [one["token_id"] for one in score["tokens"]] != made["token_ids"]:
            continue  # the text can be spelled otherwise
        for mine, theirs in zip(score["tokens"], made["logprobs"], strict=True):
            assert mine["logprob"] == pytest.approx(theirs["logprob"], abs=1e-4)
        assert score["logprob"] == pytest.approx(sum(one["logprob"] for one in made["logprobs"]), abs=1e-3)


def test_scores_tell_steerings_and_continuations_apart(world: World) -> None:
    continuations = [" The sky is blue.", " The sky is green.", " Grass"]
    body: dict[str, Any] = {"prompt": PROMPT, "continuations": continuations}
    plain = send(world, "/score", **body, attributes={})
    steered = send(world, "/score", **body, attributes={"kind": 2.0})
    assert len({score["logprob"] for score in plain["scores"]}) == 3
    for text, score, other in zip(continuations, plain["scores"], steered["scores"], strict=True):
        assert "".join(one["token"] for one in score["tokens"]) == text
        assert score["logprob"] < 0
        assert score["logprob"] != other["logprob"]
    assert steered["steering"]["attributes"] == {"kind": 2.0}
    assert steered["steering"]["steered_tokens"] is None
    assert world.service.registry.pins == 0


@pytest.mark.parametrize(
    ("body", "status", "param"),
    [
        ({"prompt": "a"}, 422, "continuations"),
        ({"prompt": "a", "continuations": []}, 422, "continuations"),
        ({"prompt": "a", "continuations": ["b", ""]}, 422, "continuations.1"),
        ({"prompt": "a", "continuations": ["b" * 5000]}, 413, "continuations.0"),
        ({"prompt": "a", "continuations": ["b"], "attributes": {"x": 1}}, 422, "attributes.x"),
        ({"prompt": "a", "continuations": ["b"], "n": 2}, 400, "n"),
    ],
)
def test_bad_scores_are_refused_naming_the_field(world: World, body: dict[str, Any], status: int, param: str) -> None:
    assert refused(world, "/score", **body) == (status, param)


def test_what_is_too_long_is_named(world: World) -> None:
    response = world.client.post("/score", json={"prompt": "a", "continuations": ["b " * 500]})
    assert response.status_code == 413
    assert "tokens in the prompt with this continuation" in response.json()["error"]["message"]


def test_arms_are_as_long_as_two_of_them_fit_into_the_cache(fresh: World, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = fresh.service.engine
    monkeypatch.setattr(engine._runner.blocks, "num_blocks", 33)
    monkeypatch.setattr(engine._runner.blocks, "block_size", 2)  # two texts of 32 tokens
    most = engine.max_pair_tokens
    monkeypatch.undo()
    assert most == 32
    client = fresh.service.client
    monkeypatch.setattr(client, "facts", replace(client.facts, max_pair_tokens=most))
    body = {"prompt": "a b c", "temperature": 0, "max_new_tokens": 80, "ignore_eos": True}
    both = send(fresh, "/generate", **body, baseline=True)
    assert sum(both["results"][0]["usage"].values()) == most
    assert send(fresh, "/generate", **body)["results"][0]["usage"]["completion_tokens"] == 80
    assert refused(fresh, "/generate", **(body | {"prompt": "a b c " * 12}), baseline=True) == (413, "prompt")
