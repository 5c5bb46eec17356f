"""Whatever a client sends costs little, and is answered briefly."""

import asyncio
import gzip
import json
from collections.abc import Iterator
from typing import Any

import pytest
from pydantic import BaseModel
from starlette.exceptions import HTTPException
from starlette.testclient import TestClient

from server.api.body import parse_body
from server.app import create_app
from server.config import Settings
from server.errors import InvalidField
from server.schemas import StrictRequest
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
    _, error = world.refused(**{f"temprature{i}": i for i in range(200)})
    assert error["message"].count("There is no field") == 5
    assert error["message"].endswith("And 195 more.")
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
        (b"[" * 20_000, "nested too deeply"),
        (b"[" * 100_000, "more than 32768 lists and objects"),
        (b'{"n": ' + b"1" * 5000 + b"}", "too many digits"),
        (rb'{"\ud800": 1, "prompt": "a"}', "The name of a field holds half of a surrogate pair"),
        (rb'{"stop": "\ud800", "prompt": "a"}', "stop holds half of a surrogate pair"),
    ],
)
def test_a_body_that_cannot_be_parsed_is_told_why(world: World, content: bytes, why: str) -> None:
    response = world.client.post("/generate", content=content, headers=JSON)
    assert 400 <= response.status_code < 500
    assert why in response.json()["error"]["message"]


def body(before: str, one: str, times: int, after: str) -> bytes:
    return f"{before}{','.join([one] * times)}{after}".encode()


@pytest.mark.parametrize(
    ("path", "content", "why"),
    [
        ("/v1/completions", body('{"model": "tiny", "prompt": [', "{}", 40_000, "]}"), "more than 32768 lists and"),
        ("/generate", body('{"prompt": [', "[]", 40_000, "]}"), "more than 32768 lists and objects"),
        ("/generate", body('{"prompt": [', '""', 70_000, "]}"), "more than 65536 texts and names of fields"),
        ("/generate", body("{", '"a":1', 70_000, "}"), "more than 65536 texts and names of fields"),
        ("/detokenize", body('{"tokens": [', "1", 2**20 + 1, "]}"), "more than 1048576 values"),
        ("/generate", body("{", '"a":', 1, "[" * 64 + "]" * 64 + "}"), "nested too deeply"),
        ("/generate", rb'{"\\":' + b"[" * 64 + rb'"\"[", "]\\"' + b"]" * 64 + b"}", "nested too deeply"),
    ],
)
def test_json_of_more_than_can_be_read_in_a_moment_is_not_parsed(
    world: World, path: str, content: bytes, why: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patched:
        patched.setattr("json.loads", None)
        response = world.client.post(path, content=content, headers=JSON)
    assert (response.status_code, response.json()["error"]["type"]) == (400, "bad_request")
    assert why in response.json()["error"]["message"]


@pytest.mark.parametrize("text", ['["' * 70_000, "{[" * 40_000, "," * 2**20, '\\"[' * 40_000])
def test_what_stands_in_a_text_is_not_counted(world: World, text: str) -> None:
    status, error = world.refused(prompt=text)
    assert (status, error["type"]) == (413, "prompt_too_long")


def test_many_token_ids_are_one_prompt(world: World) -> None:
    content = body('{"model": "tiny", "prompt": [', "1", 500_000, "]}")
    response = world.client.post("/v1/completions", content=content, headers=JSON)
    assert response.json()["error"]["code"] == "context_length_exceeded"


@pytest.mark.parametrize(
    ("path", "content", "why"),
    [
        ("/generate", body('{"messages": [{"role": "user", "content": [', "1", 2000, "]}]}"), "messages.0.content has"),
        ("/generate", body('{"prompt": [', "1", 2000, "]}"), "prompt has too many items; at most 256"),
        ("/v1/responses", body('{"model": "tiny", "input": [', "1", 2000, "]}"), "input has too many items"),
        ("/score", body('{"prompt": "a", "continuations": [', "1", 2000, "]}"), "continuations has too many items"),
        ("/detokenize", body('{"tokens": [', "-1", 2000, "]}"), "tokens.0 should be greater than or equal to 0"),
        ("/generate", body('{"prompt": [', "1", 200, "]}"), "prompt.0 should be"),
    ],
)
def test_the_members_of_a_list_are_counted_first_and_the_first_bad_one_is_the_last(
    world: World, path: str, content: bytes, why: str
) -> None:
    response = world.client.post(path, content=content, headers=JSON)
    message = response.json()["error"]["message"]
    assert response.status_code == 422
    assert why in message
    assert "more." not in message


@pytest.mark.parametrize("path", [None, "messages.0"])
def test_an_object_of_too_many_fields_is_not_looked_through(world: World, path: str | None) -> None:
    many = {f"x{i}": 1 for i in range(300)}
    _, error = world.refused(**({"messages": [{"role": "user", "content": "a", **many}]} if path else many))
    assert error["param"] == path
    assert "has too many" in error["message"]
    assert "at most 256" in error["message"]


def schemas(kind: type[BaseModel] = StrictRequest) -> Iterator[type[BaseModel]]:
    for one in kind.__subclasses__():
        yield one
        yield from schemas(one)


def test_every_list_and_every_object_of_a_request_has_a_length() -> None:
    seen = 0

    def look(where: str, schema: dict[str, Any]) -> None:
        nonlocal seen
        if schema.get("type") == "array":
            seen += 1
            assert schema.get("maxItems"), where
        if schema.get("type") == "object" and "additionalProperties" in schema and "properties" not in schema:
            seen += 1
            assert schema.get("maxProperties"), where
        for name, value in schema.items():
            for part in value if isinstance(value, list) else [value]:
                if isinstance(part, dict) and name != "examples":
                    look(f"{where}.{name}", part)

    for one in schemas():
        look(one.__name__, one.model_json_schema())
    assert seen > 50


@pytest.mark.parametrize(("length", "beside"), [(100, False), (10_000, True)])
def test_a_long_body_is_parsed_beside_the_event_loop(
    world: World, length: int, beside: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    on_loop: list[bool] = []

    def noted(*given: Any) -> Any:
        on_loop.append(asyncio._get_running_loop() is not None)
        return parse_body(*given)

    monkeypatch.setattr("server.api.body.parse_body", noted)
    assert world.client.post("/tokenize", json={"prompt": "", "chat_template_kwargs": {}, "model": "x" * length})
    assert on_loop == [not beside]


def test_a_long_value_is_shown_from_its_beginning(world: World) -> None:
    _, error = world.refused(prompt="a", temperature=[1] * 100_000)
    assert error["message"].startswith("temperature should be a valid number, not [1, 1, 1,")
    assert len(error["message"]) < 200
    _, error = world.refused(prompt="a", temperature={"a": {"b": ["c" * 1000] * 1000}})
    assert "{'a': {'b': ['ccc" in error["message"]


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
