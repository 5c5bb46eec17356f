"""Haystack: OpenAIChatGenerator, OpenAIGenerator and a pipeline."""

import openai
from checks import ASKED, BASE, LONG, QUESTION, STEERED, TURNS, V1, ask, check, differ, raises, run, said, same
from haystack import Pipeline
from haystack.components.builders import ChatPromptBuilder
from haystack.components.generators.chat import OpenAIChatGenerator
from haystack.dataclasses import ChatMessage
from haystack.utils import Secret


def generator(model: str = BASE, streaming_callback=None, **fields) -> OpenAIChatGenerator:
    fields = {"temperature": 1.0, "seed": 1, "max_tokens": 40} | fields
    return OpenAIChatGenerator(
        Secret.from_token("none"), model, streaming_callback, V1, generation_kwargs=fields, max_retries=0
    )


def messages(turns: list[dict] = ASKED) -> list[ChatMessage]:
    kinds = {"user": ChatMessage.from_user, "assistant": ChatMessage.from_assistant}
    return [kinds[turn["role"]](turn["content"]) for turn in turns]


def text(model: str = BASE, turns: list[dict] = ASKED, **fields) -> str:
    return generator(model, **fields).run(messages(turns))["replies"][0].text


@check("chat")
async def chat() -> None:
    same(text(), said())
    same((await generator().run_async(messages()))["replies"][0].text, said())


@check("stream")
def stream() -> None:
    pieces: list[str] = []
    answer = generator(BASE, lambda chunk: pieces.append(chunk.content)).run(messages())["replies"][0].text
    same(("".join(pieces), answer), (said(), said()))
    assert len(pieces) > 2, pieces


@check("turns")
def turns() -> None:
    same(text(turns=TURNS), said(TURNS))


@check("stop")
def stop() -> None:
    same(text(stop=["capital"]), said(stop=["capital"]))
    differ(said(stop=["capital"]), said())


@check("steering")
def steering() -> None:
    same(text(STEERED), said(model=STEERED))
    asked = {"steering": {"attributes": {"civility": -1}}}
    same(text(extra_body=asked), said(**asked))
    differ(said(**asked), said())
    differ(said(model=STEERED), said())


@check("usage")
def usage() -> None:
    expected = ask()["usage"]
    same(generator().run(messages())["replies"][0].meta["usage"]["total_tokens"], expected["total_tokens"])


@check("wrong model")
def wrong_model() -> None:
    with raises(openai.NotFoundError, "There is no model 'nope'"):
        text("nope")


@check("too long")
def too_long() -> None:
    with raises(openai.BadRequestError, "maximum context length"):
        text(turns=[{"role": "user", "content": LONG}])


@check("a pipeline")
def pipeline() -> None:
    line = Pipeline()
    line.add_component("prompt", ChatPromptBuilder([ChatMessage.from_user("What is the capital of {{country}}?")]))
    line.add_component("model", generator(STEERED))
    line.connect("prompt.prompt", "model.messages")
    answer = line.run({"prompt": {"country": "Japan"}})["model"]["replies"][0].text
    same(answer, said([{"role": "user", "content": QUESTION}], STEERED))


run()
