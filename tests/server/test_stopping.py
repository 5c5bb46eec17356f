"""Where a text ends, and which rules its tokens are drawn by: asked over HTTP, streamed and whole."""

from typing import Any

import openai
import pytest
import torch
from transformers import LogitsProcessorList, MinNewTokensLengthLogitsProcessor, SequenceBiasLogitsProcessor

from tests.server.conftest import END, World
from tests.server.test_events import events, row
from tests.server.test_openai import client  # noqa: F401
from tests.server.test_stream import told

PROMPT = "Q: What colour"
# The token <|end|> (0) is the model's own end, and a special one; here it comes often and ends nothing.
OFTEN: dict[str, Any] = {"prompt": PROMPT, "ignore_eos": True, "logit_bias": {"0": 8.0}, "temperature": 1.5}
OFTEN |= {"max_new_tokens": 30, "attributes": {}}


def streamed(world: World, **body: Any) -> tuple[str, dict[str, Any]]:
    """The pieces of a stream's text, put together, and its result."""
    response = world.client.post("/generate", json=body | {"stream": True})
    *tokens, (last, done) = told(response.text)
    assert last == "done", done
    return "".join(data["text"] for _, data in tokens), done["results"][0]


@pytest.mark.parametrize("seed", range(4))
def test_a_special_token_as_a_stop_string_ends_the_text(world: World, spelling: Any, seed: int) -> None:
    whole = world.post(**OFTEN, seed=seed)["results"][0]["token_ids"]
    assert 0 in whole, "the test needs the special token"
    first = whole.index(0)
    result = world.post(**OFTEN, seed=seed, stop=[END])["results"][0]
    assert (result["finish_reason"], result["token_ids"]) == ("stop", whole[: first + 1])
    assert result["text"] == spelling.decode(whole[:first])
    pieces, done = streamed(world, **OFTEN, seed=seed, stop=[END])
    assert pieces == done["text"] == result["text"]


@pytest.mark.parametrize("skip", [True, False])
@pytest.mark.parametrize("include", [True, False])
@pytest.mark.parametrize("kind", ["is", "begins", "ends", "contains", "part"])
def test_a_stop_string_with_a_special_token_ends_the_text(
    world: World, spelling: Any, kind: str, include: bool, skip: bool
) -> None:
    body = OFTEN | {"seed": 3, "skip_special_tokens": skip}
    whole = world.post(**body)["results"][0]["token_ids"]
    at = next(i for i in range(2, 28) if whole[i] == 0 and 0 not in (whole[i - 1], whole[i + 1]))
    before, after = spelling.decode([whole[at - 1]]), spelling.decode([whole[at + 1]])
    stop = {
        "is": END,
        "begins": END + after,
        "ends": before + END,
        "contains": before[-1:] + END + after[:1],
        "part": "|end|",
    }[kind]
    text = spelling.decode(whole)
    shown = text[: text.index(stop)]  # which may be earlier than `at`
    if skip:
        shown = shown.replace(END, "").removesuffix("<" if kind == "part" else "")
    result = world.post(**body, stop=stop, include_stop_str_in_output=include)["results"][0]
    assert result["finish_reason"] == "stop"
    assert result["text"] == shown + (stop if include else "")
    pieces, done = streamed(world, **body, stop=stop, include_stop_str_in_output=include)
    assert pieces == done["text"] == result["text"]


def test_special_tokens_are_shown_where_they_are_asked_for(world: World, spelling: Any) -> None:
    result = world.post(**OFTEN, seed=1, skip_special_tokens=False)["results"][0]
    assert result["text"] == spelling.decode(result["token_ids"])
    assert END in result["text"]
    assert streamed(world, **OFTEN, seed=1, skip_special_tokens=False)[0] == result["text"]
    assert world.post(**OFTEN, seed=1)["results"][0]["text"] == result["text"].replace(END, "")


@pytest.mark.parametrize(
    ("more", "shown"),
    [
        ({}, False),
        ({"skip_special_tokens": False}, False),
        ({"include_stop_str_in_output": True}, False),
        ({"include_stop_str_in_output": True, "skip_special_tokens": False}, True),
        ({"include_stop_str_in_output": True, "stop": END}, True),
    ],
)
def test_the_end_of_text_token_is_shown_as_in_vllm(world: World, more: dict[str, Any], shown: bool) -> None:
    body = OFTEN | {"ignore_eos": False, "seed": 2} | more
    pieces, result = streamed(world, **body)
    assert result["token_ids"][-1] == 0
    assert result["text"].endswith(END) is shown
    assert pieces == result["text"] == world.post(**body)["results"][0]["text"]


