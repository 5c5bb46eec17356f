"""OpenAI's own client: both APIs, blocking and asynchronous."""

import openai
from checks import (
    ASKED,
    BASE,
    LONG,
    QUESTION,
    SAMPLING,
    STEERED,
    TURNS,
    V1,
    ask,
    check,
    differ,
    raises,
    run,
    said,
    same,
)

client = openai.OpenAI(base_url=V1, api_key="none", max_retries=0)


def create(messages=ASKED, model=BASE, **fields):
    return client.chat.completions.create(model=model, messages=messages, **SAMPLING | fields)


@check("chat")
def chat() -> None:
    same(create().choices[0].message.content, said())


@check("stream")
async def stream() -> None:
    pieces = [chunk.choices[0].delta.content or "" for chunk in create(stream=True)]
    same("".join(pieces), said())
    assert len(pieces) > 2, pieces
    other = openai.AsyncOpenAI(base_url=V1, api_key="none")
    again = await other.chat.completions.create(model=BASE, messages=ASKED, stream=True, **SAMPLING)
    same("".join([chunk.choices[0].delta.content or "" async for chunk in again]), said())
    await other.close()


@check("turns")
def turns() -> None:
    same(create(TURNS).choices[0].message.content, said(TURNS))


@check("stop")
def stop() -> None:
    choice = create(stop=["capital"]).choices[0]
    same((choice.message.content, choice.finish_reason), (said(stop=["capital"]), "stop"))
    differ(choice.message.content, said())


@check("steering")
def steering() -> None:
    same(create(model=STEERED).choices[0].message.content, said(model=STEERED))
    differ(said(model=STEERED), said())
    asked = {"steering": {"attributes": {"civility": -1}}}
    answer = create(extra_body=asked).choices[0]
    same(answer.message.content, said(**asked))
    same(answer.steering["attributes"]["civility"], -1.0)  # what the server adds to the choice is there


@check("usage")
def usage() -> None:
    expected = ask()["usage"]
    same(create().usage.total_tokens, expected["total_tokens"])
    *_, last = create(stream=True, stream_options={"include_usage": True})
    same((last.usage.prompt_tokens, last.usage.completion_tokens, last.choices), (*list(expected.values())[:2], []))


@check("wrong model")
def wrong_model() -> None:
    with raises(openai.NotFoundError, "There is no model 'nope'") as raised:
        create(model="nope")
    same(raised[0].code, "model_not_found")


@check("too long")
def too_long() -> None:
    with raises(openai.BadRequestError, "maximum context length") as raised:
        create([{"role": "user", "content": LONG}])
    same(raised[0].code, "context_length_exceeded")


@check("completions")
def completions() -> None:
    prompts = ["Q: Is grass green? A:", "Q: Is the sky red? A:"]
    answer = client.completions.create(model=STEERED, prompt=prompts, logprobs=1, **SAMPLING)
    same([choice.index for choice in answer.choices], [0, 1])
    pieces = client.completions.create(model=STEERED, prompt=prompts[0], stream=True, **SAMPLING)
    same("".join(piece.choices[0].text for piece in pieces), answer.choices[0].text)


@check("responses")
def responses() -> None:
    fields = {"temperature": 1.0, "max_output_tokens": 40, "extra_body": {"seed": 1}}
    same(client.responses.create(model=BASE, input=QUESTION, **fields).output_text, said())
    with client.responses.stream(model=STEERED, input=QUESTION, **fields) as events:
        deltas = [event.delta for event in events if event.type == "response.output_text.delta"]
        same(events.get_final_response().output_text, said(model=STEERED))
    same("".join(deltas), said(model=STEERED))


@check("models")
def models() -> None:
    names = {model.id for model in client.models.list()}
    assert {BASE, f"{STEERED}@v1"} <= names, names
    same(client.models.retrieve(STEERED).id, STEERED)


@check("the stream helper")
def stream_helper() -> None:
    with client.chat.completions.stream(model=BASE, messages=ASKED, **SAMPLING) as events:
        same(events.get_final_completion().choices[0].message.content, said())


@check("structured output is refused by name")
def structured_output() -> None:
    with raises(openai.BadRequestError, "response_format is not supported"):
        create(response_format={"type": "json_object"})
    with raises(openai.BadRequestError, "tools is not supported"):
        create(tools=[{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}])


run()
