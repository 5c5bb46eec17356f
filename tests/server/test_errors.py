"""Whatever a client sends: one shape, the right status, the field named, never a 500."""

from typing import Any

import pytest

from server.errors import QueueFull
from tests.server.conftest import CONTEXT, World


@pytest.mark.parametrize(
    ("body", "status", "param"),
    [
        ({}, 422, "prompt"),
        ({"prompt": ""}, 422, "prompt"),
        ({"prompt": []}, 422, "prompt"),
        ({"prompt": ["fine", ""]}, 422, "prompt.1"),
        ({"prompt": 5}, 422, "prompt"),
        ({"prompt": ["fine", 5]}, 422, "prompt.1"),
        ({"prompt": None}, 422, "prompt"),
        ({"prompt": "\ud800"}, 422, "prompt"),
        ({"prompt": "a", "messages": [{"role": "user", "content": "b"}]}, 422, "prompt"),
        ({"messages": []}, 422, "messages"),
        ({"messages": [{"role": "user"}]}, 422, "messages.0.content"),
        ({"messages": [{"role": "robot", "content": "b"}]}, 422, "messages.0.role"),
        ({"prompt": "a", "max_new_tokens": 0}, 422, "max_new_tokens"),
        ({"prompt": "a", "max_new_tokens": -2}, 422, "max_new_tokens"),
        ({"prompt": "a", "max_new_tokens": 1e30}, 422, "max_new_tokens"),
        ({"prompt": "a", "max_new_tokens": 10**30}, 422, "max_new_tokens"),
        ({"prompt": "a", "max_new_tokens": "many"}, 422, "max_new_tokens"),
        ({"prompt": "a", "max_new_tokens": True}, 422, "max_new_tokens"),
        ({"prompt": "a", "temperature": -0.1}, 422, "temperature"),
        ({"prompt": "a", "temperature": 1e30}, 422, "temperature"),
        ({"prompt": "a", "temperature": float("nan")}, 422, "temperature"),
        ({"prompt": "a", "temperature": float("inf")}, 422, "temperature"),
        ({"prompt": "a", "temperature": True}, 422, "temperature"),
        ({"prompt": "a", "top_p": 0}, 422, "top_p"),
        ({"prompt": "a", "top_p": 1.1}, 422, "top_p"),
        ({"prompt": "a", "top_k": -2}, 422, "top_k"),
        ({"prompt": "a", "min_p": 2}, 422, "min_p"),
        ({"prompt": "a", "repetition_penalty": 0}, 422, "repetition_penalty"),
        ({"prompt": "a", "seed": 2**63}, 422, "seed"),
        ({"prompt": "a", "seed": 1.5}, 422, "seed"),
        ({"prompt": "a", "n": 0}, 422, "n"),
        ({"prompt": "a", "n": 10**9}, 422, "n"),
        ({"prompt": ["a"] * 200, "n": 2}, 422, "n"),
        ({"prompt": ["a"] * 200, "baseline": True}, 422, "prompt"),
        ({"prompt": "a", "logprobs": 21}, 422, "logprobs"),
        ({"prompt": "a", "logprobs": True}, 422, "logprobs"),
        ({"prompt": "a", "stop": 5}, 422, "stop"),
        ({"prompt": "a", "stop": ["x", 1]}, 422, "stop.1"),
        ({"prompt": "a", "baseline": "yes"}, 422, "baseline"),
        ({"prompt": "a", "positions": "everywhere"}, 422, "positions"),
        ({"prompt": "a", "attributes": {"kind": "much"}}, 422, "attributes.kind"),
        ({"prompt": "a", "attributes": {"kind": float("nan")}}, 422, "attributes.kind"),
        ({"prompt": "a", "attributes": {"kind": 1e30}}, 422, "attributes.kind"),
        ({"prompt": "a", "attributes": {"kind": -2.5}}, 422, "attributes.kind"),
        ({"prompt": "a", "attributes": {"kind": None}}, 422, "attributes.kind"),
        ({"prompt": "a", "attributes": {"funny": 1}}, 422, "attributes.funny"),
        ({"prompt": "a", "attributes": {"\ud800": 1}}, 422, "attributes.\ud800"),
        ({"prompt": "a", "attributes": [1]}, 422, "attributes"),
        ({"prompt": "a", "checkpoint": "nowhere"}, 404, "checkpoint"),
        ({"prompt": "a", "checkpoint": "demo@9"}, 404, "checkpoint"),
        ({"prompt": "a", "checkpoint": "../demo"}, 404, "checkpoint"),
        ({"prompt": "a", "checkpoint": ""}, 404, "checkpoint"),
        ({"prompt": "a", "checkpoint": "foreign"}, 409, "checkpoint"),
        ({"prompt": "a", "checkpoint": "damaged"}, 409, "checkpoint"),
        ({"prompt": "a", "steering": [{"checkpoint": "nowhere"}]}, 404, "steering.0.checkpoint"),
        ({"prompt": "a", "steering": [{"attributes": {"funny": 1}}]}, 422, "steering.0.attributes.funny"),
        ({"prompt": "a", "steering": [{"checkpoint": "demo"}, {"checkpoint": "demo@2"}]}, 422, "steering.1.checkpoint"),
        ({"prompt": "a", "steering": [{"strength": 1}]}, 422, "steering.0.strength"),
        ({"prompt": "a", "steering": [{}], "attributes": {}}, 422, "steering"),
        ({"prompt": "a", "temprature": 1}, 422, "temprature"),
    ],
)
def test_a_bad_body_is_refused_naming_the_field(world: World, body: dict[str, Any], status: int, param: str) -> None:
    import json

    response = world.client.post(
        "/generate", content=json.dumps(body), headers={"Content-Type": "application/json", "X-Request-Id": "mine"}
    )
    error = response.json()["error"]
    assert (response.status_code, error["param"]) == (status, param), error
    assert set(error) == {"type", "code", "message", "param", "request_id"}
    assert error["request_id"] == "mine" == response.headers["x-request-id"]