def test_stop_ids_end_a_text_whose_own_end_is_ignored(world: World, spelling: Any) -> None:
    whole = world.post(**OFTEN, seed=4)["results"][0]["token_ids"]
    end = next(token for token in whole[3:] if token)
    cut = world.post(**OFTEN, seed=4, stop_token_ids=[end])["results"][0]
    first = whole.index(end)
    assert (cut["finish_reason"], cut["token_ids"]) == ("stop", whole[: first + 1])
    assert cut["text"] == spelling.decode(whole[:first], skip_special_tokens=True)
    shown = world.post(**OFTEN, seed=4, stop_token_ids=[end], include_stop_str_in_output=True)["results"][0]
    assert shown["text"] == spelling.decode(whole[: first + 1], skip_special_tokens=True)


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"stop_token_ids": [5, 99999]}, "stop_token_ids.1"),
        ({"stop_token_ids": [-1]}, "stop_token_ids.0"),
        ({"stop_token_ids": ["a"]}, "stop_token_ids.0"),
        ({"logit_bias": {"99999": 1}}, "logit_bias.99999"),
        ({"logit_bias": {"5": 101}}, "logit_bias.5"),
        ({"logit_bias": {"5": None}}, "logit_bias.5"),
        ({"logit_bias": {"blue": 1}}, "logit_bias.blue"),
        ({"logit_bias": {"05": 1}}, "logit_bias.05"),
        ({"logit_bias": {str(i): 1 for i in range(1025)}}, "logit_bias"),
        ({"logit_bias": [[5, 1]]}, "logit_bias"),
        ({"presence_penalty": 2.1}, "presence_penalty"),
        ({"frequency_penalty": -2.1}, "frequency_penalty"),
        ({"min_tokens": -1}, "min_tokens"),
        ({"min_tokens": 129}, "min_tokens"),
        ({"skip_special_tokens": "no"}, "skip_special_tokens"),
    ],
)
def test_what_cannot_be_is_refused_by_name(world: World, body: dict[str, Any], param: str) -> None:
    status, error = world.refused(prompt="a", **body)
    assert (status, error["param"]) == (422, param)


def test_min_tokens_come_before_any_end(world: World) -> None:
    body: dict[str, Any] = {"prompt": PROMPT, "logit_bias": {"0": 100}, "max_new_tokens": 20, "seed": 1}
    assert world.post(**body)["results"][0]["token_ids"] == [0]
    result = world.post(**body, min_tokens=7)["results"][0]
    assert len(result["token_ids"]) == 8
    assert [token for token in result["token_ids"] if not token] == [0]
    stopped = world.post(**body, min_tokens=7, stop_token_ids=[*range(1, 200)])["results"][0]["token_ids"]
    assert all(token >= 200 for token in stopped[:7])
    assert len(stopped) == 8
    text = result["text"]
    longer = world.post(**body, min_tokens=7, stop=[text[0]])["results"][0]
    assert len(longer["token_ids"]) >= 7
    assert longer["text"].startswith(text[0])


def test_a_greedy_text_with_penalties_and_biases_is_that_of_plain_formulas(
    world: World, model: Any, spelling: Any
) -> None:
    rules: dict[str, Any] = {"presence_penalty": 0.7, "frequency_penalty": 0.4, "repetition_penalty": 1.2}
    bias, least, new = {40: 2.5, 0: 30.0}, 9, 24
    ids = list(spelling(PROMPT)["input_ids"])
    start = len(ids)
    chain = LogitsProcessorList(
        [
            MinNewTokensLengthLogitsProcessor(start, least, [0], device="cpu"),
            SequenceBiasLogitsProcessor({(token,): value for token, value in bias.items()}),
        ]
    )
    while len(ids) < start + new and (len(ids) == start or ids[-1]):
        with torch.inference_mode():
            logits = model(torch.tensor([ids])).logits[:, -1].float()
        scores = chain(torch.tensor([ids]), logits)[0]
        for token in set(ids):
            scores[token] *= rules["repetition_penalty"] ** (-1 if scores[token] > 0 else 1)
        for token in set(ids[start:]):
            scores[token] -= rules["presence_penalty"] + ids[start:].count(token) * rules["frequency_penalty"]
        ids.append(int(scores.argmax()))
    body = {"prompt": PROMPT, "temperature": 0, "attributes": {}, "max_new_tokens": new, "min_tokens": least}
    body |= {"logit_bias": {str(token): value for token, value in bias.items()}}
    result = world.post(**body, **rules)["results"][0]
    assert result["token_ids"] == ids[start:]
    assert len(result["token_ids"]) == least + 1


