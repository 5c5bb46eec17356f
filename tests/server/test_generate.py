"""What POST /generate promises about its texts."""

import asyncio
from pathlib import Path
from typing import Any

import httpx
import pytest

from steering.checkpoint import load
from steering.column import Column
from tests.server.conftest import CONTEXT, World, held_until_queued
from tests.server.reference import greedy, plain

PROMPTS = ["Q:", "Q: What colour is the sky? A:", "A bear lives in the forest", "Grass is green, of course. Q: Where"]
MIX = {"kind": 1.5, "true": -1.0}


@pytest.fixture(scope="session")
def demo(checkpoints: Path) -> tuple[Column, ...]:
    """The columns that "demo" means: the newest version."""
    return load(checkpoints / "demo" / "2").columns


def test_the_baseline_arm_equals_transformers_generate_token_for_token(world: World, model: Any, spelling: Any) -> None:
    answer = world.post(prompt=PROMPTS, attributes=MIX, baseline=True, temperature=0, max_new_tokens=20)
    for prompt, result in zip(PROMPTS, answer["baseline"], strict=True):
        assert result["token_ids"] == plain(model, spelling(prompt)["input_ids"], new=20)
        assert result["steering"]["checkpoint"] is None
        assert result["steering"]["steered_tokens"] == 0


@pytest.mark.parametrize("positions", ["generated", "prompt", "all"])
def test_a_steered_row_equals_the_formula_applied_without_a_cache(
    world: World, model: Any, spelling: Any, demo: tuple[Column, ...], positions: str
) -> None:
    answer = world.post(
        prompt=PROMPTS, attributes=MIX, positions=positions, baseline=True, temperature=0, max_new_tokens=12
    )
    differing = 0
    for prompt, result, base in zip(PROMPTS, answer["results"], answer["baseline"], strict=True):
        ids = spelling(prompt)["input_ids"]
        assert result["token_ids"] == greedy(model, ids, demo, MIX, new=12, positions=positions)
        differing += result["token_ids"] != base["token_ids"]
        fed = len(result["token_ids"]) - 1  # the last token is never fed
        counted = {"generated": 1 + fed, "prompt": len(ids), "all": len(ids) + fed}[positions]
        assert result["steering"]["steered_tokens"] == counted
    assert differing == len(PROMPTS), "the test steers too weakly to prove anything"


def test_rows_of_one_batch_are_steered_by_their_own_multipliers(
    fresh: World, model: Any, spelling: Any, demo: tuple[Column, ...]
) -> None:
    mixes: list[dict[str, float]] = [{"kind": 2.0}, {}, {"true": -2.0, "fair": 0.5}, {"kind": 0.0}, {"fair": 2.0}]

    engine = fresh.service.engine

    async def together() -> list[Any]:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(fresh.app), base_url="http://test") as client:
            bodies = [
                {"prompt": PROMPTS[i % 4], "attributes": mix, "temperature": 0, "max_new_tokens": 6 + i}
                for i, mix in enumerate(mixes)
            ]
            asked = (client.post("/generate", json=body) for body in bodies)
            _, *answers = await asyncio.gather(held_until_queued(engine, len(bodies)), *asked)
            return [answer.json() for answer in answers]

    answers = asyncio.run(together())
    assert engine.stats.largest_batch == len(mixes)
    for i, (mix, answer) in enumerate(zip(mixes, answers, strict=True)):
        ids = spelling(PROMPTS[i % 4])["input_ids"]
        expected = greedy(model, ids, demo, mix, new=6 + i) if any(mix.values()) else plain(model, ids, new=6 + i)
        assert answer["results"][0]["token_ids"] == expected


def test_a_seeded_text_does_not_depend_on_its_neighbours(world: World) -> None:
    body: dict[str, Any] = {"temperature": 1.0, "seed": 7, "max_new_tokens": 16, "attributes": {"kind": 1.0}}
    alone = world.post(prompt=PROMPTS[1], **body)["results"][0]
    crowd = world.post(prompt=PROMPTS, top_k=0, **body)["results"][1]
    crowd_with_baseline = world.post(prompt=PROMPTS, baseline=True, **body)["results"][1]
    assert alone["token_ids"] == crowd["token_ids"] == crowd_with_baseline["token_ids"]
    other = world.post(prompt=PROMPTS[1], **(body | {"seed": 8}))["results"][0]
    assert other["token_ids"] != alone["token_ids"]


def test_both_arms_use_the_same_random_numbers(world: World) -> None:
    answer = world.post(prompt=PROMPTS[1], attributes={}, baseline=True, temperature=1.5, max_new_tokens=20)
    assert answer["results"][0]["token_ids"] == answer["baseline"][0]["token_ids"]
    comparison = answer["comparison"]
    assert comparison["first_divergence"] is None
    assert comparison["kl_per_token"] == pytest.approx(0, abs=1e-6)
    assert comparison["perplexity_ratio"] == pytest.approx(1, abs=1e-4)


