"""Answers, which may be long, are written beside the event loop."""

import asyncio
from typing import Any

import pytest
from pydantic import BaseModel

from server.api.openai import formatting as openai
from server.formatting import Formatter
from tests.server.conftest import World

CHAT: Any = [{"role": "user", "content": "a"}]


def on_a_loop() -> bool:
    try:
        return bool(asyncio.get_running_loop())
    except RuntimeError:
        return False


@pytest.mark.parametrize(
    ("path", "body", "kind"),
    [
        ("/generate", {"prompt": "a", "trace": True}, "GenerateResponse"),
        ("/generate", {"prompt": "a", "trace": True, "stream": True}, "GenerateResponse"),
        ("/compare", {"prompt": "a", "arms": [{"name": "one"}]}, "CompareResponse"),
        ("/score", {"prompt": "a", "continuations": ["b"]}, "ScoreResponse"),
        ("/v1/completions", {"model": "tiny", "prompt": "a", "logprobs": 2}, "Completion"),
        ("/v1/chat/completions", {"model": "tiny", "messages": CHAT}, "ChatCompletion"),
    ],
)
def test_no_route_writes_its_answer_on_the_event_loop(
    world: World, monkeypatch: pytest.MonkeyPatch, path: str, body: dict[str, Any], kind: str
) -> None:
    written: list[tuple[str, bool]] = []
    dump = BaseModel.model_dump_json

    def told(self: BaseModel, **options: Any) -> str:
        written.append((type(self).__name__, on_a_loop()))
        return dump(self, **options)

    monkeypatch.setattr(BaseModel, "model_dump_json", told)
    assert world.client.post(path, json=body).status_code == 200
    assert (kind, False) in written
    assert (kind, True) not in written


def test_neither_are_tokens_formatted_there_that_come_many_at_once(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: dict[str, bool] = {}

    def watch(owner: Any, name: str) -> None:
        real = getattr(owner, name)

        def call(*given: Any) -> Any:
            seen[name] = on_a_loop()
            return real(*given)

        monkeypatch.setattr(owner, name, call)

    watch(openai, "format_prompt")
    watch(openai.CompletionFormatter, "response")
    watch(Formatter, "generate_response")
    watch(Formatter, "score_response")
    echo = {"model": "tiny", "prompt": "ab", "logprobs": 2, "echo": True, "max_tokens": 2}
    for stream in (False, True):
        assert world.client.post("/v1/completions", json=echo | {"stream": stream}).status_code == 200
        assert world.client.post("/generate", json={"prompt": "a", "logprobs": 2, "stream": stream}).status_code == 200
        assert world.client.post("/score", json={"prompt": "a", "continuations": ["b"]}).status_code == 200
        names = {"format_prompt", "response", "generate_response", "score_response"} - (
            {"response"} if stream else set()
        )
        assert seen == dict.fromkeys(names, False)
        seen.clear()
