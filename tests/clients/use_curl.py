"""curl: plain HTTP, read with the standard library alone."""

import json
import subprocess

from checks import ASKED, BASE, LONG, SAMPLING, STEERED, TURNS, URL, ask, check, differ, run, said, same

JSON = "Content-Type: application/json"


def curl(path: str, *options: str, **body) -> str:
    """What curl prints."""
    data = ("-H", JSON, "-d", json.dumps(body)) if body else ()
    return subprocess.run(
        ["curl", "-sS", *options, f"{URL}{path}", *data], capture_output=True, text=True, check=True
    ).stdout


def chat_completion(messages=ASKED, model=BASE, **fields) -> dict:
    return json.loads(curl("/v1/chat/completions", model=model, messages=messages, **SAMPLING | fields))


def text(*args, **fields) -> str:
    return chat_completion(*args, **fields)["choices"][0]["message"]["content"]


@check("chat")
def chat() -> None:
    same(text(), said())


@check("stream")
def stream() -> None:
    printed = curl("/v1/chat/completions", "-N", model=BASE, messages=ASKED, stream=True, **SAMPLING)
    events = [line.removeprefix("data: ") for line in printed.splitlines() if line]
    same(events[-1], "[DONE]")
    pieces = [json.loads(event)["choices"][0]["delta"].get("content") or "" for event in events[:-1]]
    same("".join(pieces), said())


@check("turns")
def turns() -> None:
    same(text(TURNS), said(TURNS))


@check("stop")
def stop() -> None:
    same(text(stop="capital"), said(stop=["capital"]))
    differ(text(stop="capital"), said())


@check("steering")
def steering() -> None:
    same(text(model=STEERED), said(model=STEERED))
    differ(text(model=STEERED), said())
    differ(text(steering={"attributes": {"civility": -1}}), said())


@check("usage")
def usage() -> None:
    same(chat_completion()["usage"], ask()["usage"])


@check("wrong model")
def wrong_model() -> None:
    same(chat_completion(model="nope")["error"]["code"], "model_not_found")
    body = ("-H", JSON, "-d", json.dumps({"model": "nope", "messages": ASKED}))
    failed = subprocess.run(["curl", "-sS", "--fail", f"{URL}/v1/chat/completions", *body], capture_output=True)
    same((failed.returncode, b"404" in failed.stderr), (22, True))


@check("too long")
def too_long() -> None:
    same(chat_completion([{"role": "user", "content": LONG}])["error"]["code"], "context_length_exceeded")


@check("both arms")
def both_arms() -> None:
    answer = json.loads(curl("/generate", messages=ASKED, baseline=True, seed=1, max_new_tokens=40))
    same((answer["results"][0]["text"], answer["baseline"][0]["text"]), (said(model=STEERED), said()))


@check("a body without Content-Type is refused")
def content_type() -> None:
    answer = json.loads(curl("/v1/chat/completions", "-d", json.dumps({"model": BASE, "messages": ASKED})))
    assert "Content-Type" in answer["error"]["message"], answer


run()
