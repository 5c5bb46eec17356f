"""The OpenAI routes, through OpenAI's own client."""

import asyncio
from typing import Any

import openai
import pytest
import torch

from server.api.openai.formatting import chat_logprobs, completion_logprobs, format_prompt
from server.engine.sequence import TokenLogprob
from server.tokenizer import Codec
from server.types import EchoedPrompt
from steering.hook import steered
from tests.server.conftest import World, columns

PROMPT = "Q: What colour is the sky?"
MESSAGES: Any = [{"role": "user", "content": "What colour?"}]


@pytest.fixture(scope="module")
def client(address: str) -> Any:
    with openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0) as made:
        yield made


def test_models_are_the_base_and_what_is_loaded(world: World, client: openai.OpenAI) -> None:
    world.post(prompt="a", checkpoint="demo@1", max_new_tokens=1)
    found = {model.id: model for model in client.models.list()}
    assert {"tiny", "demo@1", "demo@2"} <= set(found)
    assert client.models.retrieve("demo@1") == found["demo@1"]
    assert dict(found["demo@1"])["attributes"] == {"kind": 1.0, "true": 1.0, "fair": 1.0}
    with pytest.raises(openai.NotFoundError) as failure:
        client.models.retrieve("nothing")
    assert failure.value.code == "model_not_found"
    assert failure.value.type == "model_not_found"


@pytest.mark.parametrize(
    ("name", "extra", "same"),
    [
        ("tiny", {}, {"attributes": {}}),
        ("demo@1", {}, {"checkpoint": "demo@1"}),
        ("demo", {}, {"checkpoint": "demo"}),
        ("tiny", {"steering": {"attributes": {"kind": 2.0}}}, {"attributes": {"kind": 2.0}}),
        ("tiny", {"steering": {"checkpoint": "other"}}, {"checkpoint": "other"}),
        ("other", {"steering": {"attributes": {"true": -1}}}, {"checkpoint": "other", "attributes": {"true": -1}}),
        ("demo@1", {"steering": {"positions": "all"}}, {"checkpoint": "demo@1", "positions": "all"}),
        ("tiny", {"top_k": 5, "min_p": 0.01}, {"attributes": {}, "top_k": 5, "min_p": 0.01}),
    ],
)
def test_a_model_name_and_options_mean_what_generate_means(
    world: World, client: openai.OpenAI, name: str, extra: dict[str, Any], same: dict[str, Any]
) -> None:
    whole = world.post(prompt=PROMPT, max_new_tokens=20, temperature=1.5, seed=7, n=2, **same)["results"]
    answer = client.completions.create(
        model=name, prompt=PROMPT, max_tokens=20, temperature=1.5, seed=7, n=2, extra_body=extra
    )
    assert [choice.text for choice in answer.choices] == [result["text"] for result in whole]
    assert [choice.finish_reason for choice in answer.choices] == [result["finish_reason"] for result in whole]
    for choice, result in zip(answer.choices, whole, strict=True):
        for field in (
            ("sha256", "attributes", "positions", "steered_tokens") if extra.get("steering") else ("attributes",)
        ):
            assert dict(choice)["steering"][field] == result["steering"][field]
    assert answer.model == name
    assert answer.usage is not None
    assert answer.usage.prompt_tokens == whole[0]["usage"]["prompt_tokens"]
    assert answer.usage.completion_tokens == sum(result["usage"]["completion_tokens"] for result in whole)


