"""A conversation reaches the model through its own template, in the form that it reads, and nothing of it is lost."""

import copy
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient

from server.app import create_app
from server.config import Settings
from server.errors import StartupError
from server.tokenizer import Codec
from steering.chat_template import ChatTemplate
from tests.chat_templates import NEITHER, PARTS, STRINGS, TOOLS, user
from tests.server.conftest import END, World


@pytest.fixture(scope="module")
def template(spelling: Any) -> Callable[[str], ChatTemplate]:
    def made(source: str) -> ChatTemplate:
        tokenizer = copy.deepcopy(spelling)
        tokenizer.chat_template = source
        return ChatTemplate(tokenizer)

    return made


Made = Callable[[str], ChatTemplate]


# --- through the server ---


@pytest.fixture
def served(world: World, template: Made, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Callable[..., Any]]:
    """A chat template for the server -> what `/tokenize` makes of a conversation, as text."""

    def serve(source: str) -> Callable[..., Any]:
        monkeypatch.setattr(world.service.codec, "chat", template(source))

        def text(messages: Any, **fields: Any) -> Any:
            response = world.client.post("/tokenize", json={"messages": messages, **fields})
            if response.status_code != 200:
                return response.status_code, response.json()["error"]
            return world.service.codec.decode_all(response.json()["tokens"])

        return text

    return serve


def test_every_route_gives_the_template_what_it_reads(
    world: World, served: Callable[[str], Callable[..., Any]], spelling: Any
) -> None:
    assert served(PARTS)(user("What colour?")) == "[user]What colour?;"
    ids = spelling("[user]What colour?;", add_special_tokens=False)["input_ids"]
    rules = {"temperature": 0, "ignore_eos": True}
    expected = world.client.post(
        "/v1/completions", json={"model": "tiny", "prompt": ids, "max_tokens": 8, **rules}
    ).json()["choices"][0]["text"]
    native = world.post(messages=user("What colour?"), attributes={}, max_new_tokens=8, **rules)
    assert native["results"][0]["text"] == expected
    body = {"model": "tiny", "messages": user([{"type": "text", "text": "What colour?"}]), "max_tokens": 8, **rules}
    chat = world.client.post("/v1/chat/completions", json=body).json()
    assert chat["choices"][0]["message"]["content"] == expected
    responses = {"model": "tiny", "input": "What colour?", "max_output_tokens": 8, **rules}
    answer = world.client.post("/v1/responses", json=responses).json()
    assert answer["output"][0]["content"][0]["text"] == expected


def test_a_template_that_shows_nothing_is_not_blamed_on_the_client(
    world: World, served: Callable[[str], Callable[..., Any]]
) -> None:
    status, error = served(NEITHER)(user("a"))
    assert (status, error["type"], error["code"]) == (501, "chat_template_unusable", "chat_template_unusable")
    chat = {"model": "tiny", "messages": user("a")}
    assert world.client.post("/v1/chat/completions", json=chat).status_code == 501
    assert world.post(prompt="a", max_new_tokens=1)["results"]


def test_fields_of_a_conversation_reach_the_template(served: Callable[[str], Callable[..., Any]]) -> None:
    text = served(STRINGS + "{{ '<think>' if thinks }}")
    turns = [*user("sky?"), {"role": "assistant", "content": "It is"}]
    assert text(turns) == "[user]sky?[assistant]It is[answer]"
    assert text(turns, continue_final_message=True) == "[user]sky?[assistant]It is"
    assert text(turns, add_generation_prompt=False) == "[user]sky?[assistant]It is"
    assert text(turns, chat_template_kwargs={"thinks": True}) == "[user]sky?[assistant]It is[answer]<think>"
    status, error = text(turns, continue_final_message=True, add_generation_prompt=True)
    assert (status, error["param"]) == (422, "continue_final_message")


