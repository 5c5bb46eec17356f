"""Fields of other servers pass where they ask for nothing, and are refused by name where they ask for something."""

from typing import Any

import pytest
from openai.types import completion_create_params
from openai.types.chat import (
    ChatCompletionAssistantMessageParam,
    ChatCompletionStreamOptionsParam,
    ChatCompletionSystemMessageParam,
    ChatCompletionToolMessageParam,
    ChatCompletionUserMessageParam,
)
from openai.types.chat import (
    completion_create_params as chat_create_params,
)
from openai.types.responses import response_create_params

from server import field_docs
from server.api.exception_handlers import parse
from server.api.openai.responses_schemas import ResponsesRequest
from server.api.openai.schemas import ChatCompletionRequest, ChatMessage, CompletionRequest, StreamOptions
from server.errors import UnsupportedField
from server.fields import BODY_FIELDS, MESSAGE_FIELDS, PART_FIELDS, STREAM_FIELDS, KnownField
from server.schemas import (
    CompareRequest,
    DetokenizeRequest,
    GenerateRequest,
    LenientRequest,
    ScoreRequest,
    TokenizeRequest,
)
from tests.server.conftest import World

MESSAGE = {"role": "user", "content": "What colour?"}
Routes = dict[str, tuple[type[LenientRequest], dict[str, Any]]]
GENERATING: Routes = {
    "/generate": (GenerateRequest, {"prompt": "a"}),
    "/compare": (CompareRequest, {"prompt": "a", "arms": [{"name": "b"}]}),
    "/v1/completions": (CompletionRequest, {"model": "tiny", "prompt": "a"}),
    "/v1/chat/completions": (ChatCompletionRequest, {"model": "tiny", "messages": [MESSAGE]}),
}
ROUTES: Routes = {
    **GENERATING,
    "/v1/responses": (ResponsesRequest, {"model": "tiny", "input": "a"}),
    "/score": (ScoreRequest, {"prompt": "a", "continuations": ["b"]}),
    "/tokenize": (TokenizeRequest, {"prompt": "a"}),
    "/detokenize": (DetokenizeRequest, {"tokens": [1]}),
}
ODD: Any = ({"odd": [1]}, "odd", 12345, True, [1])  # asks for something, where the field knows any value that does


def whole(route: str, **more: Any) -> LenientRequest:
    kind, least = ROUTES[route]
    return parse(kind, least | more)


@pytest.mark.parametrize("route", ROUTES)
def test_every_neutral_value_of_every_known_field_passes_and_changes_nothing(route: str) -> None:
    plain = whole(route)
    for field in BODY_FIELDS.values():
        if field.name in ROUTES[route][1]:
            continue
        own = field.name in ROUTES[route][0].model_fields  # which has its type
        for value in (None, *field.neutral, *(ODD if field.ignored and not own else ())):
            assert whole(route, **{field.name: value}) == plain, (field.name, value)
    every = {field.name: field.neutral[0] for field in BODY_FIELDS.values() if field.neutral}
    assert whole(route, **every) == plain, "all at once"


@pytest.mark.parametrize("route", ROUTES)
def test_every_other_value_of_a_field_that_a_route_does_not_have_is_refused_by_name(route: str) -> None:
    kind, _ = ROUTES[route]
    refused = [one for one in BODY_FIELDS.values() if one.name not in kind.model_fields and not one.ignored]
    assert len(refused) > 50
    asking: dict[str, Any] = {"repetition_penalty": 1.1, "skip_special_tokens": False, "stream": True}
    body = {name: value for name, value in asking.items() if name in kind.model_fields}
    for field in refused:
        if set(field.idle_without) - body.keys() and not body:
            continue  # what it belongs to cannot be asked for
        with pytest.raises(UnsupportedField) as error:
            whole(route, **body, **{field.name: {"odd": [1]}})
        assert error.value.param == field.name
        assert error.value.message.startswith(f"{field.name} is not supported: leave it out")
        for value in field.passing:
            assert value in error.value.message


