"""What the clients' scripts share: the server's address, what plain HTTP answers, and how a check is told.

Runs in every client's own environment, so it imports nothing but the standard library.
"""

import asyncio
import inspect
import json
import os
import traceback
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

URL = os.environ.get("MATSTEER_URL", "http://127.0.0.1:8000")
V1 = f"{URL}/v1"
BASE, STEERED = "demo-model", "demo"  # the base model, and the checkpoint that steers it
COLUMNS = ("chat", "stream", "turns", "stop", "steering", "usage", "wrong model", "too long")
QUESTION = "What is the capital of Japan?"
ASKED = [{"role": "user", "content": QUESTION}]
TURNS = [*ASKED, {"role": "assistant", "content": "The capital of Japan is Tokyo."}]
TURNS += [{"role": "user", "content": "What is the capital of France?"}]
LONG = "What is grass? " * 300  # more tokens than the demo model has room for
SAMPLING: dict[str, Any] = {"temperature": 1.0, "seed": 1, "max_tokens": 40}  # the base model's answer is a lie

_checks: dict[str, Callable[[], Any]] = {}
_reasons: dict[str, str] = {}


def check(name: str) -> Callable[[Callable[[], Any]], Callable[[], Any]]:
    """Names a function, plain or asynchronous, that fails by raising. `name`: one of COLUMNS, or something of the
    client's own."""

    def add(function: Callable[[], Any]) -> Callable[[], Any]:
        _checks[name] = function
        return function

    return add


def not_possible(name: str, why: str) -> None:
    """The client has no way to ask for it."""
    _reasons[name] = why


@contextmanager
def raises(kind: type[Exception], *words: str) -> Iterator[list[Exception]]:
    """The client raises this class and no other, with these words of the server in it. Afterwards the list has it."""
    raised: list[Exception] = []
    try:
        yield raised
    except kind as error:
        raised.append(error)
    assert raised, f"{kind.__name__} is not raised"
    missing = [word for word in words if word not in _said(raised[0])]
    assert not missing, f"{type(raised[0]).__name__} does not say {missing}: {raised[0]}"


def ask(messages: list[dict[str, Any]] = ASKED, model: str = BASE, **fields: Any) -> dict[str, Any]:
    """What plain HTTP answers: the body of a chat completion."""
    body = json.dumps({"model": model, "messages": messages} | SAMPLING | fields).encode()
    request = urllib.request.Request(f"{V1}/chat/completions", body, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request) as response:
        answer: dict[str, Any] = json.load(response)
    return answer


def said(messages: list[dict[str, Any]] = ASKED, model: str = BASE, **fields: Any) -> str:
    """The text of it."""
    text: str = ask(messages, model, **fields)["choices"][0]["message"]["content"]
    return text


def same(given: Any, expected: Any) -> None:
    assert given == expected, f"{given!r} instead of {expected!r}"


def differ(one: Any, other: Any) -> None:
    assert one != other, f"twice {one!r}"


def run() -> None:
    """All checks, each with a line of JSON."""
    for name in COLUMNS:
        assert (name in _checks) != (name in _reasons), f"nothing is said about {name!r}"
    for name, why in _reasons.items():
        print(json.dumps({"check": name, "result": "not possible", "why": why}), flush=True)
    with asyncio.Runner() as loop:  # one for all: clients keep connections that belong to it
        for name, function in _checks.items():
            result = {"check": name, "result": "passed", "why": ""}
            try:
                outcome = function()
                if inspect.iscoroutine(outcome):
                    loop.run(outcome)
            except BaseException as error:
                traceback.print_exc()
                result |= {"result": "failed", "why": f"{type(error).__name__}: {error}"[:300]}
            print(json.dumps(result), flush=True)


def _said(error: BaseException | None) -> str:
    """The words of an exception and of what caused it."""
    return "" if error is None else f"{error} {_said(error.__cause__)}"
