"""pydantic-ai: agents that answer in text."""

from checks import BASE, LONG, QUESTION, STEERED, TURNS, V1, ask, check, differ, raises, run, said, same
from pydantic import BaseModel
from pydantic_ai import Agent, ModelHTTPError, PromptedOutput, TextOutput
from pydantic_ai.exceptions import ModelContextWindowExceededError, ModelNotFoundError, UnexpectedModelBehavior
from pydantic_ai.models.openai import OpenAIChatModel, OpenAIResponsesModel
from pydantic_ai.profiles.openai import OpenAIModelProfile
from pydantic_ai.providers.openai import OpenAIProvider

provider = OpenAIProvider(base_url=V1, api_key="none")


class City(BaseModel):
    name: str


def words(text: str) -> list[str]:
    return text.split()


def agent(model: str = BASE, kind=OpenAIChatModel, output_type=str, profile=None, **settings) -> Agent:
    settings = {"temperature": 1.0, "seed": 1, "max_tokens": 40} | settings
    one = kind(model, provider=provider, profile=profile)
    return Agent(one, output_type=output_type, model_settings=settings, retries=0)


@check("chat")
async def chat() -> None:
    same((await agent().run(QUESTION)).output, said())


@check("stream")
async def stream() -> None:
    async with agent().run_stream(QUESTION) as result:
        pieces = [piece async for piece in result.stream_text(delta=True, debounce_by=None)]
    same("".join(pieces), said())
    assert len(pieces) > 2, pieces


@check("turns")
async def turns() -> None:
    first = await agent(STEERED).run(QUESTION)
    second = await agent().run(TURNS[2]["content"], message_history=first.all_messages())
    same(second.output, said([TURNS[0], {"role": "assistant", "content": first.output}, TURNS[2]]))


@check("stop")
async def stop() -> None:
    same((await agent(stop_sequences=["capital"]).run(QUESTION)).output, said(stop=["capital"]))
    differ(said(stop=["capital"]), said())


@check("steering")
async def steering() -> None:
    same((await agent(STEERED).run(QUESTION)).output, said(model=STEERED))
    asked = {"steering": {"attributes": {"civility": -1}}}
    same((await agent(extra_body=asked).run(QUESTION)).output, said(**asked))
    differ(said(**asked), said())
    differ(said(model=STEERED), said())


@check("usage")
async def usage() -> None:
    expected = ask()["usage"]
    used = (await agent().run(QUESTION)).usage
    same((used.input_tokens, used.output_tokens), (expected["prompt_tokens"], expected["completion_tokens"]))


@check("wrong model")
async def wrong_model() -> None:
    with raises(ModelNotFoundError, "There is no model 'nope'"):
        await agent("nope").run(QUESTION)


@check("too long")
async def too_long() -> None:
    with raises(ModelContextWindowExceededError, "maximum context length"):
        await agent().run(LONG)


@check("instructions")
async def instructions() -> None:
    told = "Be brief."
    result = await agent().run(QUESTION, instructions=told)
    same(result.output, said([{"role": "system", "content": told}, TURNS[0]]))


@check("output types in words")
async def output_in_words() -> None:
    same((await agent(output_type=TextOutput(words)).run(QUESTION)).output, words(said()))
    profile = OpenAIModelProfile(supports_json_object_output=False)
    with raises(UnexpectedModelBehavior, "output retries"):  # the request is taken; the demo model writes no JSON
        await agent(output_type=PromptedOutput(City), profile=profile).run(QUESTION)


@check("the responses API")
async def responses() -> None:
    one = agent(STEERED, OpenAIResponsesModel, extra_body={"seed": 1})
    same((await one.run(QUESTION)).output, said(model=STEERED))


@check("tools and output types are refused by name")
async def tools_and_types() -> None:
    with raises(ModelHTTPError, "tools is not supported"):
        await agent(output_type=City).run(QUESTION)
    one = agent()
    one.tool_plain(lambda: 1, name="one")
    with raises(ModelHTTPError, "tools is not supported"):
        await one.run(QUESTION)


run()