@pytest.mark.parametrize(
    "body",
    [
        {"min_tokens": 0},
        {"top_k": -1},
        {"stop": ""},
        {"stop": []},
        {"stop": [""]},
        {"stop_token_ids": []},
        {"length_penalty": 1.0},
        {"use_beam_search": False},
        {"logprobs": False},
        {"stream_options": {}},
        {"stream_options": {"include_usage": False}},
        {"stream_options": {"include_usage": True}},
        {"function_call": "none"},
        {"priority": 0},
        {"best_of": 1},
        {"best_of": 2, "n": 2},
        {"mirostat": 0, "mirostat_tau": 5.0, "mirostat_eta": 0.1},
        {"typical_p": 1},
        {"tfs_z": 1.0},
        {"logit_bias": {}},
        {"logit_bias": []},
        {"logit_bias": None},
        {"response_format": {"type": "text"}},
        {"tools": [], "tool_choice": "auto", "parallel_tool_calls": False},
        {"repeat_last_n": 64},
        {"repeat_penalty": 1.0, "repeat_last_n": 64},
        {"dry_multiplier": 0.0, "dry_base": 1.75, "dry_sequence_breakers": ["\n"]},
        {"spaces_between_special_tokens": False},
        {"temperature": None, "top_p": None, "n": None, "seed": None, "stream": None, "presence_penalty": None},
        {"store": True, "metadata": {"a": "b"}, "user": "u", "service_tier": "flex", "reasoning_effort": "low"},
        {"prompt_cache_key": "k", "safety_identifier": "s", "request_id": "r"},
    ],
    ids=str,
)
@pytest.mark.parametrize("route", GENERATING)
def test_what_asks_for_nothing_is_accepted(world: World, route: str, body: dict[str, Any]) -> None:
    _, least = ROUTES[route]
    short = {"max_tokens": 2} if route.startswith("/v1") else {"max_new_tokens": 2}
    response = world.client.post(route, json=least | short | body)
    assert response.status_code == 200, response.text


@pytest.mark.parametrize(
    ("body", "param", "sentence"),
    [
        ({"length_penalty": 1.5}, "length_penalty", "or send 1, which asks for nothing"),
        ({"use_beam_search": True}, "use_beam_search", "or send false"),
        ({"use_beam_search": 0}, "use_beam_search", "or send false"),
        ({"best_of": 3}, "best_of", "1 or the value of n"),
        ({"best_of": 3, "n": 2}, "best_of", "1 or the value of n"),
        ({"function_call": {"name": "f"}}, "function_call", "not supported"),
        ({"tools": [{"type": "function"}]}, "tools", "not supported"),
        ({"guided_json": {}}, "guided_json", "not supported"),
        ({"mirostat": 2}, "mirostat", "not supported"),
        ({"priority": -1}, "priority", "not supported"),
        ({"repeat_penalty": 1.1}, "repeat_penalty", "'repetition_penalty' does it here"),
        ({"repeat_last_n": 64, "presence_penalty": 0.5}, "repeat_last_n", "or send -1"),
        ({"spaces_between_special_tokens": False, "skip_special_tokens": False}, "spaces_between_special_tokens", ""),
        ({"cache_salt": "secret"}, "cache_salt", "not supported"),
        ({"n_predict": 5}, "n_predict", "does it here"),
        ({"stream_options": {"everything": True}, "stream": True}, "stream_options", ""),
    ],
    ids=str,
)
@pytest.mark.parametrize("route", GENERATING)
def test_what_is_not_supported_is_a_400_that_names_it(
    world: World, route: str, body: dict[str, Any], param: str, sentence: str
) -> None:
    response = world.client.post(route, json=ROUTES[route][1] | body)
    error = response.json()["error"]
    assert (response.status_code, error["type"]) == (400, "unsupported_field")
    assert error["param"].split(".")[0] == param
    assert sentence in error["message"]