def test_an_unknown_attribute_is_told_the_known_ones(world: World) -> None:
    _, error = world.refused(prompt="a", attributes={"funny": 1})
    assert error["type"] == "unknown_attribute"
    assert "kind, true, fair" in error["message"]


def test_a_misspelled_field_is_told_the_right_one(world: World) -> None:
    _, error = world.refused(prompt="a", temprature=1)
    assert error["message"] == "There is no field 'temprature'; did you mean 'temperature'?"


@pytest.mark.parametrize(
    ("path", "body", "sentence"),
    [
        ("/generate", {"messages": [{"role": "user", "contnt": "a"}]}, "'messages.0.contnt'; did you mean 'content'?"),
        ("/generate", {"prompt": "a", "steering": [{"attribute": {}}]}, "'steering.0.attribute'; did you mean"),
        ("/compare", {"prompt": "a", "arms": [{"nam": "b"}]}, "'arms.0.nam'; did you mean 'name'?"),
        ("/checkpoints/demo/activate", {"versoin": "1"}, "'versoin'; did you mean 'version'?"),
        (
            "/v1/chat/completions",
            {"model": "demo", "messages": [{"role": "user", "content": "a"}], "steering": {"trac": True}},
            "'steering.trac'; did you mean 'trace'?",
        ),
        (
            "/generate",
            {"messages": [{"role": "user", "content": [{"type": "text", "text": "a", "txt": "a"}]}]},
            "'messages.0.content.0.txt'; did you mean 'text'?",
        ),
    ],
)
def test_a_misspelled_field_inside_a_body_is_told_the_right_one(
    world: World, path: str, body: dict[str, Any], sentence: str
) -> None:
    error = world.client.post(path, json=body).json()["error"]
    assert f"There is no field {sentence}" in error["message"]