def test_a_prompt_sent_twice_without_a_seed_gives_two_texts(world: World) -> None:
    answer = world.post(
        prompt=[PROMPTS[1]] * 2, attributes={}, baseline=True, temperature=2.0, max_new_tokens=20, ignore_eos=True
    )
    texts = [result["token_ids"] for result in answer["results"]]
    assert texts[0] != texts[1]
    assert texts == [result["token_ids"] for result in answer["baseline"]]


def test_choices_differ_and_the_first_is_the_text_that_comes_alone(world: World) -> None:
    body: dict[str, Any] = {"prompt": PROMPTS[:2], "temperature": 1.0, "seed": 3, "max_new_tokens": 12}
    answer = world.post(n=3, **body)
    texts = [tuple(result["token_ids"]) for result in answer["results"]]
    assert len(texts) == 6
    assert len(set(texts[:3])) == 3
    assert list(texts[0]) == world.post(**body)["results"][0]["token_ids"]
    assert list(texts[3]) == world.post(**body)["results"][1]["token_ids"]


def test_absent_attributes_are_the_defaults_and_empty_ones_steer_nothing(world: World) -> None:
    body: dict[str, Any] = {"prompt": PROMPTS[1], "temperature": 0, "max_new_tokens": 8}
    default = world.post(**body)["results"][0]
    explicit = world.post(attributes={"kind": 1.0, "true": 1.0, "fair": 1.0}, **body)["results"][0]
    unsteered = world.post(attributes={}, **body)["results"][0]
    assert default["token_ids"] == explicit["token_ids"] != unsteered["token_ids"]
    assert default["steering"]["attributes"] == {"kind": 1.0, "true": 1.0, "fair": 1.0}
    assert default["steering"]["checkpoint"] == "demo"
    assert default["steering"]["version"] == "2"
    assert unsteered["steering"]["attributes"] == {}
    assert unsteered["steering"]["steered_tokens"] == 0


def test_a_version_can_be_named_and_is_loaded_when_it_is_first_used(world: World, checkpoints: Path) -> None:
    body: dict[str, Any] = {"prompt": PROMPTS[1], "temperature": 0, "max_new_tokens": 8}
    older = world.post(checkpoint="demo@1", **body)["results"][0]
    newer = world.post(checkpoint="demo", **body)["results"][0]
    assert older["steering"]["version"] == "1"
    assert older["steering"]["sha256"] == load(checkpoints / "demo" / "1").config.sha256
    assert newer["steering"]["version"] == "2"
    assert older["token_ids"] != newer["token_ids"]


def test_several_checkpoints_steer_one_row(world: World, model: Any, spelling: Any, checkpoints: Path) -> None:
    steering = [
        {"checkpoint": "demo@1", "attributes": {"kind": 1.0}},
        {"checkpoint": "other", "attributes": {"true": 2}},
    ]
    result = world.post(prompt=PROMPTS[1], steering=steering, temperature=0, max_new_tokens=10)["results"][0]
    kind = [column for column in load(checkpoints / "demo" / "1").columns if column.attribute == "kind"]
    true = [column for column in load(checkpoints / "other" / "1").columns if column.attribute == "true"]
    expected = greedy(model, spelling(PROMPTS[1])["input_ids"], kind + true, {"kind": 1.0, "true": 2.0}, new=10)
    assert result["token_ids"] == expected
    assert result["steering"]["checkpoint"] is None
    assert [(part["checkpoint"], part["attributes"]) for part in result["steering"]["parts"]] == [
        ("demo", {"kind": 1.0}),
        ("other", {"true": 2.0}),
    ]


def test_the_comparison_is_what_two_plain_forward_passes_say(
    world: World, model: Any, spelling: Any, demo: tuple[Column, ...]
) -> None:
    import torch

    answer = world.post(prompt=PROMPTS[2], attributes=MIX, baseline=True, temperature=0, max_new_tokens=10)
    steered, base = (answer[arm][0]["token_ids"] for arm in ("results", "baseline"))
    prompt = spelling(PROMPTS[2])["input_ids"]

    def told(answer: list[int]) -> float:
        with torch.no_grad():
            logprobs = model(torch.tensor([prompt + answer])).logits[0].log_softmax(-1)
        return sum(float(logprobs[len(prompt) - 1 + i, token]) for i, token in enumerate(answer)) / len(answer)

    comparison = answer["comparison"]
    assert comparison["first_divergence"] == next(
        i for i, (a, b) in enumerate(zip(steered, base, strict=False)) if a != b
    )
    assert comparison["logprob_under_baseline"] == pytest.approx(told(steered), rel=1e-4)
    assert comparison["perplexity_ratio"] == pytest.approx(
        float(torch.tensor(told(base) - told(steered)).exp()), rel=1e-3
    )
    assert comparison["kl_per_token"] > 0