def test_a_route_names_its_own_field_for_what_another_one_has(world: World) -> None:
    status, error = world.refused(prompt="a", max_tokens=5)
    assert (status, error["param"]) == (400, "max_tokens")
    assert "'max_new_tokens' does it here" in error["message"]


def test_labels_of_messages_and_of_their_parts_pass_and_change_nothing(world: World) -> None:
    def ask(*messages: Any, **more: Any) -> str:
        body = {"model": "tiny", "messages": messages, "temperature": 0, "max_tokens": 6, **more}
        response = world.client.post("/v1/chat/completions", json=body)
        assert response.status_code == 200, response.text
        content: str = response.json()["choices"][0]["message"]["content"]
        return content

    answer = {"role": "assistant", "content": "Blue."}
    plain = ask(MESSAGE, answer, MESSAGE)
    labels = {"name": "Ann", "id": "msg_1", "cache_control": {"type": "ephemeral"}}
    silent = {"refusal": None, "audio": None, "function_call": None, "tool_calls": [], "annotations": [{"a": 1}]}
    silent |= {"reasoning_content": "", "refusal": ""}
    part = {"type": "text", "text": "What colour?", "cache_control": {"type": "ephemeral"}, "annotations": []}
    assert ask(MESSAGE | labels, answer | labels | silent, {"role": "user", "content": [part]}) == plain
    assert ask(MESSAGE, answer, MESSAGE, stream_options={"include_usage": True, "include_obfuscation": False}) == plain


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"messages": [MESSAGE | {"reasoning_content": "I think"}]}, "messages.0.reasoning_content"),
        ({"messages": [MESSAGE | {"audio": {"id": "a"}}]}, "messages.0.audio"),
        ({"messages": [MESSAGE | {"contents": "a"}]}, "messages.0.contents"),
        ({"stream": True, "stream_options": {"continuous_usage_stats": True}}, "stream_options.continuous_usage_stats"),
    ],
)
def test_in_parts_of_a_body_too_what_is_not_supported_is_named(world: World, body: dict[str, Any], param: str) -> None:
    least = {"model": "tiny", "messages": [MESSAGE]}
    response = world.client.post("/v1/chat/completions", json=least | body)
    assert (response.status_code, response.json()["error"]["param"]) == (400, param)


def test_labels_of_messages_pass_on_generate_as_well(world: World) -> None:
    rules: dict[str, Any] = {"temperature": 0, "max_new_tokens": 6}
    plain = world.post(messages=[MESSAGE], **rules)["results"][0]["text"]
    assert world.post(messages=[MESSAGE | {"name": "Ann", "id": "1"}], **rules)["results"][0]["text"] == plain


def test_a_misspelled_field_is_refused_as_before(world: World) -> None:
    status, error = world.refused(prompt="a", presence_penaltie=1)
    assert (status, error["param"]) == (422, "presence_penaltie")
    assert "did you mean 'presence_penalty'" in error["message"]


@pytest.mark.parametrize(
    ("params", "known", "schema"),
    [
        (chat_create_params.CompletionCreateParamsBase, BODY_FIELDS, ChatCompletionRequest),
        (completion_create_params.CompletionCreateParamsBase, BODY_FIELDS, CompletionRequest),
        (response_create_params.ResponseCreateParamsBase, BODY_FIELDS, ResponsesRequest),
        (ChatCompletionUserMessageParam, MESSAGE_FIELDS, ChatMessage),
        (ChatCompletionSystemMessageParam, MESSAGE_FIELDS, ChatMessage),
        (ChatCompletionAssistantMessageParam, MESSAGE_FIELDS, ChatMessage),
        (ChatCompletionToolMessageParam, MESSAGE_FIELDS, ChatMessage),
        (ChatCompletionStreamOptionsParam, STREAM_FIELDS, StreamOptions),
    ],
)
def test_every_field_of_openais_client_is_known(
    params: Any, known: dict[str, KnownField], schema: type[LenientRequest]
) -> None:
    assert set(params.__annotations__) <= {*known, *schema.model_fields}


