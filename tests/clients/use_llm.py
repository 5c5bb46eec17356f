"""Simon Willison's llm: its command, and its Python API, which know the server by extra-openai-models.yaml."""

import os
import subprocess
from pathlib import Path
from tempfile import mkdtemp

from checks import BASE, LONG, QUESTION, STEERED, TURNS, V1, ask, check, differ, raises, run, said, same

os.environ["LLM_USER_PATH"] = mkdtemp()  # before llm reads it
MODELS = "".join(f"- model_id: {name}\n  model_name: {name}\n  api_base: {V1}\n" for name in (BASE, STEERED, "nope"))
(Path(os.environ["LLM_USER_PATH"]) / "extra-openai-models.yaml").write_text(MODELS)

import llm  # noqa: E402
import openai  # noqa: E402

SAMPLING = {"temperature": 1.0, "seed": 1, "max_tokens": 40}
OPTIONS = [word for name, value in SAMPLING.items() for word in ("-o", name, str(value))]


def prompt(text: str = QUESTION, model: str = BASE, **fields):
    return llm.get_model(model).prompt(text, key="none", **SAMPLING | fields)


@check("chat")
def chat() -> None:
    same(prompt(stream=False).text(), said())


@check("stream")
def stream() -> None:
    pieces = list(prompt())
    same("".join(pieces), said())
    assert len(pieces) > 2, pieces


@check("turns")
def turns() -> None:
    conversation = llm.get_model(BASE).conversation()
    first = conversation.prompt(QUESTION, key="none", **SAMPLING).text()
    spoken = [TURNS[0], {"role": "assistant", "content": first}, TURNS[2]]
    same(conversation.prompt(TURNS[2]["content"], key="none", **SAMPLING).text(), said(spoken))


@check("stop")
def stop() -> None:
    same(prompt(stop="capital").text(), said(stop=["capital"]))
    differ(said(stop=["capital"]), said())


@check("steering")
def steering() -> None:
    same(prompt(model=STEERED).text(), said(model=STEERED))
    differ(said(model=STEERED), said())


@check("usage")
def usage() -> None:
    expected = ask()["usage"]
    for streamed in (False, True):
        used = prompt(stream=streamed).usage()
        same((used.input, used.output), (expected["prompt_tokens"], expected["completion_tokens"]))


@check("wrong model")
def wrong_model() -> None:
    with raises(openai.NotFoundError, "There is no model 'nope'"):
        prompt(model="nope").text()


@check("too long")
def too_long() -> None:
    with raises(openai.BadRequestError, "maximum context length"):
        prompt(LONG).text()


@check("the command, with a system prompt")
def command() -> None:
    given = ["llm", "-m", STEERED, "-s", "Be brief.", *OPTIONS, QUESTION]
    printed = subprocess.run(given, capture_output=True, text=True, check=True).stdout
    same(printed.rstrip("\n"), said([{"role": "system", "content": "Be brief."}, TURNS[0]], STEERED))


@check("llm openai endpoint, also with the responses API")
def endpoint() -> None:
    start = ["llm", "openai", "endpoint", V1]
    listed = subprocess.run([*start, "--models"], capture_output=True, text=True, check=True).stdout.split()
    assert {BASE, f"{STEERED}@v1"} <= set(listed), listed
    printed = subprocess.run([*start, "-m", BASE, *OPTIONS, QUESTION], capture_output=True, text=True, check=True)
    same(printed.stdout.rstrip("\n"), said())
    given = [*start, "--responses", "-m", STEERED, "-o", "temperature", "0", QUESTION]
    printed = subprocess.run(given, capture_output=True, text=True, check=True)
    same(printed.stdout.rstrip("\n"), said(model=STEERED, temperature=0))


run()
