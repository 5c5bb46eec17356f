"""LlamaIndex: OpenAILike, for chat and for completions."""

import openai
from checks import ASKED, BASE, LONG, STEERED, TURNS, V1, ask, check, differ, raises, run, said, same
from llama_index.core import Settings
from llama_index.core.chat_engine import SimpleChatEngine
from llama_index.core.llms import ChatMessage
from llama_index.llms.openai_like import OpenAILike

PROMPT = "Q: Is grass green? A:"


def llm(model: str = BASE, *, chat: bool = True, extra: dict | None = None, **fields) -> OpenAILike:
    fields = {"temperature": 1.0, "max_tokens": 40, "max_retries": 0} | fields
    more = {"seed": 1} | ({"extra_body": extra} if extra else {})
    return OpenAILike(
        model=model,
        api_base=V1,
        api_key="none",
        is_chat_model=chat,
        context_window=512,
        additional_kwargs=more,
        **fields,
    )


def messages(turns: list[dict] = ASKED) -> list[ChatMessage]:
    return [ChatMessage(role=turn["role"], content=turn["content"]) for turn in turns]


@check("chat")
async def chat() -> None:
    same(llm().chat(messages()).message.content, said())
    same((await llm().achat(messages())).message.content, said())


@check("stream")
def stream() -> None:
    pieces = [piece.delta for piece in llm().stream_chat(messages())]
    same("".join(pieces), said())
    assert len(pieces) > 2, pieces


@check("turns")
def turns() -> None:
    same(llm().chat(messages(TURNS)).message.content, said(TURNS))


@check("stop")
def stop() -> None:
    same(llm().chat(messages(), stop=["capital"]).message.content, said(stop=["capital"]))
    differ(said(stop=["capital"]), said())


@check("steering")
def steering() -> None:
    same(llm(STEERED).chat(messages()).message.content, said(model=STEERED))
    asked = {"steering": {"attributes": {"civility": -1}}}
    same(llm(extra=asked).chat(messages()).message.content, said(**asked))
    differ(said(**asked), said())
    differ(said(model=STEERED), said())


@check("usage")
def usage() -> None:
    same(llm().chat(messages()).raw.usage.total_tokens, ask()["usage"]["total_tokens"])


@check("wrong model")
def wrong_model() -> None:
    with raises(openai.NotFoundError, "There is no model 'nope'"):
        llm("nope").chat(messages())


@check("too long")
def too_long() -> None:
    with raises(openai.BadRequestError, "maximum context length"):
        llm().chat(messages([{"role": "user", "content": LONG}]))


@check("completions")
def completions() -> None:
    answer = llm(STEERED, chat=False).complete(PROMPT).text
    assert answer.strip(), answer
    same("".join(piece.delta for piece in llm(STEERED, chat=False).stream_complete(PROMPT)), answer)


@check("a chat engine")
def chat_engine() -> None:
    Settings.llm = llm(STEERED)
    engine = SimpleChatEngine.from_defaults(llm=Settings.llm)
    same(engine.chat(ASKED[0]["content"]).response, said(model=STEERED))
    spoken = [*ASKED, {"role": "assistant", "content": said(model=STEERED)}, TURNS[2]]
    same(engine.chat(TURNS[2]["content"]).response, said(spoken, STEERED))


run()