def test_the_table_in_the_docs_is_what_the_code_makes_of_it() -> None:
    assert field_docs.PATH.read_text(encoding="utf-8") == field_docs.page(), "run `make api-docs`"


def test_the_table_says_of_each_field_what_is_true_of_it() -> None:
    body, _ = field_docs.page().split("## A message\n")
    rows = [row for row in body.splitlines() if row.startswith("| `")]
    assert len(rows) == len(BODY_FIELDS)
    for field in BODY_FIELDS.values():
        (line,) = (row for row in rows if row.startswith(f"| `{field.name}` | {field.origin} | "))
        statuses = line.split(" | ")[2 : 2 + len(field_docs.ROUTES)]
        for told, schema in zip(statuses, field_docs.ROUTES.values(), strict=True):
            assert told == ("yes" if field.name in schema.model_fields else "ignored" if field.ignored else "no")


def test_the_table_has_each_field_once_and_nothing_in_it_is_ignored_that_is_supported() -> None:
    schemas = [kind for kind, _ in ROUTES.values() if kind is not ResponsesRequest]  # it answers with some of them
    assert not [
        one.name for one in BODY_FIELDS.values() if one.ignored and any(one.name in s.model_fields for s in schemas)
    ]
    for known in (BODY_FIELDS, MESSAGE_FIELDS, PART_FIELDS, STREAM_FIELDS):
        assert all(name == field.name for name, field in known.items())
        for field in known.values():
            assert not field.ignored or not field.neutral, "every value passes anyway"
            assert {*field.idle_without} <= set(known)


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/generate", {"prompt": "a", "max_new_tokens": -1}),
        ("/compare", {"prompt": "a", "arms": [{"name": "b", "attributes": {}}], "max_new_tokens": -1}),
        ("/v1/completions", {"model": "tiny", "prompt": "a", "max_tokens": -1}),
        ("/v1/chat/completions", {"model": "tiny", "messages": [MESSAGE], "max_tokens": -1}),
        ("/v1/chat/completions", {"model": "tiny", "messages": [MESSAGE], "max_completion_tokens": -1}),
    ],
)
def test_an_answer_of_minus_one_tokens_is_as_long_as_there_is_room(
    world: World, path: str, body: dict[str, Any]
) -> None:
    context = world.service.codec.context
    answer = world.client.post(path, json={**body, "ignore_eos": True, "temperature": 0}).json()
    usage = (
        answer["arms"][0]["results"][0]["usage"]
        if "arms" in answer
        else (answer.get("results") or [answer])[0]["usage"]
    )
    assert usage["prompt_tokens"] + usage["completion_tokens"] == context
    (name,) = [name for name in body if name.startswith("max_")]
    refused = world.client.post(path, json={**body, name: 0})
    assert refused.status_code in (400, 422)
    assert refused.json()["error"]["param"] == name


def test_labels_and_neutral_values_pass_where_texts_are_scored(world: World) -> None:
    score = {"prompt": "Q: What colour?", "continuations": [" Blue."], "attributes": {}}
    plain = world.client.post("/score", json=score).json()["scores"]
    more = {"user": "me", "metadata": {"run": 1}, "stream": False, "logit_bias": {}, "request_id": "x", "n_probs": 0}
    more |= {"temperature": 1.0, "top_p": 1, "min_p": 0, "n": 1, "min_tokens": 0, "ignore_eos": False}
    assert world.client.post("/score", json=score | more).json()["scores"] == plain
    refused = world.client.post("/score", json=score | {"temperature": 0.5})
    assert refused.status_code == 400
    assert refused.json()["error"]["message"] == (
        "temperature is not supported: leave it out, or send 1, which asks for nothing."
    )
