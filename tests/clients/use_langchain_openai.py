"""LangChain's ChatOpenAI and OpenAI."""

import openai
from checks import ASKED, BASE, LONG, QUESTION, STEERED, TURNS, V1, ask, check, differ, raises, run, said, same
from langchain_core.exceptions import ContextOverflowError
from langchain_core.output_parsers import StrOutputParser
from langchain_core.prompts import ChatPromptTemplate
from langchain_openai import ChatOpenAI, OpenAI


def chat_model(model: str = BASE, **fields) -> ChatOpenAI:
    fields = {"temperature": 1.0, "seed": 1, "max_tokens": 40, "max_retries": 0} | fields
    return ChatOpenAI(model=model, base_url=V1, api_key="none", **fields)


@check("chat")
async def chat() -> None:
    same(chat_model().invoke(QUESTION).content, said())
    same((await chat_model().ainvoke(QUESTION)).content, said())


@check("stream")
async def stream() -> None:
    pieces = [chunk.content for chunk in chat_model().stream(QUESTION)]
    same("".join(pieces), said())
    assert len(pieces) > 2, pieces
    same("".join([chunk.content async for chunk in chat_model().astream(QUESTION)]), said())


@check("turns")
def turns() -> None:
    same(chat_model().invoke([(turn["role"], turn["content"]) for turn in TURNS]).content, said(TURNS))


@check("stop")
def stop() -> None:
    same(chat_model().invoke(QUESTION, stop=["capital"]).content, said(stop=["capital"]))
    differ(said(stop=["capital"]), said())


@check("steering")
def steering() -> None:
    same(chat_model(STEERED).invoke(QUESTION).content, said(model=STEERED))
    asked = {"steering": {"attributes": {"civility": -1}}}
    same(chat_model(extra_body=asked).invoke(QUESTION).content, said(**asked))
    differ(said(**asked), said())
    differ(said(model=STEERED), said())


@check("usage")
def usage() -> None:
    expected = ask()["usage"]["total_tokens"]
    same(chat_model().invoke(QUESTION).usage_metadata["total_tokens"], expected)
    whole = None
    for chunk in chat_model(stream_usage=True).stream(QUESTION):
        whole = chunk if whole is None else whole + chunk
    same(whole.usage_metadata["total_tokens"], expected)


@check("wrong model")
def wrong_model() -> None:
    with raises(openai.NotFoundError, "There is no model 'nope'"):
        chat_model("nope").invoke(QUESTION)


@check("too long")
def too_long() -> None:
    with raises(ContextOverflowError, "maximum context length"):
        chat_model().invoke(LONG)


@check("chains and batches")
def chains() -> None:
    chain = ChatPromptTemplate.from_messages([("user", "{question}")]) | chat_model(STEERED) | StrOutputParser()
    same(chain.batch([{"question": QUESTION}] * 2), [said(model=STEERED)] * 2)


@check("the responses API")
def responses() -> None:
    model = ChatOpenAI(
        model=BASE,
        base_url=V1,
        api_key="none",
        use_responses_api=True,
        temperature=1.0,
        max_tokens=40,
        extra_body={"seed": 1},
    )
    same(model.invoke(ASKED).text, said())
    same("".join(chunk.text for chunk in model.stream(ASKED)), said())


@check("completions")
def completions() -> None:
    model = OpenAI(model=STEERED, base_url=V1, api_key="none", temperature=1.0, seed=1, max_tokens=40)
    answer = model.invoke("Q: Is grass green? A:")
    assert answer.strip(), answer
    same("".join(model.stream("Q: Is grass green? A:")), answer)


@check("structured output is refused by name")
def structured_output() -> None:
    with raises(openai.BadRequestError, "not supported"):
        chat_model().with_structured_output({"title": "A", "type": "object", "properties": {}}).invoke(QUESTION)


run()
