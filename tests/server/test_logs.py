"""A request is one line of the log, for people or for programs, and never says what was asked unless it is wanted."""

import io
import json
import logging
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import count
from typing import Any

import httpx
import pytest
from starlette.testclient import TestClient

from server.app import create_app
from server.config import Settings
from server.engine.engine import Engine
from server.errors import QueueFull
from server.logs import formatter
from tests.server.conftest import World, wait_until
from tests.server.test_listener import serving

PROMPT = "Q: What colour is grass? A:"


class Log:
    """What a server with these settings would have written."""

    def __init__(self, settings: Settings) -> None:
        self._out = io.StringIO()
        self.handler = logging.StreamHandler(self._out)
        self.handler.setFormatter(formatter(settings))

    @property
    def text(self) -> str:
        return self._out.getvalue()

    def requests(self) -> list[dict[str, Any]]:
        lines = [json.loads(line) for line in self.text.splitlines()]
        return [line for line in lines if "outcome" in line]

    def request(self) -> dict[str, Any]:
        """The one request that has ended, or will in a moment."""
        wait_until(lambda: bool(self.requests()))
        (line,) = self.requests()
        return line


@contextmanager
def logged(**settings: Any) -> Iterator[Log]:
    log, root, level = Log(Settings(**settings)), logging.getLogger(), logging.getLogger().level
    root.addHandler(log.handler)
    root.setLevel("INFO")
    try:
        yield log
    finally:
        root.removeHandler(log.handler)
        root.setLevel(level)


def test_a_generation_is_one_object_with_all_that_is_known_of_it(world: World) -> None:
    with logged(log_format="json") as log:
        response = world.client.post(
            "/generate",
            json={"prompt": PROMPT, "n": 2, "baseline": True, "max_new_tokens": 5, "ignore_eos": True},
            headers={"X-Request-Id": "mine-1"},
        )
    line, answer = log.request(), response.json()
    assert line["request_id"] == "mine-1" == response.headers["x-request-id"]
    assert (line["method"], line["path"], line["route"]) == ("POST", "/generate", "/generate")
    assert (line["status"], line["outcome"], line["client"]) == (200, "ok", "testclient")
    assert (line["model"], line["checkpoints"], line["arms"]) == ("tiny", ["demo@2"], ["steered", "baseline"])
    assert line["prompt_tokens"] == answer["results"][0]["usage"]["prompt_tokens"]
    assert line["completion_tokens"] == 4 * 5
    assert 0 <= line["queue_ms"] <= line["ttft_ms"] <= line["engine_ms"] <= line["total_ms"]
    assert line["level"] == "INFO"
    assert time.strptime(line["time"][:19], "%Y-%m-%dT%H:%M:%S")
    assert PROMPT not in log.text
    assert "prompt" not in line
    assert not any(result["text"].strip() and result["text"] in log.text for result in answer["results"])


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/chat/completions", {"model": "demo", "messages": [{"role": "user", "content": PROMPT}], "max_tokens": 3}),
        ("/v1/responses", {"model": "demo@1", "input": PROMPT, "max_output_tokens": 3}),
        ("/v1/completions", {"model": "tiny", "prompt": PROMPT, "max_tokens": 3}),
        ("/compare", {"prompt": PROMPT, "arms": [{"name": "a"}, {"name": "b", "attributes": {}}], "max_new_tokens": 3}),
        ("/score", {"prompt": PROMPT, "continuations": [" Green.", " Blue."]}),
        ("/tokenize", {"prompt": PROMPT}),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_every_route_is_told_of_in_the_same_words(world: World, path: str, body: Any, stream: bool) -> None:
    streams = path not in ("/score", "/tokenize")
    with logged(log_format="json") as log:
        response = world.client.post(path, json=body | ({"stream": True} if stream and streams else {}))
    line = log.request()
    assert response.status_code == 200, response.text
    assert (line["route"], line["outcome"], line["status"]) == (path, "ok", 200)
    assert PROMPT not in log.text
    if path == "/tokenize":
        assert "prompt_tokens" not in line
    else:
        assert line["prompt_tokens"] > 5
        assert line["checkpoints"] == (
            [] if body.get("model") == "tiny" else ["demo@1" if "@" in str(body.get("model")) else "demo@2"]
        )
    if streams:
        assert 0 < line["completion_tokens"] <= 6


def test_a_prompt_is_logged_where_the_operator_asks_for_it(
    fresh: World,
) -> None:
    fresh.service.settings = fresh.service.settings.model_copy(update={"log_prompts": True})
    chat = [{"role": "user", "content": f"{PROMPT}\nINFO 東京"}]
    with logged(log_format="json") as log:
        fresh.post(prompt=[PROMPT, "Q:"], max_new_tokens=1)
        fresh.post(messages=chat, max_new_tokens=1)
        fresh.client.post("/score", json={"prompt": PROMPT, "continuations": ["a"]})
    assert [line["prompt"] for line in log.requests()] == [[PROMPT, "Q:"], chat, PROMPT]


