"""litellm: the provider `hosted_vllm`, and `openai/` with `api_base`."""

import litellm
from checks import ASKED, BASE, LONG, SAMPLING, STEERED, TURNS, V1, ask, check, differ, raises, run, said, same

PROVIDERS = ("openai", "hosted_vllm")
litellm.suppress_debug_info = True


def complete(messages=ASKED, model=BASE, provider="openai", **fields):
    fields = {"api_base": V1, "api_key": "none", "max_retries": 0} | SAMPLING | fields
    return litellm.completion(model=f"{provider}/{model}", messages=messages, **fields)


def text(*args, **fields) -> str:
    return complete(*args, **fields).choices[0].message.content


@check("chat")
async def chat() -> None:
    for provider in PROVIDERS:
        same(text(provider=provider), said())
    answer = await litellm.acompletion(model=f"openai/{BASE}", messages=ASKED, api_base=V1, api_key="none", **SAMPLING)
    same(answer.choices[0].message.content, said())


@check("stream")
def stream() -> None:
    for provider in PROVIDERS:
        pieces = [chunk.choices[0].delta.content or "" for chunk in complete(provider=provider, stream=True)]
        same("".join(pieces), said())
        assert len(pieces) > 2, pieces


@check("turns")
def turns() -> None:
    same(text(TURNS), said(TURNS))


@check("stop")
def stop() -> None:
    choice = complete(stop=["capital"]).choices[0]
    same((choice.message.content, choice.finish_reason), (said(stop=["capital"]), "stop"))
    differ(choice.message.content, said())


@check("steering")
def steering() -> None:
    asked = {"steering": {"attributes": {"civility": -1}}}
    for provider in PROVIDERS:
        same(text(model=STEERED, provider=provider), said(model=STEERED))
        same(text(provider=provider, extra_body=asked), said(**asked))
    differ(said(model=STEERED), said())
    differ(said(**asked), said())


@check("usage")
def usage() -> None:
    expected = ask()["usage"]["total_tokens"]
    same(complete().usage.total_tokens, expected)
    *_, last = complete(stream=True, stream_options={"include_usage": True})
    same(last.usage.total_tokens, expected)


@check("wrong model")
def wrong_model() -> None:
    for provider in PROVIDERS:
        with raises(litellm.NotFoundError, "There is no model 'nope'"):
            complete(model="nope", provider=provider)


@check("too long")
def too_long() -> None:
    for provider in PROVIDERS:
        with raises(litellm.ContextWindowExceededError, "maximum context length"):
            complete([{"role": "user", "content": LONG}], provider=provider)


@check("text completion")
def text_completion() -> None:
    answer = litellm.text_completion(
        model=f"text-completion-openai/{STEERED}",
        prompt="Q: Is grass green? A:",
        api_base=V1,
        api_key="none",
        **SAMPLING,
    )
    assert answer.choices[0].text.strip(), answer


@check("the router falls back to a steered model")
def router() -> None:
    def deployment(name: str, model: str) -> dict:
        return {"model_name": name, "litellm_params": {"model": f"openai/{model}", "api_base": V1, "api_key": "none"}}

    deployments = [deployment("first", "nope"), deployment("second", STEERED)]
    routed = litellm.Router(model_list=deployments, fallbacks=[{"first": ["second"]}], num_retries=0)
    same(routed.completion(model="first", messages=ASKED, **SAMPLING).choices[0].message.content, said(model=STEERED))


run()
