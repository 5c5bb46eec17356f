"""AutoGen: the model client, an agent, and a team."""

import openai
from autogen_agentchat.agents import AssistantAgent
from autogen_agentchat.base import TaskResult
from autogen_agentchat.conditions import MaxMessageTermination
from autogen_agentchat.messages import ModelClientStreamingChunkEvent
from autogen_agentchat.teams import RoundRobinGroupChat
from autogen_core.models import AssistantMessage, UserMessage
from autogen_ext.models.openai import OpenAIChatCompletionClient
from checks import BASE, LONG, QUESTION, STEERED, TURNS, V1, ask, check, differ, raises, run, said, same

INFO = {"vision": False, "function_calling": False, "json_output": False, "structured_output": False}
CIVIL = "You are civil."


def model_client(model: str = BASE, **fields) -> OpenAIChatCompletionClient:
    fields = {"temperature": 1.0, "seed": 1, "max_tokens": 40, "max_retries": 0} | fields
    info = INFO | {"family": "unknown"}
    return OpenAIChatCompletionClient(model=model, base_url=V1, api_key="none", model_info=info, **fields)


def user(text: str) -> UserMessage:
    return UserMessage(content=text, source="user")


async def text(*messages, model: str = BASE, **fields) -> str:
    client = model_client(model, **fields)
    answer = await client.create(list(messages) or [user(QUESTION)])
    await client.close()
    return answer.content


@check("chat")
async def chat() -> None:
    same(await text(), said())


@check("stream")
async def stream() -> None:
    *pieces, last = [piece async for piece in model_client().create_stream([user(QUESTION)])]
    same(("".join(pieces), last.content), (said(), said()))
    assert len(pieces) > 2, pieces


@check("turns")
async def turns() -> None:
    answered = AssistantMessage(content=TURNS[1]["content"], source="assistant")
    same(await text(user(QUESTION), answered, user(TURNS[2]["content"])), said(TURNS))


@check("stop")
async def stop() -> None:
    same(await text(stop=["capital"]), said(stop=["capital"]))
    differ(said(stop=["capital"]), said())


@check("steering")
async def steering() -> None:
    same(await text(model=STEERED), said(model=STEERED))
    differ(said(model=STEERED), said())
    asked = {"steering": {"attributes": {"civility": -1}}}
    answer = await model_client().create([user(QUESTION)], extra_create_args={"extra_body": asked})
    same(answer.content, said(**asked))
    differ(said(**asked), said())


@check("usage")
async def usage() -> None:
    expected = ask()["usage"]
    client = model_client()
    used = (await client.create([user(QUESTION)])).usage
    same((used.prompt_tokens, used.completion_tokens), (expected["prompt_tokens"], expected["completion_tokens"]))
    *_, last = [piece async for piece in client.create_stream([user(QUESTION)], include_usage=True)]
    same(last.usage.prompt_tokens, expected["prompt_tokens"])


@check("wrong model")
async def wrong_model() -> None:
    with raises(openai.NotFoundError, "There is no model 'nope'"):
        await text(model="nope")


@check("too long")
async def too_long() -> None:
    with raises(openai.BadRequestError, "maximum context length"):
        await text(user(LONG))


@check("an agent, streamed")
async def agent() -> None:
    one = AssistantAgent("kind", model_client(STEERED), system_message=CIVIL, model_client_stream=True)
    expected = said([{"role": "system", "content": CIVIL}, TURNS[0]], STEERED)
    *events, last = [event async for event in one.run_stream(task=QUESTION)]
    assert isinstance(last, TaskResult), last
    same(last.messages[-1].content, expected)
    same("".join(event.content for event in events if isinstance(event, ModelClientStreamingChunkEvent)), expected)


@check("a team of a steered and an unsteered agent")
async def team() -> None:
    agents = [
        AssistantAgent(name, model_client(model), system_message=CIVIL)
        for name, model in (("kind", STEERED), ("plain", BASE))
    ]
    result = await RoundRobinGroupChat(agents, termination_condition=MaxMessageTermination(3)).run(task=QUESTION)
    same([message.source for message in result.messages], ["user", "kind", "plain"])
    first = said([{"role": "system", "content": CIVIL}, TURNS[0]], STEERED)
    same(result.messages[1].content, first)
    heard = [{"role": "system", "content": CIVIL}, TURNS[0], {"role": "user", "content": first}]
    same(result.messages[2].content, said(heard))


run()
