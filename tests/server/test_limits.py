"""Whatever a client sends costs little, and is answered briefly."""

import gzip
import json
from collections.abc import Iterator

import pytest
from starlette.exceptions import HTTPException
from starlette.testclient import TestClient

from server.app import create_app
from server.config import Settings
from server.errors import InvalidField
from server.tokenizer import Codec
from tests.server.conftest import CONTEXT, World

JSON = {"Content-Type": "application/json"}


def test_a_body_that_is_too_large_is_refused_by_its_length(world: World) -> None:
    limit = world.service.settings.max_body_bytes
    assert limit == 4 * 2**20
    response = world.client.post("/generate", content=b" " * (limit + 1), headers=JSON)
    error = response.json()["error"]
    assert (response.status_code, error["type"]) == (413, "body_too_large")
    assert str(limit) in error["message"]
    assert error["request_id"] == response.headers["x-request-id"]


@pytest.mark.parametrize("length", ["9" * 5000, "4194305"])
def test_a_length_is_believed_before_anything_is_read(world: World, length: str) -> None:
    response = world.client.post("/generate", content=b"{}", headers={**JSON, "Content-Length": length})
    assert response.status_code == 413


def test_a_compressed_body_is_refused_by_what_it_is(world: World) -> None:
    body = json.dumps({"prompt": "a", "max_new_tokens": 1}).encode()
    response = world.client.post("/generate", content=gzip.compress(body), headers={**JSON, "Content-Encoding": "gzip"})
    error = response.json()["error"]
    assert (response.status_code, error["type"]) == (415, "unsupported_media_type")
    assert "'Content-Encoding: gzip'" in error["message"]
    plain = world.client.post("/generate", content=body, headers={**JSON, "Content-Encoding": "Identity"})
    assert plain.status_code == 200


def test_a_body_that_does_not_say_its_length_is_counted(settings: Settings) -> None:
    sent = 0

    def chunks() -> Iterator[bytes]:
        nonlocal sent
        for _ in range(100):
            sent += 1
            yield b" " * 100

    app = create_app(settings.model_copy(update={"max_body_bytes": 1000}))
    with TestClient(app) as client:
        response = client.post("/generate", content=chunks(), headers=JSON)
        assert (response.status_code, response.json()["error"]["type"]) == (413, "body_too_large")
        fits = json.dumps({"prompt": "a", "max_new_tokens": 1}).encode()
        assert client.post("/generate", content=iter([fits[:9], fits[9:]]), headers=JSON).status_code == 200


@pytest.mark.parametrize(
    "body", [{"prompt": "a" * 65 * CONTEXT}, {"messages": [{"role": "user", "content": "a" * 65 * CONTEXT}]}]
)
def test_a_text_that_cannot_fit_is_refused_before_it_is_tokenized(world: World, body: dict[str, object]) -> None:
    status, error = world.refused(**body)
    assert (status, error["type"], error["param"]) == (413, "prompt_too_long", next(iter(body)))
    assert f"{65 * CONTEXT} characters" in error["message"]
    assert f"{CONTEXT} tokens" in error["message"]


def test_only_a_few_of_many_problems_are_described(world: World) -> None:
    _, error = world.refused(**{f"temprature{i}": i for i in range(2000)})
    assert error["message"].count("There is no field") == 5
    assert error["message"].endswith("And 1995 more.")
    assert error["param"] == "temprature0"


def test_a_message_is_short_whatever_was_sent(world: World) -> None:
    for body in ({"prompt": "a", "checkpoint": "x" * 10_000}, {"prompt": "a", "attributes": {"y" * 10_000: 1}}):
        _, error = world.refused(**body)
        assert len(error["message"]) < 510
        assert len(error["param"]) < 210
    missing = world.client.get("/" + "z" * 10_000).json()["error"]
    assert len(missing["message"]) < 510


def test_a_path_cannot_write_lines_into_the_log(world: World, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO", "server.access"):
        world.client.get("/a%0a2026-01-01 ERROR server: lies%1b[31m/" + "b" * 1000)
    line = next(record.getMessage() for record in caplog.records if record.name == "server.access")
    assert line.isprintable()
    assert "GET /a%0a2026-01-01%20ERROR" in line
    assert len(line) < 300


@pytest.mark.parametrize(
    ("status", "kind"), [(401, "unauthorized"), (415, "unsupported_media_type"), (413, "body_too_large")]
)
def test_a_refusal_of_the_framework_keeps_its_status(fresh: World, status: int, kind: str) -> None:
    @fresh.app.get("/refusing")
    def refusing() -> None:
        raise HTTPException(status)

    response = fresh.client.get("/refusing")
    assert (response.status_code, response.json()["error"]["type"]) == (status, kind)


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (b'{"prompt": "\xff"}', "not JSON in UTF-8"),
        (b"[" * 100_000, "nested too deeply"),
        (b'{"n": ' + b"1" * 5000 + b"}", "too many digits"),
        (rb'{"\ud800": 1, "prompt": "a"}', "The name of a field holds half of a surrogate pair"),
        (rb'{"stop": "\ud800", "prompt": "a"}', "stop holds half of a surrogate pair"),
    ],
)
def test_a_body_that_cannot_be_parsed_is_told_why(world: World, content: bytes, why: str) -> None:
    response = world.client.post("/generate", content=content, headers=JSON)
    assert 400 <= response.status_code < 500
    assert why in response.json()["error"]["message"]


def test_half_a_surrogate_pair_is_refused_wherever_it_comes_from(world: World) -> None:
    codec: Codec = world.service.codec
    with pytest.raises(InvalidField, match="surrogate") as caught:
        codec.encode("a \udcff", "prompt")
    assert caught.value.param == "prompt"
    content = rb'{"messages": [{"role": "user", "content": "\ud800"}]}'
    error = world.client.post("/generate", content=content, headers=JSON).json()["error"]
    assert (error["type"], error["param"]) == ("invalid_field", "messages.0.content")


def test_a_head_is_answered_like_a_get(world: World) -> None:
    for path in ("/", "/healthz", "/readyz"):
        response = world.client.head(path)
        assert (response.status_code, response.content) == (200, b"")
