"""smolagents: the model by itself, and agents with it."""

import openai
from checks import ASKED, BASE, LONG, STEERED, TURNS, V1, ask, check, differ, raises, run, said, same
from smolagents import AgentGenerationError, ChatMessage, CodeAgent, OpenAIModel, ToolCallingAgent


def model(name: str = BASE, **fields) -> OpenAIModel:
    fields = {"temperature": 1.0, "seed": 1, "max_tokens": 40, "client_kwargs": {"max_retries": 0}} | fields
    return OpenAIModel(name, api_base=V1, api_key="none", **fields)


def messages(turns: list[dict] = ASKED) -> list[ChatMessage]:
    """As its agents send them: contents are lists of parts."""
    parts = [{"role": turn["role"], "content": [{"type": "text", "text": turn["content"]}]} for turn in turns]
    return [ChatMessage.from_dict(turn) for turn in parts]


@check("chat")
def chat() -> None:
    same(model().generate(messages()).content, said())


@check("stream")
def stream() -> None:
    pieces = [piece.content or "" for piece in model().generate_stream(messages())]
    same("".join(pieces), said())
    assert len(pieces) > 2, pieces


@check("turns")
def turns() -> None:
    same(model().generate(messages(TURNS)).content, said(TURNS))


@check("stop")
def stop() -> None:
    same(model().generate(messages(), stop_sequences=["capital"]).content, said(stop=["capital"]))
    differ(said(stop=["capital"]), said())


@check("steering")
def steering() -> None:
    same(model(STEERED).generate(messages()).content, said(model=STEERED))
    asked = {"steering": {"attributes": {"civility": -1}}}
    same(model(extra_body=asked).generate(messages()).content, said(**asked))
    differ(said(**asked), said())
    differ(said(model=STEERED), said())


@check("usage")
def usage() -> None:
    expected = ask()["usage"]
    used = model().generate(messages()).token_usage
    same((used.input_tokens, used.output_tokens), (expected["prompt_tokens"], expected["completion_tokens"]))


@check("wrong model")
def wrong_model() -> None:
    with raises(openai.NotFoundError, "There is no model 'nope'"):
        model("nope").generate(messages())


@check("too long")
def too_long() -> None:
    with raises(openai.BadRequestError, "maximum context length"):
        model().generate(messages([{"role": "user", "content": LONG}]))
    with raises(AgentGenerationError, "maximum context length"):  # its own prompt is longer than the demo's context
        CodeAgent([], model(), max_steps=1, verbosity_level=0).run(ASKED[0]["content"])


@check("a CodeAgent, streamed and whole")
def code_agent() -> None:
    for streamed in (False, True):
        agent = CodeAgent([], model(STEERED), max_steps=1, verbosity_level=0, stream_outputs=streamed)
        agent.prompt_templates["system_prompt"] = "Answer in code."  # the demo's context holds no more
        answer = agent.run(ASKED[0]["content"])
        step = agent.memory.steps[1]
        assert step.model_output.strip(), step  # the request was taken; the demo model writes no code
        assert isinstance(answer, str), answer
        assert answer.strip(), answer


@check("a ToolCallingAgent is refused by name")
def tool_calling_agent() -> None:
    agent = ToolCallingAgent([], model(), max_steps=1, verbosity_level=0)
    agent.prompt_templates["system_prompt"] = "Call a tool."
    with raises(AgentGenerationError, "tools is not supported"):
        agent.run(ASKED[0]["content"])


run()