@pytest.mark.parametrize("field", ["chat_template_kwargs", "continue_final_message"])
def test_fields_of_a_conversation_are_refused_with_a_prompt(world: World, field: str) -> None:
    status, error = world.refused(**{"prompt": "a", field: {"x": 1} if field.endswith("kwargs") else True})
    assert (status, error["param"]) == (422, field)


def test_turns_with_tools_come_through_every_route(world: World, served: Callable[[str], Callable[..., Any]]) -> None:
    text = served(TOOLS.replace("ARGUMENTS", "{{ t.function.arguments | tojson }}"))
    call = {"id": "call_1", "type": "function", "function": {"name": "look", "arguments": '{"x": 1}'}}
    turns = [
        *user("sky?"),
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "content": "blue", "tool_call_id": "call_1"},
    ]
    assert text(turns) == '[user]sky?[assistant]<call_1 look {"x": 1}>[tool call_1]blue'
    chat = {"model": "tiny", "messages": turns, "max_tokens": 4, "temperature": 0}
    expected = world.client.post("/v1/chat/completions", json=chat).json()["choices"][0]["message"]["content"]
    items = [
        {"role": "user", "content": "sky?"},
        {"type": "function_call", "call_id": "call_1", "name": "look", "arguments": '{"x": 1}'},
        {"type": "function_call_output", "call_id": "call_1", "output": "blue"},
    ]
    body = {"model": "tiny", "input": items, "max_output_tokens": 4, "temperature": 0}
    answer = world.client.post("/v1/responses", json=body).json()
    assert answer["output"][0]["content"][0]["text"] == expected
    native = world.post(messages=turns, attributes={}, max_new_tokens=4, temperature=0)
    assert native["results"][0]["text"] == expected


@pytest.mark.parametrize(
    ("turn", "param"),
    [
        ({"role": "user", "content": "a", "tool_calls": [{"function": {"name": "f", "arguments": ""}}]}, "messages.0"),
        ({"role": "user", "content": "a", "tool_call_id": "1"}, "messages.0"),
        ({"role": "assistant", "tool_calls": [{"function": {"name": 5, "arguments": ""}}]}, "messages.0.tool_calls.0."),
        ({"role": "tool", "tool_call_id": "1"}, "messages.0.content"),
        ({"role": "developer", "content": None}, "messages.0.content"),
    ],
)
def test_a_turn_that_is_not_whole_is_refused(world: World, turn: dict[str, Any], param: str) -> None:
    status, error = world.refused(messages=[turn])
    assert status == 422
    assert error["param"].startswith(param)


