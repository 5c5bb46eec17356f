"""/v1/responses, through OpenAI's own client."""

import asyncio
from typing import Any

import openai
import pytest

from server.api.exception_handlers import parse
from server.api.openai.responses_schemas import ResponsesRequest
from server.errors import NotFinite
from tests.server.conftest import CONTEXT, World

RULES: Any = {"model": "demo@1", "temperature": 0, "max_output_tokens": 12}
QUESTION = "What colour?"
ORDER = [
    "response.created",
    "response.in_progress",
    "response.output_item.added",
    "response.content_part.added",
    "response.output_text.delta",
    "response.output_text.done",
    "response.content_part.done",
    "response.output_item.done",
    "response.completed",
]


@pytest.fixture(scope="module")
def client(address: str) -> Any:
    with openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0) as made:
        yield made


def chat(client: openai.OpenAI, messages: Any, **more: Any) -> Any:
    """The same question to /v1/chat/completions."""
    rules = {"model": "demo@1", "temperature": 0, "max_tokens": 12} | more
    return client.chat.completions.create(messages=messages, **rules)


def test_a_response_is_what_chat_answers(client: openai.OpenAI) -> None:
    answer = client.responses.create(input=QUESTION, instructions="Be kind.", **RULES, metadata={"run": "7"})
    said = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": QUESTION}]
    expected = chat(client, said)
    assert answer.output_text == expected.choices[0].message.content != ""
    assert answer.usage is not None
    assert answer.usage.input_tokens == expected.usage.prompt_tokens
    assert answer.usage.output_tokens == expected.usage.completion_tokens
    assert answer.usage.total_tokens == answer.usage.input_tokens + answer.usage.output_tokens
    ended = expected.choices[0].finish_reason == "stop"
    assert answer.status == ("completed" if ended else "incomplete")
    assert (answer.incomplete_details is None) is ended
    assert (answer.model, answer.instructions, answer.metadata) == ("demo@1", "Be kind.", {"run": "7"})
    assert answer.id.startswith("resp_")
    assert dict(answer)["steering"]["checkpoint"] == "demo"
    assert dict(answer)["steering"]["steered_tokens"] > 0


def test_an_answer_that_is_cut_says_so_and_one_that_ends_says_that(client: openai.OpenAI) -> None:
    cut = client.responses.create(**RULES, input=QUESTION, extra_body={"ignore_eos": True})
    assert cut.status == "incomplete"
    assert cut.incomplete_details is not None
    assert cut.incomplete_details.reason == "max_output_tokens"
    text = cut.output_text
    whole = client.responses.create(**RULES, input=QUESTION, extra_body={"ignore_eos": True, "stop": text[2:5]})
    assert (whole.status, whole.incomplete_details) == ("completed", None)
    assert whole.output_text == text[: text.index(text[2:5])]


def test_an_answer_may_be_as_long_as_the_model_has_room_for(client: openai.OpenAI) -> None:
    answer = client.responses.create(model="tiny", input=QUESTION, extra_body={"ignore_eos": True})
    assert answer.usage is not None
    assert answer.usage.total_tokens == CONTEXT


def test_a_conversation_goes_on_with_what_was_answered(client: openai.OpenAI) -> None:
    first = client.responses.create(input=QUESTION, **RULES)
    items: Any = [
        {
            "role": "user",
            "content": [{"type": "input_text", "text": "What "}, {"type": "input_text", "text": "colour?"}],
        },
        *(item.model_dump() for item in first.output),
        {"type": "message", "role": "user", "content": "And grass?"},
    ]
    second = client.responses.create(input=items, **RULES)
    said = [
        {"role": "user", "content": QUESTION},
        {"role": "assistant", "content": first.output_text},
        {"role": "user", "content": "And grass?"},
    ]
    assert second.output_text == chat(client, said).choices[0].message.content