def test_a_value_that_is_too_long_or_too_many_is_told_the_limit(world: World) -> None:
    _, error = world.refused(prompt="a", stop=["b" * 300])
    assert error["message"].startswith("stop.0 should have at most 256 characters, not 'bbb")
    _, error = world.refused(prompt="a", logit_bias={str(token): 1 for token in range(1025)})
    assert error["message"].startswith("logit_bias has too many items; at most 1024 are taken")


def test_a_prompt_that_is_too_long_is_told_the_limit_and_its_length(world: World) -> None:
    status, error = world.refused(prompt=["short", "a b " * CONTEXT])
    assert status == 413
    assert error["type"] == "prompt_too_long"
    assert error["param"] == "prompt.1"
    assert str(CONTEXT - 1) in error["message"]


@pytest.mark.parametrize(
    "content", [b"{", b"", b"[1]", b'"text"', b"nonsense", b"\xff\xfe", b"[" * 100_000, b'{"prompt": "a", "n": NaN}']
)
def test_a_body_that_is_no_request_is_a_clean_error(world: World, content: bytes) -> None:
    response = world.client.post("/generate", content=content, headers={"Content-Type": "application/json"})
    assert 400 <= response.status_code < 500
    assert response.json()["error"]["message"]


@pytest.mark.parametrize("path", ["/generate", "/score", "/v1/completions", "/v1/responses", "/tokenize"])
@pytest.mark.parametrize(
    "kind", ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x", None]
)
def test_a_body_of_the_wrong_type_is_a_415(world: World, path: str, kind: str | None) -> None:
    headers = {} if kind is None else {"Content-Type": kind}
    response = world.client.post(path, content=b'{"prompt": "a", "model": "tiny"}', headers=headers)
    error = response.json()["error"]
    assert (response.status_code, error["code"]) == (415, "unsupported_media_type")
    assert "'Content-Type: application/json'" in error["message"]
    assert kind is None or kind[:9] in error["message"]


@pytest.mark.parametrize("kind", ["application/json", "Application/JSON; charset=utf-8", "application/problem+json"])
def test_json_may_say_more_of_itself(world: World, kind: str) -> None:
    body = b'{"prompt": "a", "max_new_tokens": 1}'
    assert world.client.post("/generate", content=body, headers={"Content-Type": kind}).status_code == 200


def test_json_that_is_no_object_is_no_wrong_type(world: World) -> None:
    response = world.client.post("/generate", json=[1])
    assert (response.status_code, response.json()["error"]["type"]) == (422, "invalid_field")


@pytest.mark.parametrize(
    ("method", "path", "body"),
    [
        ("GET", "/v1/models/", None),
        ("GET", "/v1/models/tiny/", None),
        ("GET", "/checkpoints/", None),
        ("GET", "/checkpoints/demo/", None),
        ("GET", "/health/", None),
        ("GET", "/healthz//", None),
        ("GET", "/docs/", None),
        ("POST", "/generate/", {"prompt": "a", "max_new_tokens": 1}),
        ("POST", "/tokenize/", {"prompt": "a"}),
        ("POST", "/v1/completions/", {"model": "tiny", "prompt": "a", "max_tokens": 1}),
        ("POST", "/v1/chat/completions/", {"model": "tiny", "messages": [{"role": "user", "content": "a"}]}),
    ],
)
def test_a_slash_at_the_end_changes_nothing(world: World, method: str, path: str, body: object) -> None:
    assert world.client.request(method, path, json=body, follow_redirects=False).status_code == 200


def test_a_path_of_slashes_is_the_page(world: World) -> None:
    assert world.client.get("//").status_code == 200


LONG = "a b " * CONTEXT