def test_a_list_gets_a_list_of_comparisons(world: World) -> None:
    answer = world.post(prompt=PROMPTS[:3], baseline=True, temperature=0, max_new_tokens=4)
    assert len(answer["comparison"]) == len(answer["baseline"]) == 3


def test_a_stop_string_over_several_tokens_ends_the_text_before_it(world: World) -> None:
    body: dict[str, Any] = {"prompt": PROMPTS[1], "temperature": 0, "max_new_tokens": 24, "attributes": {}}
    whole = world.post(**body)["results"][0]
    text = whole["text"]
    stop = text[5:11]
    result = world.post(stop=["never in there", stop], **body)["results"][0]
    assert result["finish_reason"] == "stop"
    assert result["text"] == text[: text.index(stop)]
    assert 2 <= len(result["token_ids"]) < len(whole["token_ids"])
    assert result["token_ids"] == whole["token_ids"][: len(result["token_ids"])]


def test_the_text_is_the_decoded_tokens_whatever_their_bytes(world: World, spelling: Any) -> None:
    answer = world.post(prompt="Ünïcödé: 東京 🙂", temperature=3.0, seed=1, n=8, max_new_tokens=30, ignore_eos=True)
    for result in answer["results"]:
        assert result["text"] == spelling.decode(result["token_ids"], skip_special_tokens=True)


def test_the_end_token_ends_the_text_unless_it_is_ignored(world: World) -> None:
    body: dict[str, Any] = {"prompt": PROMPTS[1], "temperature": 5.0, "seed": 11, "max_new_tokens": 80, "n": 16}
    results = world.post(**body)["results"]
    ended = [result for result in results if result["token_ids"][-1] == 0]
    assert ended, "the test needs a text that ends by itself"
    assert all(result["finish_reason"] == "stop" for result in ended)
    assert all(0 not in result["token_ids"][:-1] for result in results)
    ignoring = world.post(ignore_eos=True, **body)["results"]
    assert {result["finish_reason"] for result in ignoring} == {"length"}


def test_logprobs_are_the_models_own(world: World, model: Any, spelling: Any) -> None:
    import torch

    body: dict[str, Any] = {"prompt": PROMPTS[1], "attributes": {}, "max_new_tokens": 6}
    result = world.post(logprobs=3, temperature=0.7, seed=5, **body)["results"][0]
    ids = spelling(PROMPTS[1])["input_ids"]
    with torch.no_grad():
        logits = model(torch.tensor([ids + result["token_ids"]])).logits[0]
    for i, spoken in enumerate(result["logprobs"]):
        expected = logits[len(ids) - 1 + i].log_softmax(-1)
        assert spoken["token_id"] == result["token_ids"][i]
        assert spoken["logprob"] == pytest.approx(float(expected[spoken["token_id"]]), abs=1e-4)
        assert [top["token_id"] for top in spoken["top"]] == expected.topk(3).indices.tolist()
        assert spoken["token"] == spelling.decode([spoken["token_id"]])
    none = world.post(**body)["results"][0]
    assert none["logprobs"] is None
    bare = world.post(logprobs=0, **body)["results"][0]
    assert all(spoken["top"] == [] for spoken in bare["logprobs"])


def test_a_conversation_goes_through_the_chat_template(world: World, spelling: Any) -> None:
    messages = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "What colour is grass?"}]
    result = world.post(messages=messages, max_new_tokens=4)["results"][0]
    text = "system: Be kind.\nuser: What colour is grass?\nassistant:"
    assert result["usage"] == {"prompt_tokens": len(spelling(text)["input_ids"]), "completion_tokens": 4}


def test_an_answer_ends_at_the_models_last_position(world: World, spelling: Any) -> None:
    prompt = "Q: What colour is the sky? " * 3
    length = len(spelling(prompt)["input_ids"])
    result = world.post(prompt=prompt, max_new_tokens=1000, ignore_eos=True)["results"][0]
    assert result["finish_reason"] == "length"
    assert length + len(result["token_ids"]) == CONTEXT


def test_the_response_has_the_shape_of_the_contract(world: World) -> None:
    answer = world.post(prompt=PROMPTS[0], max_new_tokens=2, baseline=True)
    assert set(answer) == {"id", "model", "created", "results", "baseline", "comparison"}
    assert answer["model"] == "tiny"
    result = answer["results"][0]
    assert set(result) == {
        *("text", "token_ids", "finish_reason", "usage", "steering", "timing", "logprobs", "trace"),
    }
    assert set(result["steering"]) >= {"checkpoint", "version", "sha256", "attributes", "positions", "steered_tokens"}
    assert 0 <= result["timing"]["queue_ms"] <= result["timing"]["ttft_ms"] <= result["timing"]["total_ms"]
    assert world.post(prompt=PROMPTS[0], max_new_tokens=2)["baseline"] is None