def test_labels_of_items_and_of_their_parts_pass(client: openai.OpenAI) -> None:
    label = {"cache_control": {"type": "ephemeral"}}
    part = {"type": "input_text", "text": QUESTION, **label}
    labelled: Any = [{"role": "user", "content": [part], "name": "Ann", "id": "msg_1", **label}]
    plain = client.responses.create(input=QUESTION, **RULES)
    assert client.responses.create(input=labelled, **RULES).output_text == plain.output_text


def test_errors_name_the_item_that_they_are_about() -> None:
    call = {"type": "function_call", "call_id": "c", "name": "f", "arguments": "{}"}
    answer = {"type": "function_call_output", "call_id": "c", "output": "4"}
    body = {
        "model": "demo",
        "instructions": "Be kind.",
        "input": [{"role": "user", "content": "a"}, call, call, answer],
    }
    request = parse(ResponsesRequest, body)
    named = {"messages.0.role": "instructions", "messages.1.content": "input.0", "messages.2.tool_calls": "input.1"}
    named |= {"messages.3.role": "input.3", "messages": "input", "seed": "seed"}
    assert {param: request.field_of(param) for param in named} == named
    assert parse(ResponsesRequest, {"model": "demo", "input": "a"}).field_of("messages.0.content") == "input"


def test_a_stream_has_the_events_that_clients_expect(client: openai.OpenAI) -> None:
    whole = client.responses.create(input=QUESTION, **RULES)
    events = list(client.responses.create(input=QUESTION, stream=True, **RULES))
    assert list(dict.fromkeys(event.type for event in events)) == ORDER
    assert [event.sequence_number for event in events] == list(range(len(events)))
    deltas = "".join(event.delta for event in events if event.type == "response.output_text.delta")
    (done,) = (event for event in events if event.type == "response.output_text.done")
    assert deltas == done.text == whole.output_text
    first, last = events[0], events[-1]
    assert first.type == "response.created"
    assert first.response.status == "in_progress"
    assert first.response.output == []
    assert last.type == "response.completed"
    assert last.response.output_text == whole.output_text
    assert last.response.usage == whole.usage
    assert last.response.status == whole.status
    assert dict(last.response)["steering"] == dict(whole)["steering"]
    items = {event.item_id for event in events if hasattr(event, "item_id")}
    assert items == {last.response.output[0].id}


def test_the_clients_own_reader_of_streams_reads_it(client: openai.OpenAI) -> None:
    whole = client.responses.create(input=QUESTION, **RULES)
    with client.responses.stream(input=QUESTION, **RULES) as stream:
        snapshots = [event.snapshot for event in stream if event.type == "response.output_text.delta"]
        final = stream.get_final_response()
    assert snapshots[-1] == final.output_text == whole.output_text


def test_the_asynchronous_client_reads_the_same(address: str, client: openai.OpenAI) -> None:
    async def both() -> tuple[Any, list[Any]]:
        async with openai.AsyncOpenAI(base_url=f"{address}/v1", api_key="none") as other:
            whole = await other.responses.create(input=QUESTION, **RULES)
            stream = await other.responses.create(input=QUESTION, stream=True, **RULES)
            return whole, [event async for event in stream]

    whole, events = asyncio.run(both())
    assert events[-1].response.output_text == whole.output_text


def test_steering_comes_through_extra_body(client: openai.OpenAI) -> None:
    rules = {"model": "tiny", "input": QUESTION, "temperature": 0, "max_output_tokens": 12}
    steering = {"checkpoint": "demo@2", "attributes": {"kind": 2.0}, "positions": "all", "trace": True}
    answer = client.responses.create(**rules, extra_body={"steering": steering})
    expected = chat(
        client, [{"role": "user", "content": QUESTION}], model="tiny", extra_body={"steering": steering}
    ).choices[0]
    assert answer.output_text == expected.message.content
    assert dict(answer)["steering"]["attributes"] == {"kind": 2.0}
    assert len(dict(answer)["trace"]) == answer.usage.output_tokens
    events = list(client.responses.create(**rules, stream=True, extra_body={"steering": steering}))
    traced = [dict(event)["trace"] for event in events if event.type == "response.output_text.delta"]
    for one, other in zip([one for trace in traced for one in trace], dict(answer)["trace"], strict=True):
        assert one["token_id"] == other["token_id"]
        assert one["columns"][0]["gate"] == pytest.approx(other["columns"][0]["gate"], rel=1e-3)
    plain = client.responses.create(**rules)
    assert dict(plain)["steering"]["steered_tokens"] == 0