@pytest.mark.usefixtures("overlaps")
def test_a_text_is_the_same_beside_any_neighbours_and_where_steps_are_begun_ahead(world: World) -> None:
    rules: list[dict[str, Any]] = [
        {},
        {"presence_penalty": 1.5},
        {"frequency_penalty": -1.0},
        {"logit_bias": ((0, 9.0), (50, 3.0)), "min_tokens": 12, "ignore_eos": False},
        {"min_tokens": 20, "stop_token_ids": (40, 41, 42), "logit_bias": ((41, 20.0),)},
        {"repetition_penalty": 1.3, "presence_penalty": 0.4, "stop": ("<|end|>",)},
    ]
    alone = [events(world, [row(world, seed=9, **rule)])[-1] for rule in rules]
    together = [row(world, index, seed=9, **rule) for index, rule in enumerate(rules)]
    ended = {event.sequence: event for event in events(world, together) if hasattr(event, "token_ids")}
    for one, each in zip(alone, together, strict=True):
        assert ended[each].token_ids == one.token_ids  # type: ignore[union-attr]
    lengths = [len(ended[each].token_ids) for each in together]
    assert lengths[3] >= 13
    assert lengths[4] == 21


def test_openais_routes_take_them_too(world: World, client: openai.OpenAI, spelling: Any) -> None:  # noqa: F811
    extra = {"ignore_eos": True, "skip_special_tokens": False, "min_tokens": 2, "stop_token_ids": [299]}
    body: Any = {"model": "tiny", "max_tokens": 30, "temperature": 1.5, "seed": 3, "logit_bias": {"0": 8}}
    body |= {"presence_penalty": 0.5, "frequency_penalty": 0.2}
    native = world.post(**OFTEN | extra | {"presence_penalty": 0.5, "frequency_penalty": 0.2, "seed": 3})["results"][0]
    answer = client.completions.create(prompt=PROMPT, **body, logprobs=0, extra_body=extra).choices[0]
    assert answer.text == native["text"]
    assert END in answer.text
    assert answer.logprobs is not None
    for token, begin in zip(answer.logprobs.tokens or [], answer.logprobs.text_offset or [], strict=True):
        assert token.startswith("bytes:") or answer.text.startswith(token, begin) or begin == len(answer.text)
    for include in (False, True):
        more = extra | {"include_stop_str_in_output": include}
        whole = client.completions.create(prompt=PROMPT, **body, stop=[END], extra_body=more).choices[0]
        pieces = client.completions.create(prompt=PROMPT, **body, stop=[END], extra_body=more, stream=True)
        begin = native["text"].index(END)
        assert whole.text == native["text"][:begin] + END * include
        assert "".join(choice.text for piece in pieces for choice in piece.choices) == whole.text
    messages: Any = [{"role": "user", "content": "What colour?"}]
    chat = client.chat.completions.create(messages=messages, **body, stop=END, extra_body=extra)
    chunks = list(client.chat.completions.create(messages=messages, **body, stop=END, extra_body=extra, stream=True))
    assert chat.choices[0].finish_reason == "stop"
    assert END not in (chat.choices[0].message.content or "")
    texts = [choice.delta.content or "" for chunk in chunks for choice in chunk.choices]
    assert "".join(texts) == chat.choices[0].message.content


def test_the_newer_name_of_max_tokens_may_stand_beside_it(client: openai.OpenAI) -> None:  # noqa: F811
    messages: Any = [{"role": "user", "content": "What colour?"}]
    asked: Any = {"model": "tiny", "messages": messages, "extra_body": {"ignore_eos": True}}
    answer = client.chat.completions.create(max_tokens=5, max_completion_tokens=5, **asked)
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 5
    with pytest.raises(openai.UnprocessableEntityError, match="'max_tokens' is 5 and 'max_completion_tokens'") as error:
        client.chat.completions.create(max_tokens=5, max_completion_tokens=6, **asked)
    assert error.value.param == "max_tokens"
