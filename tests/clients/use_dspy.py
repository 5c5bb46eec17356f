"""DSPy: the language model by itself, and modules."""

import dspy
from checks import BASE, LONG, QUESTION, STEERED, TURNS, V1, ask, check, differ, raises, run, said, same
from dspy.utils.exceptions import AdapterParseError, ContextWindowExceededError, LMUnsupportedModelError

CIVIL = "You are civil."


def lm(model: str = BASE, **fields) -> dspy.LM:
    fields = {"temperature": 1.0, "seed": 1, "max_tokens": 40, "num_retries": 0, "cache": False} | fields
    return dspy.LM(f"openai/{model}", api_base=V1, api_key="none", **fields)


class Plain(dspy.Adapter):
    """The question and the answer alone: the demo model does not write the fields that DSPy's own adapters ask for."""

    def format(self, signature, demos, inputs):
        return [{"role": "system", "content": CIVIL}, {"role": "user", "content": inputs["question"]}]

    def parse(self, signature, completion):
        return {"answer": completion}


TOLD = [{"role": "system", "content": CIVIL}, TURNS[0]]


@check("chat")
async def chat() -> None:
    same(lm()(QUESTION), [said()])
    same(await lm().acall(QUESTION), [said()])


@check("stream")
async def stream() -> None:
    with dspy.context(lm=lm(STEERED), adapter=Plain()):
        chunks = [chunk async for chunk in dspy.streamify(dspy.Predict("question -> answer"))(question=QUESTION)]
    assert isinstance(chunks[-1], dspy.Prediction), chunks
    pieces = [chunk.choices[0].delta.content or "" for chunk in chunks[:-1] if chunk.choices]
    same(("".join(pieces), chunks[-1].answer), (said(TOLD, STEERED), said(TOLD, STEERED)))
    assert len(pieces) > 2, pieces


@check("turns")
def turns() -> None:
    same(lm()(messages=TURNS), [said(TURNS)])


@check("stop")
def stop() -> None:
    same(lm()(QUESTION, stop=["capital"]), [said(stop=["capital"])])
    differ(said(stop=["capital"]), said())


@check("steering")
def steering() -> None:
    same(lm(STEERED)(QUESTION), [said(model=STEERED)])
    asked = {"steering": {"attributes": {"civility": -1}}}
    same(lm(extra_body=asked)(QUESTION), [said(**asked)])
    differ(said(**asked), said())
    differ(said(model=STEERED), said())


@check("usage")
def usage() -> None:
    one = lm()
    one(QUESTION)
    same(one.history[-1]["usage"]["total_tokens"], ask()["usage"]["total_tokens"])


@check("wrong model")
def wrong_model() -> None:
    with raises(LMUnsupportedModelError, "There is no model 'nope'"):
        lm("nope")(QUESTION)


@check("too long")
def too_long() -> None:
    with raises(ContextWindowExceededError, "maximum context length"):
        lm()(LONG)


@check("modules with an adapter of their own")
def modules() -> None:
    with dspy.context(lm=lm(), adapter=Plain()):
        same(dspy.Predict("question -> answer")(question=QUESTION).answer, said(TOLD))


@check("DSPy's own adapters, as far as the demo can follow them")
def own_adapters() -> None:
    for adapter in (dspy.ChatAdapter(), dspy.JSONAdapter()):
        with dspy.context(lm=lm(STEERED), adapter=adapter), raises(AdapterParseError, "LM Response"):
            dspy.Predict("question -> answer")(question=QUESTION)  # it answers, in no fields


run()