def test_the_operator_gives_a_template_and_is_told_what_is_wrong_with_it(
    settings: Settings, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file = tmp_path / "mine.jinja"
    file.write_text("{% for m in messages %}<<{{ m.content }}>>{% endfor %}")
    with TestClient(create_app(settings.model_copy(update={"chat_template": file}))) as client:
        ids = client.post("/tokenize", json={"messages": user("sky")}).json()["tokens"]
        assert client.post("/detokenize", json={"tokens": ids}).json()["prompt"] == "<<sky>>"
        assert client.get("/tokenizer_info").json()["chat_template"] == file.read_text()
    file.write_text(NEITHER)
    with (
        caplog.at_level(logging.WARNING, "server.front"),
        TestClient(create_app(settings.model_copy(update={"chat_template": file}))) as client,
    ):
        assert str(file) in caplog.text
        assert "neither from a string nor from a list of parts" in caplog.text
        assert client.post("/tokenize", json={"messages": user("sky")}).status_code == 501
    with pytest.raises(StartupError, match=r"gone.jinja' .*cannot be read: No such file"):
        create_app(settings.model_copy(update={"chat_template": tmp_path / "gone.jinja"}))


# --- special tokens ---


@pytest.fixture
def beginning(world: World, spelling: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The server's tokenizer puts <|end|> before every text, and its chat template writes it."""
    from tokenizers import processors

    tokenizer = copy.deepcopy(spelling)
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{END} $A", special_tokens=[(END, 0)]
    )
    tokenizer.chat_template = END + STRINGS
    assert tokenizer("a")["input_ids"][0] == 0
    codec = world.service.codec
    monkeypatch.setattr(world.service, "codec", Codec(tokenizer, vocab=codec._vocab, context=codec.context))
    return tokenizer


TEXT = "Q: What colour is the sky?"


@pytest.mark.parametrize(
    ("text", "fields", "begins"),
    [
        (TEXT, {}, 1),
        (END + TEXT, {}, 1),
        (TEXT, {"add_special_tokens": False}, 0),
        (END + TEXT, {"add_special_tokens": True}, 2),
        (END + TEXT, {"add_special_tokens": False}, 1),
    ],
)
def test_a_text_begins_once_on_every_route(
    world: World, beginning: Any, text: str, fields: dict[str, Any], begins: int
) -> None:
    own = beginning(TEXT, add_special_tokens=False)["input_ids"]
    tokens = world.client.post("/tokenize", json={"prompt": text, **fields}).json()["tokens"]
    assert tokens == [0] * begins + own
    generated = world.post(prompt=text, max_new_tokens=1, **fields)["results"][0]
    assert generated["usage"]["prompt_tokens"] == begins + len(own)
    body = {"model": "tiny", "prompt": text, "max_tokens": 1, "temperature": 0, "echo": True, "logprobs": 1, **fields}
    echoed = world.client.post("/v1/completions", json=body).json()
    assert echoed["usage"]["prompt_tokens"] == begins + len(own)
    assert echoed["choices"][0]["text"].startswith(text)
    assert len(echoed["choices"][0]["logprobs"]["tokens"]) == begins + len(own) + 1
    by_ids = world.client.post("/v1/completions", json={**body, "prompt": tokens, "add_special_tokens": None}).json()
    assert by_ids["choices"][0]["logprobs"]["token_logprobs"] == echoed["choices"][0]["logprobs"]["token_logprobs"], (
        "the numbers are those of the ids that /tokenize tells"
    )
    arms = [{"name": "a", "attributes": {}}]
    compared = world.client.post("/compare", json={"prompt": text, "arms": arms, "max_new_tokens": 1, **fields}).json()
    assert compared["arms"][0]["results"][0]["usage"]["prompt_tokens"] == begins + len(own)
    score = {"prompt": text, "continuations": [" A: The sky is blue."], "attributes": {}, **fields}
    scored = world.client.post("/score", json=score).json()["scores"][0]
    whole = world.client.post("/v1/completions", json={**body, "prompt": text + score["continuations"][0]}).json()
    logprobs = whole["choices"][0]["logprobs"]["token_logprobs"][:-1]
    assert [one["logprob"] for one in scored["tokens"]] == pytest.approx(logprobs[-len(scored["tokens"]) :], rel=1e-4)


def test_a_conversation_has_the_beginning_that_its_template_writes(world: World, beginning: Any) -> None:
    for more, begins in (({}, 1), ({"add_special_tokens": False}, 1), ({"add_special_tokens": True}, 2)):
        tokens = world.client.post("/tokenize", json={"messages": user("a"), **more}).json()["tokens"]
        assert tokens[: begins + 1].count(0) == begins
        usage = world.post(messages=user("a"), max_new_tokens=1, **more)["results"][0]["usage"]
        assert usage["prompt_tokens"] == len(tokens)
        body = {"model": "tiny", "messages": user("a"), "max_tokens": 1, **more}
        assert world.client.post("/v1/chat/completions", json=body).json()["usage"]["prompt_tokens"] == len(tokens)
    rendered = beginning.apply_chat_template(user("a"), tokenize=False, add_generation_prompt=True)
    plain = world.post(prompt=rendered, max_new_tokens=1)["results"][0]["usage"]["prompt_tokens"]
    assert plain == len(world.client.post("/tokenize", json={"messages": user("a")}).json()["tokens"])