def test_prompts_may_be_token_ids_and_batches(world: World, client: openai.OpenAI, spelling: Any) -> None:
    texts = [PROMPT, "Q: Where"]
    ids = [spelling(text)["input_ids"] for text in texts]
    rules: Any = {"model": "demo@1", "max_tokens": 8, "temperature": 0}
    expected = [
        r["text"] for r in world.post(prompt=texts, checkpoint="demo@1", max_new_tokens=8, temperature=0)["results"]
    ]
    given: list[Any] = [texts, ids]
    for prompt in given:
        found = client.completions.create(prompt=prompt, **rules)
        assert [choice.text for choice in found.choices] == expected
        assert [choice.index for choice in found.choices] == [0, 1]
    assert client.completions.create(prompt=ids[0], **rules).choices[0].text == expected[0]
    with pytest.raises(openai.UnprocessableEntityError, match="token 99999"):
        client.completions.create(prompt=[1, 99999], **rules)


@pytest.mark.parametrize("echo", [False, True])
def test_a_streamed_completion_is_the_whole_one(client: openai.OpenAI, echo: bool) -> None:
    body: Any = {
        "model": "demo@1",
        "prompt": [PROMPT, "Ünïcödé 東"],
        "max_tokens": 30,
        "temperature": 2,
        "seed": 3,
        "n": 2,
    }
    body |= {"logprobs": 2, "echo": echo, "extra_body": {"steering": {"trace": True}}}
    whole = client.completions.create(**body)
    pieces = list(client.completions.create(**body, stream=True, stream_options={"include_usage": True}))
    assert pieces[-1].usage == whole.usage
    assert not pieces[-1].choices
    assert len({piece.id for piece in pieces}) == 1
    for choice in whole.choices:
        own = [c for piece in pieces for c in piece.choices if c.index == choice.index]
        assert "".join(c.text for c in own) == choice.text
        assert choice.text.startswith(body["prompt"][choice.index // 2]) is echo
        assert [c.finish_reason for c in own][-1] == choice.finish_reason
        assert choice.logprobs is not None
        told = [c.logprobs for c in own if c.logprobs]
        for field in ("tokens", "text_offset"):
            assert [x for one in told for x in getattr(one, field)] == getattr(choice.logprobs, field)
        traced = [token["token_id"] for c in own for token in dict(c)["trace"] or []]
        assert traced == [token["token_id"] for token in dict(choice)["trace"]]
        assert dict(own[-1])["steering"] == dict(choice)["steering"]


@pytest.mark.parametrize("model_name", ["tiny", "demo@1"])
def test_echo_tells_the_log_probabilities_of_the_prompt(
    client: openai.OpenAI, model: Any, spelling: Any, model_name: str
) -> None:
    ids = spelling(PROMPT)["input_ids"]
    answer = client.completions.create(
        model=model_name, prompt=[ids, ids[:1]], max_tokens=1, temperature=0, logprobs=3, echo=True
    )
    mix = (1.0, 1.0, 1.0) if model_name == "demo@1" else (0.0, 0.0, 0.0)
    with (
        torch.inference_mode(),
        steered(model, columns(32, seed=1), mix, mask=torch.ones(1, len(ids), dtype=torch.bool)),
    ):
        logs = torch.log_softmax(model(input_ids=torch.tensor([ids])).logits[0].double(), dim=-1)
    found = answer.choices[0].logprobs
    assert found is not None
    assert answer.choices[0].text.startswith(PROMPT)
    assert found.tokens is not None
    assert found.tokens[:-1] == [spelling.decode([token]) for token in ids]
    assert found.token_logprobs is not None
    assert found.token_logprobs[0] is None
    expected = [float(logs[place, token]) for place, token in enumerate(ids[1:])]
    assert found.token_logprobs[1:-1] == pytest.approx(expected, rel=1e-4)
    assert found.top_logprobs is not None
    for place, told in enumerate(found.top_logprobs[1:-1]):
        best = logs[place].topk(1)
        assert told is not None
        assert max(told.values()) == pytest.approx(float(best.values), rel=1e-4)
        likeliest, name = spelling.decode(best.indices.tolist()), max(told, key=lambda token: told[token])
        assert name.startswith("bytes:") if "\ufffd" in likeliest else name == likeliest
    assert found.text_offset is not None
    assert all(
        PROMPT[offset:].startswith(token) for offset, token in zip(found.text_offset[:-1], found.tokens, strict=False)
    )
    lone = answer.choices[1].logprobs
    assert lone is not None
    assert lone.token_logprobs is not None
    assert len(lone.token_logprobs) == 2


def test_chat_whole_streamed_and_async_say_the_same(world: World, address: str, client: openai.OpenAI) -> None:
    body: Any = {"model": "demo@1", "messages": MESSAGES, "max_tokens": 25, "temperature": 1.5, "seed": 4, "n": 2}
    body |= {"logprobs": True, "top_logprobs": 2}
    whole = client.chat.completions.create(**body)
    same = world.post(
        messages=MESSAGES, checkpoint="demo@1", max_new_tokens=25, temperature=1.5, seed=4, n=2, logprobs=2
    )["results"]
    assert [choice.message.content for choice in whole.choices] == [result["text"] for result in same]
    for choice, result in zip(whole.choices, same, strict=True):
        assert choice.logprobs is not None
        assert choice.logprobs.content is not None
        assert [one.token for one in choice.logprobs.content] == [one["token"] for one in result["logprobs"]]
        assert all(len(one.top_logprobs) == 2 for one in choice.logprobs.content)

    def texts(pieces: list[Any]) -> list[str]:
        found = ["", ""]
        for piece in pieces:
            for choice in piece.choices:
                found[choice.index] += choice.delta.content or ""
        return found

    expected = [result["text"] for result in same]
    pieces = list(client.chat.completions.create(**body, stream=True))
    assert texts(pieces) == expected
    assert {c.finish_reason for piece in pieces[-2:] for c in piece.choices} <= {"stop", "length"}

    async def streamed() -> tuple[Any, list[Any]]:
        async with openai.AsyncOpenAI(base_url=f"{address}/v1", api_key="none") as other:
            answer, stream = await asyncio.gather(
                other.chat.completions.create(**body), other.chat.completions.create(**body, stream=True)
            )
            return answer, [piece async for piece in stream]

    answer, pieces = asyncio.run(streamed())
    assert [choice.message.content for choice in answer.choices] == expected
    assert texts(pieces) == expected


def test_messages_may_be_parts_and_come_from_a_developer(client: openai.OpenAI) -> None:
    def ask(messages: Any) -> str | None:
        body: Any = {"model": "demo@1", "max_completion_tokens": 12, "temperature": 0}
        return client.chat.completions.create(messages=messages, **body).choices[0].message.content

    parts = [{"type": "text", "text": "What "}, {"type": "text", "text": "colour?"}]
    assert ask([{"role": "user", "content": parts}]) == ask(MESSAGES)
    assert ask([{"role": "developer", "content": "Be kind."}, *MESSAGES]) == ask(
        [{"role": "system", "content": "Be kind."}, *MESSAGES]
    )


def test_a_chat_ends_where_the_model_has_no_room(client: openai.OpenAI) -> None:
    body: Any = {"model": "tiny", "messages": MESSAGES, "extra_body": {"ignore_eos": True}}
    answer = client.chat.completions.create(**body)
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage is not None
    assert answer.usage.total_tokens == 96


def test_fields_that_ask_for_nothing_are_taken(client: openai.OpenAI) -> None:
    neutral = {
        "presence_penalty": 0,
        "frequency_penalty": 0.0,
        "logit_bias": {},
        "user": "u",
        "stop": None,
        "seed": None,
    }
    body: Any = {"model": "tiny", "temperature": 0, "max_tokens": 4}
    plain = client.completions.create(prompt=PROMPT, **body)
    given = client.completions.create(prompt=PROMPT, **body, extra_body=neutral | {"best_of": 1, "suffix": None})
    assert given.choices[0].text == plain.choices[0].text
    client.chat.completions.create(messages=MESSAGES, **body, extra_body=neutral | {"tools": [], "n": None})


@pytest.mark.parametrize(
    ("extra", "status", "param", "sentence"),
    [
        ({"length_penalty": 0.5}, 400, "length_penalty", "not supported"),
        ({"tools": [{"type": "function"}]}, 400, "tools", "not supported"),
        ({"response_format": {"type": "json_object"}}, 400, "response_format", "not supported"),
        ({"max_new_tokens": 5}, 400, "max_new_tokens", "no field 'max_new_tokens'"),
        ({"steering": {"strength": 1}}, 400, "steering.strength", "no field"),
        ({"steering": {"attributes": {"nonsense": 1}}}, 422, "steering.attributes.nonsense", "it has kind"),
        ({"steering": {"checkpoint": "gone"}}, 404, "steering.checkpoint", "no checkpoint"),
        ({"model": "gpt-4"}, 404, "model", "no model 'gpt-4'; GET /v1/models"),
        ({"model": "demo", "steering": {"checkpoint": "other"}}, 422, "steering.checkpoint", "already"),
        ({"stream_options": {"include_all": True}}, 400, "stream_options.include_all", "no field"),
        ({"top_logprobs": 2, "logprobs": False}, 422, "top_logprobs", "needs 'logprobs'"),
        ({"max_completion_tokens": 4}, 422, "max_tokens", "send one of them"),
        ({"temperature": -1}, 422, "temperature", "greater than or equal to 0"),
        ({"messages": [{"role": "user", "content": 5}]}, 422, "messages.0.content", "string or a list"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, 422, "messages.0.content.0", "type"),
        ({"messages": [{"role": "nurse", "content": "a"}]}, 422, "messages.0.role", "system"),
        ({"messages": [{"role": "user", "content": None}]}, 422, "messages.0", "'user' needs content"),
    ],
)
def test_what_is_wrong_is_named(
    client: openai.OpenAI, extra: dict[str, Any], status: int, param: str, sentence: str
) -> None:
    with pytest.raises(openai.APIStatusError, match=sentence) as failure:
        client.chat.completions.create(model="tiny", messages=MESSAGES, max_tokens=3, extra_body=extra)
    assert failure.value.status_code == status
    assert str(failure.value.param).startswith(param)


@pytest.mark.parametrize("stream", [False, True])
def test_a_conversation_that_is_too_long_is_a_bad_request(client: openai.OpenAI, stream: bool) -> None:
    long: Any = [{"role": "user", "content": "word " * 200}]
    with pytest.raises(openai.BadRequestError, match="This model's maximum context length is 96 tokens") as failure:
        client.chat.completions.create(model="tiny", messages=long, stream=stream)
    assert failure.value.code == "context_length_exceeded"
    assert failure.value.param == "messages"


def test_an_assistants_turn_may_have_no_content(client: openai.OpenAI) -> None:
    body: Any = {"model": "tiny", "temperature": 0, "max_tokens": 4}
    silent: Any = [*MESSAGES, {"role": "assistant", "content": None}, *MESSAGES]
    empty: Any = [*MESSAGES, {"role": "assistant", "content": ""}, *MESSAGES]
    found = [client.chat.completions.create(messages=one, **body).choices[0].message.content for one in (silent, empty)]
    assert found[0] == found[1]


@pytest.mark.parametrize("stream", [False, True])
def test_no_tokens_but_the_echo(client: openai.OpenAI, stream: bool) -> None:
    body: Any = {"model": "demo@1", "prompt": [PROMPT, [5, 6]], "logprobs": 1, "echo": True, "temperature": 0}
    one = client.completions.create(max_tokens=1, **body)
    if stream:
        texts, finished = ["", ""], ["", ""]
        for chunk in client.completions.create(max_tokens=0, stream=True, **body):
            for choice in chunk.choices:
                texts[choice.index] += choice.text
                finished[choice.index] = choice.finish_reason or finished[choice.index]
        assert finished == ["length", "length"]
    else:
        none = client.completions.create(max_tokens=0, **body)
        texts = [choice.text for choice in none.choices]
        for mine, longer in zip(none.choices, one.choices, strict=True):
            assert mine.logprobs is not None
            assert longer.logprobs is not None
            assert mine.logprobs.token_logprobs == (longer.logprobs.token_logprobs or [])[:-1]
        assert none.usage is not None
        assert none.usage.completion_tokens == 0
    assert texts[0] == PROMPT
    assert [longer.text.startswith(text) for longer, text in zip(one.choices, texts, strict=True)] == [True, True]
    with pytest.raises(openai.UnprocessableEntityError, match="asks for nothing"):
        client.completions.create(model="tiny", prompt=PROMPT, max_tokens=0)


def test_an_error_in_a_stream_is_its_last_event(fresh: World, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any) -> str:
        raise RuntimeError

    monkeypatch.setattr(fresh.service.codec, "token_text", broken)
    body = {"model": "demo", "prompt": "a", "stream": True, "logprobs": 1}
    lines = fresh.client.post("/v1/completions", json=body).text.split("\n\n")
    assert '"internal_error"' in lines[-2]
    assert "[DONE]" not in lines


@pytest.mark.parametrize("skip", [True, False])
@pytest.mark.parametrize("echo", [False, True])
@pytest.mark.parametrize("seed", range(4))
def test_offsets_say_where_in_the_text_tokens_begin(
    client: openai.OpenAI, spelling: Any, seed: int, echo: bool, skip: bool
) -> None:
    """Also of characters that several tokens make up, and of tokens that the text does not show."""
    body: Any = {"model": "tiny", "prompt": "Ünïcödé<|end|> 東京 🙂!", "max_tokens": 40, "temperature": 3, "seed": seed}
    body |= {"logprobs": 1, "echo": echo, "extra_body": {"ignore_eos": True, "skip_special_tokens": skip}}
    choice = client.completions.create(**body).choices[0]
    logprobs, text = choice.logprobs, choice.text
    assert logprobs is not None
    assert logprobs.tokens is not None
    assert logprobs.text_offset is not None
    places = list(zip(logprobs.tokens, logprobs.text_offset, [*logprobs.text_offset[1:], len(text)], strict=True))
    whole = 0
    for token, begin, end in places:
        if token == "<|end|>":
            assert text[begin:end] in ("", token) if skip else text[begin:end] == token
        elif not token.startswith("bytes:"):
            assert text.startswith(token, begin)
            whole += len(token)
    assert whole > 20
    if echo:
        assert text.startswith(body["prompt"])
        begins = {token: begin for token, begin, _ in places[::-1]}
        assert [begins[token] for token in ("<|end|>", "!")] == [7, text.index("!")]


@pytest.mark.parametrize("prompt", [[35, 225, 36, 37], [225, 225, 36], [0, 35, 0, 0, 36]])
def test_offsets_in_prompts_that_are_no_text(client: openai.OpenAI, spelling: Any, prompt: list[int]) -> None:
    choice = client.completions.create(model="tiny", prompt=prompt, max_tokens=0, echo=True, logprobs=0).choices[0]
    assert choice.text == spelling.decode(prompt)
    assert choice.logprobs is not None
    found = list(zip(choice.logprobs.tokens or [], choice.logprobs.text_offset or [], strict=True))
    assert len(found) == len(prompt)
    for token, begin in found:
        assert token.startswith("bytes:") or choice.text.startswith(token, begin)
    assert [begin for _, begin in found] == sorted(begin for _, begin in found)


def test_a_prompt_comes_back_as_it_was_given_without_what_the_tokenizer_adds() -> None:
    class Adding:
        """Begins every text with a token of its own, and knows nothing but small letters."""

        words = ("<s>", "a", "b", "\n")

        def __call__(self, text: str, *, add_special_tokens: bool = True, **_: Any) -> Any:
            before = [0] if add_special_tokens else []
            return {"input_ids": [*before, *(self.words.index(one) for one in text.lower() if one in self.words)]}

        def decode(self, ids: list[int], *, skip_special_tokens: bool = False, **_: Any) -> str:
            return "".join(self.words[one] for one in ids if not skip_special_tokens or 0 < one < 3)

    codec = Codec(Adding(), vocab=4, context=None)
    for given, offsets in (("a\nb", [0, 1, 2]), ("A\nb", [3, 3, 3])):
        ids = codec.encode(given, "prompt")
        logprobs = tuple(TokenLogprob(token, -1.0) for token in ids[1:])
        text, told = format_prompt(codec, EchoedPrompt(given, ids, logprobs))
        assert text == given
        assert told is not None
        assert told.tokens[0] == "<s>"
        assert told.text_offset == [0, *offsets]


def test_the_bytes_of_tokens_are_those_of_the_text(client: openai.OpenAI) -> None:
    asked: Any = {"messages": MESSAGES, "max_tokens": 40, "temperature": 3, "logprobs": True, "top_logprobs": 3}
    parts = 0
    for seed in range(6):
        choice = client.chat.completions.create(model="tiny", seed=seed, **asked).choices[0]
        assert choice.logprobs is not None
        assert choice.logprobs.content is not None
        told = [(token.token, bytes(token.bytes or [])) for token in choice.logprobs.content]
        shown = b"".join(raw for token, raw in told if token != "<|end|>")
        assert shown.decode(errors="replace") == choice.message.content
        parts += sum(token == "\ufffd" and raw != token.encode() for token, raw in told)
    assert parts > 5


@pytest.mark.parametrize(("name", "raw"), [("<0xE6>", b"\xe6"), ("æĿ", b"\xe6\x9d"), ("日", None)])
def test_bytes_of_parts_of_characters_by_the_kind_of_vocabulary(name: str, raw: bytes | None) -> None:
    class Vocabulary:
        def __call__(self, text: str) -> None: ...

        def decode(self, ids: list[int], **_: Any) -> str:
            return "\ufffd"

        def convert_ids_to_tokens(self, token: int) -> str:
            return name

    codec = Codec(Vocabulary(), vocab=1, context=None)
    assert codec.token_text(0) == ("\ufffd", raw)
    logprobs = [TokenLogprob(0, -1.0)]
    spelled = "\ufffd" if raw is None else "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)
    told = completion_logprobs(codec, logprobs, lambda token: 6)
    assert told.tokens == [spelled]
    assert told.text_offset == [6]
    assert chat_logprobs(codec, logprobs).content[0].bytes == (None if raw is None else list(raw))


def test_a_plain_name_is_a_model(client: openai.OpenAI) -> None:
    assert client.models.retrieve("demo").id == "demo"


@pytest.mark.parametrize(
    ("method", "path", "body", "sentence"),
    [
        (
            "POST",
            "/compare",
            {"prompt": "a", "arms": [{"name": "b"}], "baseline": True},
            "There is no field 'baseline'.",
        ),
        ("POST", "/score", {"prompt": "a", "continuations": ["b"], "arms": []}, "There is no field 'arms'."),
        ("POST", "/score", {"prompt": ["a"], "continuations": ["b"]}, "prompt should be a valid string, not ['a']."),
        ("POST", "/generate", {"prompt": "a", "stop": ["b"] * 17}, "stop has too many items; at most 16 are taken."),
        ("DELETE", "/checkpoints/other?verson=9", None, "There is no field 'verson'; did you mean 'version'?"),
    ],
)
def test_hints_are_of_the_route_that_was_asked(world: World, method: str, path: str, body: Any, sentence: str) -> None:
    response = world.client.request(method, path, json=body)
    assert response.status_code == 422
    assert response.json()["error"]["message"] == sentence