@pytest.mark.parametrize(
    ("path", "body", "status", "what"),
    [
        ("/v1/completions", {"prompt": LONG}, 400, "in the prompt"),
        ("/v1/completions", {"prompt": "a" * 65 * CONTEXT}, 400, "characters in the prompt"),
        (
            "/v1/completions",
            {"prompt": [5] * CONTEXT, "stream": True},
            400,
            f"requested {CONTEXT} tokens in the prompt",
        ),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": LONG}]}, 400, "in the messages"),
        ("/v1/responses", {"input": LONG}, 400, "in the messages"),
        ("/v1/responses", {"input": LONG, "stream": True}, 400, "in the messages"),
        ("/generate", {"prompt": LONG}, 413, "in the prompt"),
        ("/generate", {"messages": [{"role": "user", "content": LONG}]}, 413, "in the messages"),
        ("/score", {"prompt": "a", "continuations": [LONG]}, 413, "in the prompt with this continuation"),
    ],
)
def test_too_many_tokens_are_told_in_the_words_that_clients_know(
    world: World, path: str, body: dict[str, Any], status: int, what: str
) -> None:
    model = {"model": "tiny"} if path.startswith("/v1") else {}
    response = world.client.post(path, json={**model, **body})
    error = response.json()["error"]
    assert (response.status_code, error["code"], error["type"]) == (
        status,
        "context_length_exceeded",
        "prompt_too_long",
    )
    assert error["message"].startswith(
        f"This model's maximum context length is {CONTEXT} tokens. However, you requested "
    )
    assert what in error["message"]
    assert "the prompt is too long" in error["message"]  # LangChain looks for this


def test_an_unknown_path_and_a_wrong_method_have_the_same_shape(world: World) -> None:
    missing = world.client.get("/nowhere")
    assert (missing.status_code, missing.json()["error"]["type"]) == (404, "not_found")
    assert missing.json()["error"]["code"] == "not_found"
    wrong = world.client.get("/generate")
    assert (wrong.status_code, wrong.json()["error"]["type"]) == (405, "method_not_allowed")
    assert wrong.headers["allow"] == "POST"


def test_what_nobody_foresaw_is_a_500_that_tells_nothing(fresh: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fresh.service, "codec", None)
    response = fresh.client.post("/generate", json={"prompt": "a"})
    assert response.status_code == 500
    error = response.json()["error"]
    assert error["type"] == "internal_error"
    assert "codec" not in error["message"]
    assert error["request_id"] == response.headers["x-request-id"]


def test_a_text_whose_echo_finds_the_queue_full_goes_on_for_nobody(
    fresh: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, cancelled = fresh.service.engine, []
    cancel = engine.cancel

    def full(*asked: object, **more: object) -> None:
        raise QueueFull("full")

    def noted(request_id: str) -> None:
        cancelled.append(request_id)
        cancel(request_id)

    monkeypatch.setattr(engine, "score", full)
    monkeypatch.setattr(engine, "cancel", noted)
    body = {"model": "tiny", "prompt": "a b", "echo": True, "logprobs": 1, "max_tokens": 80}
    assert fresh.client.post("/v1/completions", json=body).status_code == 429
    assert len(cancelled) == 1
    engine.call(lambda: None).result(10)
    assert not engine.open_sequences
    assert fresh.service.registry.pins == 0


def test_a_full_queue_is_a_429_with_retry_after(fresh: World) -> None:
    service = fresh.service
    service.engine._queued = service.settings.queue_limit
    response = fresh.client.post("/generate", json={"prompt": "a"})
    assert response.status_code == 429
    assert int(response.headers["retry-after"]) >= 1
    assert response.json()["error"]["code"] == "rate_limit_exceeded"
    assert service.registry.pins == 0


@pytest.mark.parametrize(
    ("body", "sentence"),
    [
        (
            {"logit_bias": [[1, 2]]},
            'logit_bias should be an object of biases by token id, as in {"42": -100}, not [[1, 2]].',
        ),
        ({"attributes": [1]}, "attributes should be an object, not [1]."),
        ({"steering": [1]}, "steering.0 should be an object, not 1."),
    ],
)
def test_what_should_be_an_object_is_called_so_as_json_does(world: World, body: dict[str, Any], sentence: str) -> None:
    _, error = world.refused(prompt="a", **body)
    assert error["message"] == sentence