def test_fields_that_only_label_a_request_or_ask_for_nothing_pass(client: openai.OpenAI) -> None:
    plain = client.responses.create(input=QUESTION, **RULES)
    given = client.responses.create(
        input=QUESTION,
        **RULES,
        store=True,
        metadata={"a": "b"},
        user="u",
        prompt_cache_key="k",
        safety_identifier="s",
        service_tier="auto",
        parallel_tool_calls=True,
        tools=[],
        tool_choice="auto",
        truncation="disabled",
        include=[],
        background=False,
        previous_response_id=None,
        reasoning={"effort": "low"},
        text={"format": {"type": "text"}, "verbosity": "medium"},
        top_p=1,
    )
    assert given.output_text == plain.output_text


@pytest.mark.parametrize(
    ("extra", "status", "param", "sentence"),
    [
        ({"previous_response_id": "resp_1"}, 400, "previous_response_id", "previous_response_id is not supported"),
        ({"conversation": "conv_1"}, 400, "conversation", "not supported"),
        ({"background": True}, 400, "background", "not supported"),
        ({"prompt": {"id": "p"}}, 400, "prompt", "not supported"),
        ({"tools": [{"type": "web_search"}]}, 400, "tools", "not supported"),
        ({"text": {"format": {"type": "json_object"}}}, 400, "text", "not supported"),
        ({"truncation": "auto"}, 400, "truncation", "not supported"),
        ({"max_tokens": 5}, 400, "max_tokens", "'max_output_tokens' does it here"),
        ({"n": 2}, 422, "n", "less than or equal to 1"),
        ({"model": "gpt-4"}, 404, "model", "no model 'gpt-4'"),
        ({"max_output_tokens": 0}, 422, "max_output_tokens", "greater than or equal to 1"),
        ({"input": ""}, 422, "input", "must not be empty"),
        ({"input": 5}, 422, "input", "a string or a list of items"),
        ({"input": [{"role": "user"}]}, 422, "input.0", "needs 'content'"),
        ({"input": [{"type": "reasoning", "summary": []}]}, 422, "input.0.", "message"),
        ({"input": [{"type": "function_call_output", "output": "a"}]}, 422, "input.0", "needs 'call_id'"),
        ({"input": [{"role": "user", "content": [{"type": "input_image"}]}]}, 422, "input.0.content.0", "input_text"),
        ({"input": "word " * 200}, 400, "input", "maximum context length is 96 tokens"),
        ({"input": [{"rol": "user", "content": "a"}]}, 400, "input.0.rol", "did you mean 'role'"),
    ],
)
def test_what_is_wrong_is_named(
    client: openai.OpenAI, extra: dict[str, Any], status: int, param: str, sentence: str
) -> None:
    for stream in (False, True):
        with pytest.raises(openai.APIStatusError, match=sentence) as failure:
            client.responses.create(**{**RULES, "input": QUESTION}, stream=stream, extra_body=extra)
        assert failure.value.status_code == status
        assert str(failure.value.param).startswith(param)


def test_an_error_in_a_stream_is_its_last_event(fresh: World, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any) -> Any:
        raise NotFinite("The model's output is not finite.")

    monkeypatch.setattr(fresh.service, "_result", broken)
    body = {"model": "demo", "input": "a", "stream": True, "max_output_tokens": 2}
    frames = fresh.client.post("/v1/responses", json=body).text.strip().split("\n\n")
    assert frames[-1].startswith("event: error\n")
    http = openai.OpenAI(base_url=f"{fresh.client.base_url}/v1", api_key="x", http_client=fresh.client)
    with pytest.raises(openai.APIError, match="not finite") as failure:
        list(http.responses.create(model="demo", input="a", stream=True, max_output_tokens=2))
    assert failure.value.code == "not_finite"