def test_the_line_for_people_is_short(world: World) -> None:
    with logged() as log:
        world.post(prompt="Q: What", max_new_tokens=3, ignore_eos=True)
        world.client.get("/nowhere")
    first, second = (line.partition(" INFO server.access: ")[2] for line in log.text.splitlines() if "access" in line)
    assert first.startswith("req-")
    assert " POST /generate 200 " in first
    assert first.endswith(" + 3 tokens)")
    assert " GET /nowhere 404 " in second
    assert second.endswith(" ms")


def test_the_outcome_is_what_the_client_was_told(fresh: World, monkeypatch: pytest.MonkeyPatch) -> None:
    def outcome(ask: Callable[[TestClient], Any]) -> tuple[int, str]:
        with logged(log_format="json") as log:
            ask(fresh.client)
        line = log.request()
        return line["status"], line["outcome"]

    def generate(client: TestClient) -> None:
        client.post("/generate", json={"prompt": "a"})

    assert outcome(lambda client: client.get("/nowhere")) == (404, "not_found")
    assert outcome(lambda client: client.post("/generate", json={"prompt": ""})) == (422, "invalid_field")
    assert outcome(lambda client: client.post("/generate", content=b"{" * 99)) == (415, "unsupported_media_type")
    with monkeypatch.context() as patch:

        def full(*_: object) -> None:
            raise QueueFull("full")

        patch.setattr(fresh.service.engine, "submit", full)
        assert outcome(generate) == (429, "queue_full")
        patch.setattr(fresh.service.engine, "submit", lambda *_: 1 / 0)
        assert outcome(generate) == (500, "internal_error")
    with monkeypatch.context() as patch:
        broken = {"prompt": "a", "stream": True, "max_new_tokens": 20, "ignore_eos": True}

        def fails(*_: object) -> None:
            raise RuntimeError("the device is tired")

        patch.setattr("server.engine.model_runner.ModelRunner.forward", fails)
        assert outcome(lambda client: client.post("/generate", json=broken)) == (200, "generation_failed")


@pytest.fixture(scope="module")
def behind(settings: Settings) -> Iterator[tuple[Engine, str]]:
    with serving(settings.model_copy(update={"forwarded_allow_ips": "127.0.0.1"}), 1) as (server, _, url):
        yield server._service.engine, url


def hold(engine: Engine, monkeypatch: pytest.MonkeyPatch, steps: int) -> None:
    """After so many steps the engine stands still until a request is cancelled."""
    runner, seen, go_on = engine._runner, count(), threading.Event()
    execute, cancel = runner.execute_async, engine.cancel

    def held(*batch: Any) -> Any:
        assert next(seen) < steps or go_on.wait(20)
        return execute(*batch)

    def cancelled(request_id: str) -> None:
        cancel(request_id)
        go_on.set()

    monkeypatch.setattr(runner, "execute_async", held)
    monkeypatch.setattr(engine, "cancel", cancelled)


def test_a_client_that_leaves_a_stream_is_told_of(behind: tuple[Engine, str], monkeypatch: pytest.MonkeyPatch) -> None:
    engine, url = behind
    hold(engine, monkeypatch, 5)
    body = {"prompt": PROMPT, "max_new_tokens": 60, "ignore_eos": True, "stream": True}
    host, _, port = url.removeprefix("http://").partition(":")
    sent = json.dumps(body).encode()
    head = b"POST /generate HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n"
    with logged(log_format="json") as log:
        with socket.create_connection((host, int(port))) as client:
            client.sendall(head % len(sent) + sent)
            came = b""
            while came.count(b"event: token") < 3:
                came += client.recv(500)
        line = log.request()
    assert (line["status"], line["outcome"]) == (200, "client_gone")
    assert 0 < line["completion_tokens"] < 60
    assert 0 < line["ttft_ms"] < line["total_ms"]
    assert line["client"] == "127.0.0.1"


@pytest.mark.parametrize(
    ("forwarded", "client"),
    [(None, "127.0.0.1"), ("203.0.113.9", "203.0.113.9"), ("6.6.6.6, 203.0.113.9, 127.0.0.1", "203.0.113.9")],
)
def test_a_trusted_proxy_names_the_client(behind: tuple[Engine, str], forwarded: str | None, client: str) -> None:
    headers = {"X-Forwarded-For": forwarded} if forwarded else {}
    with logged(log_format="json") as log:
        httpx.get(f"{behind[1]}/healthz", headers=headers, timeout=60, trust_env=False)
        assert log.request()["client"] == client


def test_nobody_else_does(settings: Settings) -> None:
    with (
        serving(settings.model_copy(update={"forwarded_allow_ips": "192.0.2.1"}), 1) as (_, _, url),
        logged(log_format="json") as log,
    ):
        httpx.get(f"{url}/healthz", headers={"X-Forwarded-For": "203.0.113.9"}, timeout=60, trust_env=False)
        assert log.request()["client"] == "127.0.0.1"


def test_an_exception_is_a_field_of_its_line(settings: Settings) -> None:
    app = create_app(settings)

    @app.get("/breaks")
    def breaks() -> None:
        raise ValueError("two\nlines")

    with logged(log_format="json") as log, TestClient(app) as client:
        assert client.get("/breaks").status_code == 500
    lines = [json.loads(line) for line in log.text.splitlines()]
    (failed,) = [line for line in lines if line["level"] == "ERROR"]
    assert "ValueError: two\nlines" in failed["exc_info"]
